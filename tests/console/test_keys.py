"""Keys by the console: made, found, changed, rotated, disabled and deleted, as an operator does it."""

import re
from html import unescape

import pytest

from tests.support.console import Visit, change_key, make_key, names_of, secret_of
from tests.support.keys import admin, ask
from tests.support.processes import GatewayProcess, wait_for


def test_a_key_is_made_used_disabled_and_enabled(console: GatewayProcess, operator: Visit) -> None:
    key_id, secret = make_key(operator, "billing", owner="Ann", models="fake-model", requests_per_minute="100")
    assert ask(console, secret).status_code == 200
    assert secret not in operator.get(f"/console/keys/{key_id}").text
    assert "The key is disabled" in change_key(operator, key_id, "/switch", disabled="yes")
    wait_for(lambda: ask(console, secret).status_code == 401)
    assert "The key is enabled" in change_key(operator, key_id, "/switch", disabled="no")
    wait_for(lambda: ask(console, secret).status_code == 200)


def test_a_rotated_key_has_a_new_secret_and_the_old_one_ends(console: GatewayProcess, operator: Visit) -> None:
    key_id, old = make_key(operator, "rotated")
    page = operator.send(f"/console/keys/{key_id}", f"/console/keys/{key_id}/rotate", grace="0")
    assert page.status_code == 201
    assert ask(console, secret_of(page)).status_code == 200
    wait_for(lambda: ask(console, old).status_code == 401)
    wrong = operator.send(f"/console/keys/{key_id}", f"/console/keys/{key_id}/rotate", grace="12345678901")
    assert wrong.status_code == 400


def test_a_change_keeps_what_the_form_shows_and_sets_the_rest(console: GatewayProcess, operator: Visit) -> None:
    key_id, _ = make_key(operator, "before", owner="Ann", expires="2099-01-31", tokens_per_day="5")
    fields = {"name": "after", "owner": "Ann", "expires": "2099-01-31", "priority": "7", "concurrent": "3"}
    assert "The change is stored" in change_key(operator, key_id, **fields)
    with admin(console) as api:
        it = api.get(f"/admin/keys/{key_id}").json()
    limits = {name: value for name, value in it["limits"].items() if value is not None}
    assert (it["name"], it["priority"], limits, it["models"]) == ("after", 7, {"concurrent": 3}, None)
    assert it["expires_at"] == 4_073_500_800


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": " "}, "name"),
        ({"name": "x", "expires": "soon"}, "expires"),
        ({"name": "x", "expires": "2001-01-01"}, "in the past"),
        ({"name": "x", "tokens_per_day": "many"}, "whole number"),
        ({"name": "x", "tokens_per_day": "0"}, "at least 1"),
        ({"name": "x", "priority": "500"}, "at most 100"),
        ({"name": "x", "priority": "0"}, "at least 1"),
        ({"name": "x", "owner": "o" * 201}, "at most 200"),
    ],
)
def test_a_mistake_is_told_and_the_form_keeps_what_was_typed(
    operator: Visit, fields: dict[str, str], words: str
) -> None:
    page = operator.send("/console/keys/new", "/console/keys", **fields)
    assert page.status_code == 400
    assert words in page.text
    assert 'role="alert"' in page.text
    for value in fields.values():
        assert f'value="{value.strip() or value}"' in page.text


def test_keys_are_found_by_name_owner_and_id_and_paged(console: GatewayProcess, operator: Visit) -> None:
    with admin(console) as api:
        for number in range(60):
            api.post("/admin/keys", json={"name": f"paged {number:02}", "owner": "100% Bob_by"}).raise_for_status()
    first = operator.get("/console/keys", params={"q": "PAGED"}).text
    following = re.search(r'href="(/console/keys\?[^"]+)" rel="next"', first)
    assert following
    second = operator.get(following[1].replace("&amp;", "&")).text
    assert (len(names_of(first)), len(names_of(second))) == (50, 10)
    assert len(set(names_of(first) + names_of(second))) == 60
    assert 'rel="next"' not in second
    assert len(names_of(operator.get("/console/keys", params={"q": "0% bob_"}).text)) == 50
    assert names_of(operator.get("/console/keys", params={"q": "0%bob"}).text) == []
    key_id = re.findall(r'href="/console/keys/([0-9A-Za-z]{10})"', first)[0]
    assert len(names_of(operator.get("/console/keys", params={"q": key_id[:8]}).text)) == 1
    assert operator.get("/console/keys", params={"before": "nonsense", "q": "x" * 1000}).status_code == 200


def test_a_key_is_deleted_when_its_id_is_typed(operator: Visit) -> None:
    key_id, _ = make_key(operator, "to be deleted")
    refused = operator.send(f"/console/keys/{key_id}", f"/console/keys/{key_id}/delete", typed="yes")
    assert refused.status_code == 400
    assert operator.get(f"/console/keys/{key_id}").status_code == 200
    operator.send(f"/console/keys/{key_id}", f"/console/keys/{key_id}/delete", typed=key_id)
    assert operator.get(f"/console/keys/{key_id}").status_code == 404


