"""Who gets in at the console, by what, and what a form must hold."""

from pathlib import Path

import httpx
import pytest

from tests.support.console import SETTINGS, Visit, console_gateway, token_of, visiting
from tests.support.keys import ADMIN, admin
from tests.support.processes import KEY, NO_TLS, FakeEngine, GatewayProcess, running_gateway, wait_for

PAGES = ["now", "usage", "keys", "keys/new", "limits", "prompts", "requests", "requests/req_1", "try"]
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def test_without_an_admin_key_there_is_no_console(gateway: GatewayProcess) -> None:
    for path in ("", "/sign-in", "/now.json", "/static/console.css"):
        answer = httpx.get(gateway.url + "/console" + path, verify=NO_TLS)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_for_an_operator_and_has_the_policy(operator: Visit, page: str) -> None:
    answer = operator.get(f"/console/{page}")
    assert answer.status_code == (404 if page == "requests/req_1" else 200), answer.text
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "style=" not in answer.text
    assert "<script>" not in answer.text


@pytest.mark.parametrize("page", [*PAGES, "own", "usage.csv", "own.csv"])
def test_a_visitor_without_a_session_is_sent_to_the_sign_in_page(stranger: Visit, page: str) -> None:
    answer = stranger.get(f"/console/{page}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/sign-in")


def test_a_visitor_without_a_session_gets_no_state_of_the_gateway(stranger: Visit) -> None:
    answer = stranger.get("/console/now.json")
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_the_start_page_leads_to_sign_in_and_then_to_now(stranger: Visit) -> None:
    assert stranger.get("/console").headers["location"] == "/console/sign-in"
    stranger.sign_in(ADMIN)
    assert stranger.get("/console").headers["location"] == "/console/now"


def test_the_cookie_is_for_this_site_and_no_script(stranger: Visit) -> None:
    cookies = stranger.sign_in(ADMIN).headers.get_list("set-cookie")
    told = next(it for it in cookies if it.startswith("stack_console=") and "Max-Age=0" not in it)
    assert {"HttpOnly", "Path=/console", "SameSite=strict", "Max-Age=43200"} <= set(told.split("; "))
    assert "Secure" not in told


def test_behind_tls_the_cookie_is_for_tls_alone(console: GatewayProcess, stranger: Visit) -> None:
    token = stranger.token("/console/sign-in")
    origin = console.url.replace("http:", "https:")
    answer = stranger.post("/console/sign-in", {"form_token": token, "key": ADMIN}, origin=origin)
    told = next(it for it in answer.headers.get_list("set-cookie") if "Max-Age=43200" in it)
    assert "Secure" in told.split("; ")


@pytest.mark.parametrize("key", ["", "wrong", "sk-stack-0000000000-" + "0" * 49, ADMIN[:-1], "schlüssel"])
def test_a_wrong_key_gets_the_form_again(stranger: Visit, key: str) -> None:
    answer = stranger.sign_in(key)
    assert answer.status_code == 401
    assert 'role="alert"' in answer.text
    assert "stack_console=" not in str(answer.headers)
    assert key == "" or key not in answer.text
    assert stranger.get("/console/now").status_code == 303


def test_attempts_are_bounded_and_sessions_go_on(engine: FakeEngine, tmp_path: Path) -> None:
    with (
        console_gateway(tmp_path / "log", engine.url) as gateway,
        visiting(gateway) as inside,
        visiting(gateway, None) as outside,
    ):
        assert [outside.sign_in("wrong").status_code for _ in range(10)] == [401] * 10
        refused = outside.sign_in(ADMIN)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 7
        assert inside.get("/console/now").status_code == 200


