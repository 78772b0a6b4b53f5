"""What the console shows: this moment, usage, one request, and to a key's owner that key alone."""

import json
import re
from collections.abc import Iterator
from csv import reader
from html import unescape
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from tests.support.console import Visit, console_gateway, visiting
from tests.support.keys import CHAT, admin
from tests.support.processes import AUTH, MESSAGES, NO_TLS, FakeEngine, GatewayProcess, free_port, wait_for

MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def made(console: GatewayProcess) -> Iterator[dict[str, Any]]:
    """A key whose name and owner hold markup."""
    with admin(console) as api:
        made = api.post(
            "/admin/keys", json={"name": "N" + MARKUP, "owner": "O" + MARKUP, "models": ["fake-model", MARKUP]}
        )
        yield made.json()


def chat(console: GatewayProcess, key: str, **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "fake-model", "messages": MESSAGES} | body
    return httpx.post(console.url + CHAT, json=body, headers=headers, timeout=30, verify=NO_TLS)


def tables(page: str) -> str:
    return page[page.index("<table") :]


def test_now_tells_engines_and_what_is_answered(
    console: GatewayProcess, operator: Visit, engine: FakeEngine, made: dict[str, Any], mark: str
) -> None:
    script = [["head", [200, {"content-type": "text/event-stream"}]], ["role", ""], ["token", "one"], ["gate", mark]]
    script += [["token", "two"], ["finish", "stop"], ["usage", ""], ["done", ""], ["end", ""]]
    body = {"user": mark, "stream": True, "script": script}
    done: list[httpx.Response] = []
    thread = Thread(target=lambda: done.append(chat(console, made["secret"], **body)))
    thread.start()
    engine.wait_seen(mark)

    def picture() -> dict[str, Any]:
        found: dict[str, Any] = operator.get("/console/now.json").json()
        return found

    try:
        told = wait_for(lambda: (it := picture()) and it["answered"] == 1 and it)
    finally:
        engine.release(mark)
        thread.join()
    assert told
    row = told["running"][0]
    assert (row["key"], row["name"], row["owner"]) == (made["key"]["id"], "N" + MARKUP, "O" + MARKUP)
    assert (told["waiting"], row["position"], row["engine"], row["model"]) == (0, None, "engine", "fake-model")
    it = told["engines"][0]
    assert (it["name"], it["dialect"], it["state"], it["models"]) == ("engine", "vllm", "ok", ["fake-model"])
    assert (it["slots"], it["used"], it["waiting"]) == (256, 1, 0)
    after = wait_for(lambda: (it := picture()) and it["answered"] == 0 and it["minute"]["requests"] and it)
    assert after
    assert after["minute"]["failed"] <= after["five"]["failed"]


def test_usage_is_plotted_and_summed_by_everything(
    console: GatewayProcess, operator: Visit, made: dict[str, Any]
) -> None:
    assert chat(console, made["secret"], stream=True).status_code == 200
    key_id = made["key"]["id"]
    wait_for(lambda: key_id in operator.get("/console/usage.csv?by=key").text)
    for by in ("all", "key", "owner", "model", "engine"):
        for span in ("24h", "7d", "month", "last", "year"):
            page = operator.get("/console/usage", params={"by": by, "span": span})
            if (by, span) == ("key", "year"):
                assert page.status_code == 400
                continue
            assert page.status_code == 200
            assert page.text.count('<svg class="plot"') == 5
            assert ("There is no usage" in page.text) == (span == "last")
    csv = operator.get("/console/usage.csv?by=model&span=7d")
    assert csv.headers["content-type"].startswith("text/csv")
    assert csv.headers["content-disposition"] == 'attachment; filename="usage-model-7d.csv"'
    assert csv.text.startswith("model,name,requests,finished,failed,tokens_in,")
    assert any(line.startswith("fake-model,fake-model,") for line in csv.text.splitlines())
    over_time = operator.get("/console/usage.csv?by=model&span=24h&over=time")
    assert over_time.headers["content-disposition"] == 'attachment; filename="usage-model-24h-over-time.csv"'
    head, *hours = list(reader(over_time.text.splitlines()))
    assert head[:4] == ["begins", "model", "name", "requests"]
    assert len({it[0] for it in hours}) == 24
    whole = list(reader(operator.get("/console/usage.csv?by=model&span=24h").text.splitlines()))[1:]
    for model, _, requests, *_ in whole:
        assert sum(int(it[3]) for it in hours if it[1] == model) >= int(requests) > 0
    text = unescape(operator.get("/console/usage?by=model&span=24h").text)
    values = re.findall(r'<tr><th scope="row">(....-..-.. ..:..)</th><td class="n">(.*?)</td>', text)
    assert [it[0] for it in values] == [it[0] for it in hours if it[1] == "fake-model"] * 5
    assert any(it[1] not in ("0", "\u2013") for it in values[:24])
    for wrong in ("by=color", "span=century", "over=all"):
        assert operator.get(f"/console/usage?{wrong}").status_code == 400


