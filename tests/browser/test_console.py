"""The console in a real browser, before an engine that does what the test says. tests/stack has the real one."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from playwright.sync_api import Browser, Page, expect

from gateway.console.pages import seconds
from tests.support.browser import PHONE, chromium, page, sign_in, visit
from tests.support.console import console_gateway
from tests.support.keys import ADMIN, admin, ask
from tests.support.processes import KEY, FakeEngine, GatewayProcess, wait_for


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


def make_key(console: GatewayProcess, name: str, **fields: Any) -> dict[str, Any]:
    with admin(console) as api:
        made: dict[str, Any] = api.post("/admin/keys", json={"name": name, **fields}).raise_for_status().json()
        return made


def message(gate: str) -> str:
    """A message upon which the engine streams thoughts and a token, waits for the gate, and streams the rest."""
    thoughts = [{"reasoning_content": "Old. "}, {"reasoning": "New. "}, {"reasoning": "More. "} | {"content": ""}]
    steps = [["role"], *(["event", event(it)] for it in thoughts), ["token", "first"]]
    steps += [["gate", gate], ["token", " second"]]
    return "script:" + json.dumps([*steps, ["finish", "stop"], ["usage"], ["done"], ["end"]])


def event(delta: dict[str, Any]) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def test_now_says_so_when_the_gateway_is_away(operator: Page) -> None:
    visit(operator, "/console/now")
    operator.route("**/now.json", lambda route: route.abort())
    expect(operator.locator("#stale")).to_be_visible()
    expect(operator.locator("#stale")).to_contain_text("The gateway does not answer")
    operator.unroute("**/now.json")
    expect(operator.locator("#stale")).to_be_hidden()
    for status in (429, 503):
        operator.route("**/now.json", lambda route, _, status=status: route.fulfill(status=status))
        expect(operator.locator("#stale")).to_contain_text("the console is busy")
        operator.unroute("**/now.json")
        expect(operator.locator("#stale")).to_be_hidden()


def test_now_can_be_paused_by_keyboard(operator: Page) -> None:
    operator.clock.install()
    visit(operator, "/console/now")
    asked: list[str] = []
    operator.on("request", lambda it: asked.append(it.url))
    pause = operator.get_by_role("button", name="Pause")
    pause.focus()
    operator.keyboard.press("Space")
    expect(pause).to_have_attribute("aria-pressed", "true")
    asked.clear()
    operator.clock.run_for(60_000)
    assert asked == []
    operator.keyboard.press("Space")
    expect(pause).to_have_attribute("aria-pressed", "false")
    with operator.expect_response("**/now.json"):
        operator.clock.run_for(2000)


def test_a_selection_of_text_outlives_a_new_picture(operator: Page) -> None:
    operator.clock.install()
    visit(operator, "/console/now")
    expect(operator.locator("#spark")).to_have_attribute("points", re.compile(r"^\S+"))
    operator.evaluate("getSelection().selectAllChildren(document.querySelector('#engines th'))")
    operator.clock.run_for(4000)
    expect(operator.locator("#spark")).to_have_attribute("points", re.compile(r"^\S+ \S+"))
    assert operator.evaluate("getSelection().toString()").split() == ["engine", "vllm"]
    expect(operator.get_by_label("Slots in use")).to_have_attribute("max", "256")


def test_durations_are_the_same_in_the_page_and_in_its_script(operator: Page) -> None:
    visit(operator, "/console/now")
    told = {0.4: "0 ms", 999.4: "999 ms", 999.6: "1 s", 1500: "1.5 s", 999_400: "999 s", 999_600: "1,000 s"}
    told |= {1_234_000: "1,234 s", 59_949: "59.9 s"}
    for milliseconds, words in told.items():
        assert seconds(milliseconds) == words
        assert operator.evaluate("duration", milliseconds / 1000) == words


def test_the_playground_shows_errors_and_the_same_request_for_other_programs(operator: Page) -> None:
    visit(operator, "/console/try")
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
    visit(operator, "/console/try")
    operator.get_by_label("API key").fill(KEY)
    operator.get_by_label("Message", exact=True).fill(message(gate))
    operator.get_by_role("button", name="Send").click()
    expect(operator.locator("#answer")).to_have_text("Old. New. More. first")
    operator.get_by_role("button", name="Stop").click()
    expect(operator.locator("#status")).to_have_text("Stopped.")
    wait_for(lambda: engine.running() == 0)
    engine.release(gate)


def test_the_keyboard_is_enough(browser: Browser, console: GatewayProcess) -> None:
    """To sign in, to skip the navigation, and to reach the form of a new key."""
    with page(browser, console.url) as made:
        visit(made, "/console")
        expect(made.locator(":focus")).to_have_attribute("name", "key")
        made.keyboard.type(ADMIN)
        made.keyboard.press("Enter")
        expect(made.get_by_role("heading", name="Now")).to_be_visible()
        visit(made, "/console/keys/new")
        made.keyboard.press("Tab")
        expect(made.locator(":focus")).to_have_text("Skip to the content")
        made.keyboard.press("Enter")
        made.keyboard.press("Tab")
        expect(made.locator(":focus")).to_have_attribute("name", "name")


def test_long_names_fit_on_a_phone_and_no_cell_is_one_letter_wide(
    browser: Browser, engine: FakeEngine, tmp_path: Path
) -> None:
    with console_gateway(tmp_path / "log", engine.url, LLM_MODEL="M" * 200) as console:
        keys = [make_key(console, name, owner="O" * 200) for name in ("W" * 200, "short")]
        for made_key in keys:
            assert ask(console, made_key["secret"], model="M" * 200).status_code == 200
        with page(browser, console.url, size=PHONE) as made:
            sign_in(made, ADMIN)
            made.wait_for_url("**/now")
            wait_for(lambda: made.request.get("/console/usage.csv?by=key").text().count("\n") == 3)
            for where in ("now", "keys", "requests", *(f"usage?by={by}" for by in ("key", "owner", "model"))):
                visit(made, f"/console/{where}")
                assert made.evaluate("document.documentElement.scrollWidth") <= PHONE[0], where
                narrow = made.evaluate(
                    """[...document.querySelectorAll("tbody th, tbody td:not(.n)")].filter((it) => it.checkVisibility()
                        && it.getBoundingClientRect().width < 64).map((it) => it.outerHTML)"""
                )
                assert narrow == [], where


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
            visit(made, f"/console/{where}")
            wide = made.evaluate("document.documentElement.scrollWidth")
            assert wide <= PHONE[0], f"{where} is {wide} pixels wide"
            nameless = made.evaluate(
                """[...document.querySelectorAll("main input:not([type=hidden]), main select, main textarea")]
                    .filter((it) => !it.labels.length).map((it) => it.outerHTML)"""
            )
            assert nameless == []
            small = made.evaluate(
                """[...document.querySelectorAll("main input:not([type=hidden]), main select, main textarea")]
                    .filter((it) => parseFloat(getComputedStyle(it).fontSize) < 16).map((it) => it.outerHTML)"""
            )
            assert small == [], "a phone zooms in"
            assert made.locator("h1").count() == 1