@pytest.mark.parametrize("proxy", [{"STACK_PROXY_NETWORK": "127.0.0.1"}, {}])
def test_an_address_is_the_last_one_that_the_proxy_names_if_there_is_a_proxy(
    engine: FakeEngine, tmp_path: Path, proxy: dict[str, str]
) -> None:
    """What a client writes before the proxy's entry, or instead of an address, is no address."""
    with (
        console_gateway(tmp_path / "log", engine.url, **proxy) as gateway,
        visiting(gateway, None) as visit,
    ):
        form = {"form_token": visit.token("/console/sign-in"), "key": "wrong"}

        def attempt(*entries: str) -> int:
            headers = {"x-forwarded-for": ", ".join(entries)}
            return visit.post("/console/sign-in", form, **headers).status_code

        def bounded(*entries: str) -> bool:
            return any(attempt(*(it.format(number) for it in entries)) == 429 for number in range(40))

        assert bounded("192.0.2.{}", "198.51.100.7")
        assert bounded("198.51.100.9", "unknown{}")
        others = [attempt("198.51.100.7", f"203.0.113.{it}") for it in range(3)]  # two may share a cell by chance
        assert (401 if proxy else 429) in others


def test_right_keys_are_not_charged_as_attempts(console: GatewayProcess) -> None:
    for _ in range(12):
        with visiting(console):
            pass


def test_signing_out_ends_the_session_itself(console: GatewayProcess, operator: Visit) -> None:
    kept = operator.http.cookies["stack_console"]
    answer = operator.send("/console/now", "/console/sign-out")
    assert answer.headers["location"] == "/console/sign-in"
    assert "stack_console" not in operator.http.cookies
    again = httpx.get(console.url + "/console/now", cookies={"stack_console": kept}, verify=NO_TLS)
    assert again.status_code == 303


def test_a_session_is_known_to_every_worker(console: GatewayProcess, operator: Visit) -> None:
    """Each connection may be another worker's."""
    cookies = {"stack_console": operator.http.cookies["stack_console"]}
    for _ in range(10):
        assert httpx.get(console.url + "/console/limits", cookies=cookies, verify=NO_TLS).status_code == 200


def test_a_key_that_was_just_made_is_known_to_every_worker(console: GatewayProcess, stranger: Visit) -> None:
    """It signs in at the worker that made it, and comes to the other one before that looked for new keys."""
    asked = {"authorization": f"Bearer {ADMIN}"}
    token = stranger.token("/console/sign-in")
    secret = stranger.http.post("/admin/keys", json={"name": "new"}, headers=asked).json()["secret"]
    stranger.post("/console/sign-in", {"form_token": token, "key": secret})
    cookies = stranger.http.cookies
    pages = [httpx.get(console.url + "/console/own", cookies=cookies, verify=NO_TLS) for _ in range(8)]
    assert {it.status_code for it in pages} == {200}  # each comes on a connection of its own


def test_a_session_ends_with_its_admin_key(engine: FakeEngine, tmp_path: Path) -> None:
    keys = tmp_path / "admin"
    keys.write_text(ADMIN)
    settings = {"STACK_ADMIN_KEYS_FILE": str(keys)}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway, visiting(gateway) as operator:
        keys.write_text("sk-another-admin-0123456789")
        gateway.process.send_signal(1)

        def is_over() -> bool:
            try:
                return operator.get("/console/now").status_code == 303
            except httpx.TransportError:  # the old worker had just closed its connection
                return False

        wait_for(is_over)


@pytest.mark.parametrize(
    ("token", "headers"),
    [
        ("", {}),
        ("0" * 64, {}),
        ("right", {"origin": "https://evil.example"}),
        ("right", {"origin": "null"}),
        ("right", {"origin": ""}),
        ("right", {"origin": "http://["}),
    ],
)
def test_a_form_from_elsewhere_changes_nothing(operator: Visit, token: str, headers: dict[str, str]) -> None:
    token = operator.token("/console/keys/new") if token == "right" else token
    answer = operator.post("/console/keys", {"form_token": token, "name": "forged"}, **headers)
    assert answer.status_code == 403
    assert "forged" not in operator.get("/console/keys").text


def test_the_token_of_another_session_is_none(console: GatewayProcess, operator: Visit) -> None:
    with visiting(console) as other:
        token = other.token("/console/keys/new")
    assert operator.post("/console/keys", {"form_token": token, "name": "forged"}).status_code == 403