def test_an_operator_who_asks_for_too_many_pages_leaves_other_operators_their_part(
    engine: FakeEngine, tmp_path: Path
) -> None:
    with (
        console_gateway(tmp_path / "log", engine.url, STACK_WORKERS="1") as gateway,
        visiting(gateway) as greedy,
        visiting(gateway) as modest,
    ):
        while (answer := greedy.get("/console/try")).status_code != 429:
            assert answer.status_code == 200
        assert modest.get("/console/try").status_code == 200


def test_markup_in_names_is_text_everywhere(console: GatewayProcess, operator: Visit, made: dict[str, Any]) -> None:
    answer = chat(console, made["secret"])
    request_id, key_id = answer.headers["x-request-id"], made["key"]["id"]
    wait_for(lambda: key_id in operator.get("/console/usage.csv?by=key").text)
    pages = ["keys", f"keys/{key_id}", "usage?by=key", "usage?by=owner", "requests", f"requests/{request_id}", "now"]
    for path in [*pages, f"keys?q={'%3Cscript%3E'}", f"requests/{'%3Cimg%20src=x%3E'}", "prompts?name=%3Cscript%3E"]:
        text = operator.get(f"/console/{path}").text
        assert "<script>alert" not in text
        assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in operator.get(f"/console/keys/{key_id}").text
    with visiting(console, made["secret"]) as owner:
        text = owner.get("/console/own").text
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text


def test_a_formula_in_a_name_is_none_in_the_csv(console: GatewayProcess, operator: Visit) -> None:
    with admin(console) as api:
        made = api.post("/admin/keys", json={"name": "=1+1", "owner": "@x"}).json()
    chat(console, made["secret"])
    found = wait_for(lambda: re.search(f"{made['key']['id']},(.*?),", operator.get("/console/usage.csv?by=key").text))
    assert found
    assert found[1] == "'=1+1"


def test_a_request_is_told_step_by_step(console: GatewayProcess, operator: Visit, made: dict[str, Any]) -> None:
    request_id = chat(console, made["secret"], stream=True).headers["x-request-id"]
    page = wait_for(lambda: (it := operator.get(f"/console/requests/{request_id}")).status_code == 200 and it)
    assert page
    words = re.sub(r"<[^>]+>|\s+", " ", page.text)
    for told in ("sent to the engine", "first token", "finished", "fake-model", "Came (UTC)", made["key"]["id"]):
        assert told in words or told in page.text
    listed = operator.get("/console/requests").text
    assert f'href="/console/requests/{request_id}"' in listed
    found = operator.get("/console/requests", params={"id": request_id})
    assert found.headers["location"] == f"/console/requests/{request_id}"


def test_a_failed_request_is_told_with_its_retry(console: GatewayProcess, operator: Visit) -> None:
    body = {"model": "fake-model", "messages": MESSAGES, "script": [["json", [500, {"error": {"message": "broken"}}]]]}
    answer = httpx.post(console.url + CHAT, json=body, headers=AUTH, timeout=30, verify=NO_TLS)
    assert answer.status_code >= 500
    request_id = answer.headers["x-request-id"]
    page = wait_for(lambda: (it := operator.get(f"/console/requests/{request_id}")).status_code == 200 and it)
    assert page
    assert "retried at the same engine" in page.text
    assert request_id in operator.get("/console/requests?order=failed").text
    assert operator.get("/console/requests?order=slowest").status_code == 200


def test_a_request_that_is_no_longer_in_memory_is_told_from_its_usage(
    console: GatewayProcess, operator: Visit, made: dict[str, Any]
) -> None:
    """Every row has the index that this look-up needs."""
    request_id = chat(console, made["secret"]).headers["x-request-id"]
    page = wait_for(
        lambda: "First sent to an engine (UTC)" in (it := operator.get(f"/console/requests/{request_id}").text) and it
    )
    assert page
    assert "What happened" in page


