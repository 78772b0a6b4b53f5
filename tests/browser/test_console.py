"""The console in a real browser, as an operator and as a key's owner use it."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import DESK, PHONE, chromium, page, picture
from tests.support.console import console_gateway
from tests.support.keys import ADMIN, CHAT, admin
from tests.support.processes import AUTH, KEY, MESSAGES, NO_TLS, FakeEngine, GatewayProcess, wait_for

MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def console(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with console_gateway(tmp_path_factory.mktemp("browser") / "log", engine.url) as gateway:
        yield gateway


@pytest.fixture
def operator(browser: Browser, console: GatewayProcess) -> Iterator[Page]:
    with page(browser, console.url) as made:
        sign_in(made, ADMIN)
        yield made


def sign_in(page: Page, key: str) -> None:
    page.goto("/console")
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Sign in").click()


def make_key(console: GatewayProcess, name: str, **fields: Any) -> dict[str, Any]:
    with admin(console) as api:
        made: dict[str, Any] = api.post("/admin/keys", json={"name": name, **fields}).raise_for_status().json()
        return made


def chat(console: GatewayProcess, key: str, **fields: Any) -> httpx.Response:
    headers = AUTH | {"authorization": f"Bearer {key}"}
    return httpx.post(console.url + CHAT, json={"messages": MESSAGES, **fields}, headers=headers, verify=NO_TLS)


def gated(gate: str) -> dict[str, Any]:
    """A message upon which the engine streams a token, waits for the gate, and streams the rest."""
    steps = [["role"], ["token", "first"], ["gate", gate], ["token", " second"]]
    return {"script": [*steps, ["finish", "stop"], ["usage"], ["done"], ["end"]]}


def message(gate: str) -> str:
    """The same as a message."""
    return "script:" + json.dumps(gated(gate)["script"])


def shows(page: Page, where: str, text: str) -> bool:
    """Whether a page shows that text, in itself or in a field."""
    page.goto(f"/console/{where}")
    return text in page.locator("main").inner_text() or page.locator(f"input[value*='{text}']").count() > 0


def test_now_moves_while_an_answer_streams(operator: Page, engine: FakeEngine) -> None:
    """The playground streams in one tab, and the other one shows it, until it is over."""
    gate = uuid4().hex
    operator.goto("/console/now")
    expect(operator.locator("#running")).to_contain_text("No request is running.")
    other = operator.context.new_page()
    other.goto("/console/try")
    other.get_by_label("API key").fill(KEY)
    other.get_by_label("Message", exact=True).fill(message(gate))
    other.get_by_role("button", name="Send").click()
    expect(other.locator("#answer")).to_have_text("first")
    operator.bring_to_front()
    expect(operator.locator("#answered")).to_have_text("1")
    expect(operator.locator("#running tr")).to_have_count(1)
    expect(operator.locator("#running")).to_contain_text("fake-model")
    expect(operator.locator("#engines")).to_contain_text("1 of 256")
    picture(operator, "now-with-an-answer")
    engine.release(gate)
    other.bring_to_front()
    expect(other.locator("#answer")).to_have_text("first second")
    expect(other.locator("#status")).to_contain_text("Finished")
    expect(other.locator("#headers")).to_contain_text("x-request-id: req_")
    operator.bring_to_front()
    expect(operator.locator("#answered")).to_have_text("0")
    expect(operator.locator("#running")).to_contain_text("No request is running.")


def test_now_says_so_when_the_gateway_is_away(operator: Page) -> None:
    operator.goto("/console/now")
    operator.route("**/now.json", lambda route: route.abort())
    expect(operator.locator("#stale")).to_be_visible()
    operator.unroute("**/now.json")
    expect(operator.locator("#stale")).to_be_hidden()


def test_the_playground_shows_errors_and_the_same_request_for_other_programs(operator: Page) -> None:
    operator.goto("/console/try")
    operator.get_by_label("API key").fill("wrong-key")
    operator.get_by_label("Message", exact=True).fill("It's <b>here</b>")
    for program, words in (
        ("curl", "It'\\''s <b>here</b>"),
        ("python", 'api_key=os.environ["STACK_KEY"]'),
        ("javascript", '"stream": true'),
    ):
        expect(operator.locator(f"#{program}")).to_contain_text(words)
    assert "wrong-key" not in operator.locator("#curl").inner_text()
    operator.get_by_role("button", name="Send").click()
    expect(operator.locator("#status")).to_contain_text("Failed: Incorrect API key provided")
    expect(operator.locator("#headers")).to_contain_text("401")


def test_a_running_answer_is_stopped(operator: Page, engine: FakeEngine) -> None:
    gate = uuid4().hex
    operator.goto("/console/try")
    operator.get_by_label("API key").fill(KEY)
    operator.get_by_label("Message", exact=True).fill(message(gate))
    operator.get_by_role("button", name="Send").click()
    expect(operator.locator("#answer")).to_have_text("first")
    operator.get_by_role("button", name="Stop").click()
    expect(operator.locator("#status")).to_have_text("Stopped.")
    wait_for(lambda: engine.running() == 0)
    engine.release(gate)


def test_a_key_is_made_used_and_revoked(operator: Page, console: GatewayProcess) -> None:
    operator.get_by_role("link", name="Keys").click()
    operator.get_by_role("link", name="New key").click()
    operator.get_by_label("Name").fill("billing")
    operator.get_by_label("Owner").fill("Ann")
    operator.get_by_role("button", name="Create the key").click()
    secret = operator.locator("#secret").inner_text()
    assert chat(console, secret).status_code == 200
    operator.get_by_role("link", name="To the key").click()
    assert secret not in operator.content()
    operator.get_by_role("button", name="Disable the key").click()
    expect(operator.get_by_role("status")).to_contain_text("The key is disabled")
    wait_for(lambda: chat(console, secret).status_code == 401)
    operator.get_by_role("link", name="Keys").click()
    operator.get_by_label("Search").fill("BILL")
    operator.get_by_role("button", name="Search").click()
    expect(operator.get_by_role("row", name="billing")).to_contain_text("disabled")


def test_a_plot_changes_with_the_usage(operator: Page, console: GatewayProcess) -> None:
    made = make_key(console, "plotted")
    address = "/console/usage?by=key"
    operator.goto(address)
    before = operator.locator("svg.plot").first.inner_html()
    assert "plotted" not in before
    assert chat(console, made["secret"]).status_code == 200

    def plotted() -> bool:
        operator.goto(address)
        return "plotted" in operator.locator("svg.plot").first.inner_html()

    wait_for(plotted)
    expect(operator.get_by_role("row", name="plotted")).to_contain_text("1")
    with operator.expect_download() as download:
        operator.get_by_role("link", name="CSV").click()
    assert "plotted" in download.value.path().read_text()


def test_a_wrong_key_stays_outside(browser: Browser, console: GatewayProcess) -> None:
    with page(browser, console.url) as made:
        sign_in(made, "wrong")
        expect(made.get_by_role("alert")).to_contain_text("neither an admin key nor a valid API key")
        made.goto("/console/keys")
        assert made.url.endswith("/console/sign-in")


def test_a_page_of_another_site_cannot_send_our_forms(
    operator: Page, console: GatewayProcess, engine: FakeEngine
) -> None:
    """Not even with a token: the cookie does not come along, and the origin is another."""
    operator.goto("/console/keys/new")
    token = operator.locator("input[name=form_token]").first.input_value()
    operator.goto(engine.url + "/health")  # another origin, on the same host
    with operator.expect_response("**/console/keys") as answer:
        operator.evaluate(
            """([url, token]) => {
                const form = document.createElement("form");
                form.method = "post"; form.action = url + "/console/keys";
                for (const [name, value] of [["form_token", token], ["name", "forged"]]) {
                    const field = document.createElement("input");
                    field.name = name; field.value = value; form.append(field);
                }
                document.documentElement.append(form); form.submit();
            }""",
            [console.url, token],
        )
    assert answer.value.status == 403
    with admin(console) as api:
        assert "forged" not in api.get("/admin/keys").text


def test_markup_in_names_never_runs(operator: Page, console: GatewayProcess, engine: FakeEngine) -> None:
    """Of a key, its owner and a model. A dialog or an error of a script would fail the test at its end."""
    made = make_key(console, "N" + MARKUP, owner="O" + MARKUP, models=["fake-model", MARKUP])
    gate = uuid4().hex
    body = {"model": "fake-model", "messages": MESSAGES, "stream": True, **gated(gate)}
    headers = {"authorization": f"Bearer {made['secret']}"}
    with httpx.stream("POST", console.url + CHAT, json=body, headers=headers, verify=NO_TLS) as answer:
        request_id = answer.headers["x-request-id"]
        operator.goto("/console/now")
        expect(operator.locator("#running")).to_contain_text("N" + MARKUP)
        operator.goto(f"/console/requests/{request_id}")
        engine.release(gate)
        answer.read()
    key_id = made["key"]["id"]
    for where in (f"keys/{key_id}", "keys", "usage?by=owner", "usage?by=key", "requests", f"requests/{request_id}"):
        wait_for(lambda where=where: shows(operator, where, "onerror"))  # type: ignore[misc]
        assert operator.locator("main img, main script").count() == 0


def test_an_owner_sees_the_own_usage_and_limits(browser: Browser, console: GatewayProcess) -> None:
    made = make_key(console, "mine", owner="Me", limits={"requests_per_minute": 77})
    assert chat(console, made["secret"]).status_code == 200
    with page(browser, console.url) as owner:
        sign_in(owner, made["secret"])
        expect(owner.get_by_role("heading", name="mine")).to_be_visible()
        expect(owner.get_by_role("row", name="Requests per minute")).to_contain_text("77")
        expect(owner.get_by_role("navigation").get_by_role("link")).to_have_text(["My usage", "Try it"])
        owner.goto("/console/keys")
        expect(owner.get_by_role("alert")).to_contain_text("for operators")
        owner.get_by_role("button", name="Sign out").click()
        expect(owner.get_by_role("heading", name="Sign in")).to_be_visible()


def test_the_keyboard_is_enough(browser: Browser, console: GatewayProcess) -> None:
    """To sign in, to skip the navigation, and to reach the form of a new key."""
    with page(browser, console.url) as made:
        made.goto("/console")
        made.keyboard.type(ADMIN)
        made.keyboard.press("Enter")
        expect(made.get_by_role("heading", name="Now")).to_be_visible()
        made.goto("/console/keys/new")
        made.keyboard.press("Tab")
        expect(made.locator(":focus")).to_have_text("Skip to the content")
        made.keyboard.press("Enter")
        made.keyboard.press("Tab")
        expect(made.locator(":focus")).to_have_attribute("name", "name")


def test_every_control_has_a_name_and_nothing_is_wider_than_a_phone(browser: Browser, console: GatewayProcess) -> None:
    made_key = make_key(console, "narrow")
    with page(browser, console.url, size=PHONE) as made:
        sign_in(made, ADMIN)
        for where in (
            "now",
            "usage",
            "keys",
            "keys/new",
            f"keys/{made_key['key']['id']}",
            "limits",
            "prompts",
            "requests",
            "try",
        ):
            made.goto(f"/console/{where}")
            wide = made.evaluate("document.documentElement.scrollWidth")
            assert wide <= PHONE[0], f"{where} is {wide} pixels wide"
            nameless = made.evaluate(
                """[...document.querySelectorAll("main input:not([type=hidden]), main select, main textarea")]
                    .filter((it) => !it.labels.length).map((it) => it.outerHTML)"""
            )
            assert nameless == []
            assert made.locator("h1").count() == 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pictures_of_each_page_are_kept(browser: Browser, console: GatewayProcess, dark: bool) -> None:
    made_key = make_key(console, "pictured", owner="Ann")
    request_id = chat(console, made_key["secret"]).headers["x-request-id"]
    theme = "dark" if dark else "light"
    key_page = f"keys/{made_key['key']['id']}"
    pages = {"now": "now", "usage": "usage?by=key", "keys": "keys", "new-key": "keys/new", "key": key_page}
    pages |= {
        "limits": "limits",
        "prompts": "prompts",
        "requests": "requests",
        "request": f"requests/{request_id}",
        "try": "try",
    }
    with page(browser, console.url, dark=dark, size=DESK) as made:
        made.goto("/console/sign-in")
        assert picture(made, f"sign-in-{theme}").stat().st_size > 5000
        sign_in(made, ADMIN)
        for name, where in pages.items():
            made.goto(f"/console/{where}")
            assert picture(made, f"{name}-{theme}").stat().st_size > 5000
        back = made.evaluate("getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(20, 23, 28)" if dark else "rgb(246, 247, 249)")
    with page(browser, console.url, dark=dark) as owner:
        sign_in(owner, made_key["secret"])
        expect(owner.get_by_role("heading", name="pictured")).to_be_visible()
        picture(owner, f"own-{theme}")