def test_the_sign_in_form_needs_its_token_too(console: GatewayProcess, stranger: Visit) -> None:
    with visiting(console, None) as other:
        token = other.token("/console/sign-in")
    stranger.get("/console/sign-in")
    answer = stranger.post("/console/sign-in", {"form_token": token, "key": ADMIN})
    assert answer.status_code == 403
    assert stranger.get("/console/now").status_code == 303


def test_the_sign_in_form_of_another_tab_leads_in_once_somebody_is_signed_in(stranger: Visit) -> None:
    token = stranger.token("/console/sign-in")
    stranger.sign_in(ADMIN)
    answer = stranger.post("/console/sign-in", {"form_token": token, "key": ADMIN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/console")


def test_the_sign_in_form_is_refused_if_its_origin_is_no_address(stranger: Visit) -> None:
    token = stranger.token("/console/sign-in")
    answer = stranger.post("/console/sign-in", {"form_token": token, "key": ADMIN}, origin="http://[")
    assert answer.status_code == 403
    assert stranger.get("/console/now").status_code == 303


def test_a_form_without_a_session_changes_nothing(stranger: Visit) -> None:
    assert stranger.post("/console/keys", {"name": "forged"}).status_code == 403


def test_a_form_is_bounded_and_of_one_kind(operator: Visit, stranger: Visit) -> None:
    assert stranger.post("/console/sign-in", {"key": "x" * 20_000}).status_code == 413
    token = operator.token("/console/prompts")
    assert operator.post("/console/prompts", {"form_token": token, "template": "x" * 600_000}).status_code == 413
    answer = operator.http.post("/console/keys", json={"form_token": token}, headers={"origin": operator.origin})
    assert answer.status_code == 415


def test_other_methods_have_the_apis_errors(operator: Visit) -> None:
    assert operator.http.put("/console/keys").json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["nothing", "keys/", "static/console.py", "static/../console.py"])
def test_a_mistyped_address_is_a_page_that_says_so(operator: Visit, path: str) -> None:
    answer = operator.get(f"/console/{path}")
    assert answer.status_code == 404
    assert "This did not work" in answer.text


def test_an_address_with_a_nul_is_refused(operator: Visit) -> None:
    """PostgreSQL takes none in a text."""
    for path in ("keys?q=a%00b", "requests?id=%00", "usage.csv?by=%00", "try?x=%00"):
        answer = operator.get(f"/console/{path}")
        assert answer.status_code == 400
        assert "NUL" in answer.text


def test_the_console_is_not_in_the_documented_api(console: GatewayProcess) -> None:
    assert "/console" not in httpx.get(console.url + "/openapi.json", verify=NO_TLS).text


def test_a_key_of_the_setting_may_sign_in(console: GatewayProcess) -> None:
    with visiting(console, KEY) as owner:
        assert owner.get("/console").headers["location"] == "/console/own"
        assert owner.get("/console/own").status_code == 200


def test_the_sign_in_page_holds_no_session(stranger: Visit) -> None:
    first = stranger.get("/console/sign-in")
    assert token_of(first) == token_of(stranger.get("/console/sign-in"))
    assert "stack_console=" not in str(first.headers)
    assert SETTINGS["STACK_ADMIN_KEYS"] not in first.text


def test_the_admin_api_needs_its_header_and_no_cookie(console: GatewayProcess, operator: Visit) -> None:
    assert operator.get("/admin/keys").status_code == 401
    with admin(console) as api:
        assert api.get("/admin/keys").status_code == 200


def test_no_key_and_no_session_is_in_the_log(console: GatewayProcess, operator: Visit) -> None:
    with visiting(console, None) as stranger:
        stranger.sign_in("canary-of-a-wrong-key")
    operator.get("/console/keys?q=canary-of-a-search")
    request_id = operator.get("/console/now").headers["x-request-id"]
    console.lines(request_id)
    log = console.log_path.read_text()
    for secret in ("canary-of", ADMIN, operator.http.cookies["stack_console"]):
        assert secret not in log