def test_an_owner_sees_the_own_key_and_nothing_else(
    console: GatewayProcess, operator: Visit, made: dict[str, Any]
) -> None:
    with admin(console) as api:
        own = api.post(
            "/admin/keys", json={"name": "mine", "owner": "Me", "limits": {"requests_per_minute": 77}}
        ).json()
    for secret in (own["secret"], made["secret"]):
        assert chat(console, secret).status_code == 200

    def both() -> bool:
        text = operator.get("/console/usage.csv?by=key").text
        return all(it["key"]["id"] in text for it in (own, made))

    wait_for(both)
    with visiting(console, own["secret"]) as owner:
        page = owner.get("/console/own")
        assert page.status_code == 200
        assert "77" in page.text
        assert made["key"]["id"] not in page.text
        lines = owner.get("/console/own.csv?by=all").text.splitlines()
        assert len(lines) == 2
        assert lines[1].startswith(f"{own['key']['id']},mine,1,1,0,")
        over_time = owner.get("/console/own.csv?by=all&over=time").text.splitlines()
        assert (len(over_time), {it.split(",")[1] for it in over_time[1:]}) == (25, {own["key"]["id"]})
        for path in ("now", "usage", "usage.csv", "keys", f"keys/{own['key']['id']}", "limits", "prompts", "requests"):
            refused = owner.get(f"/console/{path}")
            assert (refused.status_code, made["key"]["id"] in refused.text) == (403, False)
        assert owner.get("/console/now.json").status_code == 401
        assert owner.get("/console/try").status_code == 200
        token = owner.token("/console/own")
        for path in ("keys", f"keys/{own['key']['id']}", f"keys/{own['key']['id']}/rotate", "limits", "prompts"):
            form = {"form_token": token, "name": "x", "tokens_per_day": "1", "grace": "0", "template": "x"}
            assert owner.post(f"/console/{path}", form).status_code == 403
    assert operator.get("/console/own").status_code == 403


def test_a_revoked_key_is_signed_out(console: GatewayProcess) -> None:
    with admin(console) as api:
        own = api.post("/admin/keys", json={"name": "short"}).json()
        with visiting(console, own["secret"]) as owner:
            assert owner.get("/console/own").status_code == 200
            api.patch(f"/admin/keys/{own['key']['id']}", json={"disabled": True}).raise_for_status()
            wait_for(lambda: owner.get("/console/own").status_code == 303)
            assert owner.sign_in(own["secret"]).status_code == 401


def test_try_it_lists_the_models(operator: Visit) -> None:
    assert "<option>fake-model</option>" in operator.get("/console/try").text


def test_now_tells_how_far_the_model_is_fetched(engine: FakeEngine, tmp_path: Path) -> None:
    """The engine is not there yet, and the provisioner says how far it is."""
    report = tmp_path / "model.json"
    told = {"model": "fake-model", "state": "fetching", "completed": 1_000_000_000, "total": 4_000_000_000}
    report.write_text(json.dumps(told))
    settings = {"STACK_PROGRESS_FILE": str(report), "LLM_BASE_URL": f"http://127.0.0.1:{free_port()}"}
    with (
        console_gateway(tmp_path / "log", engine.url, **settings) as gateway,
        visiting(gateway) as operator,
    ):

        def state() -> tuple[str, str]:
            it = operator.get("/console/now.json").json()["engines"][0]
            return it["state"], it["message"]

        wait_for(lambda: state() == ("model_loading", "The model fake-model is being fetched: 1.00 of 4.00 GB (25%)."))
        report.write_text(json.dumps(told | {"state": "failed", "message": "The disk is full."}))
        wait_for(lambda: state() in (("away", "The disk is full."), ("model_unavailable", "The disk is full.")))


def test_a_request_counts_for_the_owner_that_its_key_had_when_it_came(
    console: GatewayProcess, operator: Visit, engine: FakeEngine, mark: str
) -> None:
    script = [["role"], ["gate", mark], ["finish", "stop"], ["done"], ["end"]]
    with admin(console) as api:
        key = api.post("/admin/keys", json={"name": "n", "owner": f"before-{mark}"}).json()
        asked = {"user": mark, "stream": True, "script": script}
        thread = Thread(target=chat, args=(console, key["secret"]), kwargs=asked)
        thread.start()
        try:
            engine.wait_seen(mark)
            changed = api.patch(f"/admin/keys/{key['key']['id']}", json={"owner": f"after-{mark}"})
            assert changed.status_code == 200
        finally:
            engine.release(mark)
            thread.join()
    page = wait_for(lambda: mark in (it := operator.get("/console/usage?by=owner").text) and it)
    assert f"before-{mark}" in page
    assert f"after-{mark}" not in page