def test_a_prompt_is_made_used_and_given_up(console: GatewayProcess, operator: Visit) -> None:
    key_id, _ = make_key(operator, "prompted")
    answer = operator.send(
        "/console/prompts", "/console/prompts", name="polite", template="Be\r\npolite, {{ key_name }}."
    )
    page = operator.get(answer.headers["location"]).text
    assert "polite, {{ key_name }}." in page
    change_key(operator, key_id, "/prompt", prompt="polite")
    with admin(console) as api:
        prompts = api.get("/admin/prompts").json()
        assert [it["template"] for it in prompts["data"]] == ["Be\npolite, {{ key_name }}."]
        assert [it["target"] for it in prompts["uses"]] == [key_id]
        for _ in range(2):  # and none twice
            change_key(operator, key_id, "/prompt", prompt="")
            assert api.get("/admin/prompts").json()["uses"] == []
    wrong = operator.send("/console/prompts", "/console/prompts", name="polite", template="{% for %}")
    assert wrong.status_code == 400
    assert "{% for %}" in wrong.text


def test_default_limits_are_shown_and_changed(console: GatewayProcess, operator: Visit) -> None:
    operator.send("/console/limits", "/console/limits", requests_per_minute="5000")
    with admin(console) as api:
        assert api.get("/admin/limits").json()["stored"]["requests_per_minute"] == 5000
        operator.send("/console/limits", "/console/limits", requests_per_minute="")
        assert api.get("/admin/limits").json()["stored"]["requests_per_minute"] is None
    assert operator.send("/console/limits", "/console/limits", concurrent="-1").status_code == 400


def test_an_unknown_key_is_a_page_that_says_so(operator: Visit) -> None:
    page = operator.get("/console/keys/0000000000")
    assert page.status_code == 404
    assert page.headers["content-type"].startswith("text/html")
    assert "There is no key" in page.text


def test_a_form_that_is_sent_twice_acts_once(console: GatewayProcess, operator: Visit) -> None:
    """Each connection may be another worker's. After a mistake, the form may be sent again."""
    key_id, _ = make_key(operator, "to be rotated")
    for page, path, fields, mistake, status in (
        ("keys/new", "keys", {"name": "made-once"}, {"name": ""}, 201),
        (f"keys/{key_id}", f"keys/{key_id}/rotate", {"grace": "3600"}, {"grace": "x"}, 201),
        ("prompts", "prompts", {"name": "once", "template": "x"}, {"template": "{% for %}"}, 303),
    ):
        form = {"form_token": operator.token(f"/console/{page}"), **fields}
        assert operator.post(f"/console/{path}", form | mistake).status_code == 400
        sent = [operator.post(f"/console/{path}", form, connection="close") for _ in range(4)]
        assert [it.status_code for it in sent] == [status, 409, 409, 409]
        assert "This form was sent already" in sent[1].text
    with admin(console) as api:
        assert api.get("/admin/keys").text.count("made-once") == 1
        assert len(api.get(f"/admin/keys/{key_id}").json()["secrets"]) == 2
        assert [it["version"] for it in api.get("/admin/prompts").json()["data"] if it["name"] == "once"] == [1]


def test_a_change_leaves_fields_that_were_not_typed_in_as_they_are(console: GatewayProcess, operator: Visit) -> None:
    """The API takes what the form cannot show without loss: models with commas, and spaces around names."""
    fields = {"name": " spaced ", "owner": " Ann ", "models": ["a,b", " c"], "limits": {"tokens_per_day": 10**15}}
    with admin(console) as api:
        key_id = api.post("/admin/keys", json=fields).json()["key"]["id"]
        page = operator.get(f"/console/keys/{key_id}").text
        form = {
            name: unescape(value)
            for name, value in re.findall(r'<input id="([a-z_]+)" name="[a-z_]+" type="\w+" value="([^"]*)"', page)
        }
        assert form["models"] == "a,b,  c"
        change_key(operator, key_id, **form | {"priority": "7"})
        it = api.get(f"/admin/keys/{key_id}").json()
        assert {name: it[name] for name in ("name", "owner", "models", "priority")} == {
            "name": " spaced ",
            "owner": " Ann ",
            "models": ["a,b", " c"],
            "priority": 7,
        }
        change_key(operator, key_id, **form | {"models": "a, b", "owner": " Bob ", "tokens_per_day": ""})
        it = api.get(f"/admin/keys/{key_id}").json()
        assert (it["owner"], it["models"], it["priority"]) == ("Bob", ["a", "b"], 1)
        assert it["limits"]["tokens_per_day"] is None
