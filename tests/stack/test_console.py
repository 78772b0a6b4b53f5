"""The console of the real stack in a real browser: its containers, with a real model, and Chromium."""

import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.support.browser import DESK, chromium, page, picture, sign_in, visit
from tests.support.keys import ADMIN, admin, ask
from tests.support.processes import KEY, wait_for
from tests.support.stack import LONG, Stack, Stream

MODEL = "SmolLM2-135M-Instruct"
MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def operator(browser: Browser, stack: Stack) -> Iterator[Page]:
    with page(browser, stack.url) as made:
        sign_in(made, ADMIN)
        yield made


def make_key(stack: Stack, name: str, **fields: Any) -> dict[str, Any]:
    with admin(stack) as api:
        made: dict[str, Any] = api.post("/admin/keys", json={"name": name, **fields}).raise_for_status().json()
        return made


def status(stack: Stack, key: str) -> int:
    return ask(stack, key, max_tokens=2).status_code


def shows(page: Page, where: str, text: str) -> bool:
    """Whether a page shows that text, in itself or in a field."""
    visit(page, f"/console/{where}")
    return text in page.locator("main").inner_text() or page.locator(f"input[value*='{text}']").count() > 0


def goes_on(route: Route) -> None:
    """Send a request of the playground with a field by which the model does not stop on its own."""
    route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})


def test_now_moves_while_an_answer_streams(operator: Page) -> None:
    """The playground streams in one tab, and the other one shows it, until it is over."""
    visit(operator, "/console/now")
    expect(operator.locator("#running")).to_contain_text("No request is running.")
    other = operator.context.new_page()
    visit(other, "/console/try")
    other.get_by_label("API key").fill(KEY)
    other.get_by_label("Message", exact=True).fill(LONG["messages"][0]["content"])
    other.get_by_label("Most tokens").fill("3000")
    other.route("**/v1/chat/completions", goes_on)
    other.get_by_role("button", name="Send").click()
    expect(other.locator("#answer")).not_to_be_empty()
    operator.bring_to_front()
    expect(operator.locator("#answered")).to_have_text("1")
    expect(operator.locator("#running tr")).to_have_count(1)
    expect(operator.locator("#running")).to_contain_text(MODEL)
    expect(operator.locator("#engines")).to_contain_text("1 of ")
    picture(operator, "now-with-an-answer")
    other.bring_to_front()
    so_far = other.locator("#answer").inner_text()
    expect(other.locator("#answer")).not_to_have_text(so_far)  # it still grows
    other.get_by_role("button", name="Stop").click()
    expect(other.locator("#status")).to_have_text("Stopped.")
    expect(other.locator("#headers")).to_contain_text("x-request-id: req_")
    operator.bring_to_front()
    expect(operator.locator("#answered")).to_have_text("0")
    expect(operator.locator("#running")).to_contain_text("No request is running.")


def test_a_key_is_made_used_and_revoked(operator: Page, stack: Stack) -> None:
    operator.get_by_role("link", name="Keys").click()
    operator.get_by_role("link", name="New key").click()
    operator.get_by_label("Name").fill("billing")
    operator.get_by_label("Owner").fill("Ann")
    operator.get_by_role("button", name="Create the key").click()
    secret = operator.locator("#secret").inner_text()
    assert status(stack, secret) == 200
    operator.get_by_role("link", name="To the key").click()
    assert secret not in operator.content()
    operator.get_by_role("button", name="Disable the key").click()
    expect(operator.get_by_role("status")).to_contain_text("The key is disabled")
    wait_for(lambda: status(stack, secret) == 401)
    operator.get_by_role("link", name="Keys").click()
    operator.get_by_label("Search").fill("BILL")
    operator.get_by_role("button", name="Search").click()
    expect(operator.get_by_role("row", name="billing")).to_contain_text("disabled")


def test_a_plot_changes_with_the_usage(operator: Page, stack: Stack) -> None:
    made = make_key(stack, "plotted")
    address = "/console/usage?by=key"
    visit(operator, address)
    assert "plotted" not in operator.locator("main").inner_text()
    before = operator.locator("svg.plot").first.inner_html()
    assert status(stack, made["secret"]) == 200

    def plotted() -> bool:
        visit(operator, address)
        return "plotted" in operator.locator("main").inner_text()

    wait_for(plotted)
    assert operator.locator("svg.plot").first.inner_html() != before
    expect(operator.get_by_role("row", name="plotted")).to_contain_text("1")
    with operator.expect_download() as download:
        operator.get_by_role("link", name="CSV", exact=True).click()
    assert "plotted" in download.value.path().read_text()


def test_a_wrong_key_stays_outside(browser: Browser, stack: Stack) -> None:
    with page(browser, stack.url) as made:
        sign_in(made, "wrong")
        expect(made.get_by_role("alert")).to_contain_text("neither an admin key nor a valid API key")
        visit(made, "/console/keys")
        assert made.url.endswith("/console/sign-in")


class OtherSite(BaseHTTPRequestHandler):
    """A page of another origin on the same host."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Another site</title><body></body>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def other_site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherSite) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_page_of_another_site_cannot_send_our_forms(operator: Page, stack: Stack, other_site: str) -> None:
    """Not even with a token: the cookie does not come along, and the origin is another."""
    visit(operator, "/console/keys/new")
    token = operator.locator("input[name=form_token]").first.input_value()
    visit(operator, other_site)
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
            [stack.url, token],
        )
    assert answer.value.status == 403
    with admin(stack) as api:
        assert "forged" not in api.get("/admin/keys").text


def test_markup_in_names_never_runs(operator: Page, stack: Stack) -> None:
    """Of a key, its owner and a model. A dialog or an error of a script would fail the test at its end."""
    made = make_key(stack, "N" + MARKUP, owner="O" + MARKUP, models=[MODEL, MARKUP])
    stream = Stream(stack, 3000, key=made["secret"])
    with closing(stream):
        visit(operator, "/console/now")
        expect(operator.locator("#running")).to_contain_text("N" + MARKUP)
        visit(operator, f"/console/requests/{stream.request_id}")
        expect(operator.locator("main")).to_contain_text("N" + MARKUP)
    key_id = made["key"]["id"]
    pages = (f"keys/{key_id}", "keys", "usage?by=owner", "usage?by=key", "requests", f"requests/{stream.request_id}")
    for where in pages:
        wait_for(lambda where=where: shows(operator, where, "onerror"))  # type: ignore[misc]
        assert operator.locator("main img, main script").count() == 0


def test_an_owner_sees_the_own_usage_and_limits(browser: Browser, stack: Stack) -> None:
    made = make_key(stack, "mine", owner="Me", limits={"requests_per_minute": 77})
    assert status(stack, made["secret"]) == 200
    with page(browser, stack.url) as owner:
        sign_in(owner, made["secret"])
        expect(owner.get_by_role("heading", name="mine")).to_be_visible()
        expect(owner.get_by_role("row", name="Requests per minute")).to_contain_text("77")
        expect(owner.get_by_role("navigation").get_by_role("link")).to_have_text(["My usage", "Try it"])
        visit(owner, "/console/keys")
        expect(owner.get_by_role("alert")).to_contain_text("for operators")
        owner.get_by_role("button", name="Sign out").click()
        expect(owner.get_by_role("heading", name="Sign in")).to_be_visible()


def test_pictures_of_each_page_are_kept(browser: Browser, stack: Stack) -> None:
    """Light and dark."""
    made_key = make_key(stack, "pictured", owner="Ann")
    request_id = ask(stack, made_key["secret"], max_tokens=2).headers["x-request-id"]
    pages = {
        "now": "now", "usage": "usage?by=key", "keys": "keys", "new-key": "keys/new",
        "key": f"keys/{made_key['key']['id']}", "limits": "limits", "prompts": "prompts", "requests": "requests",
        "request": f"requests/{request_id}", "try": "try",
    }  # fmt: skip
    for theme, colour in (("light", "rgb(246, 247, 249)"), ("dark", "rgb(20, 23, 28)")):
        with page(browser, stack.url, dark=theme == "dark", size=DESK) as made:
            visit(made, "/console/sign-in")
            assert picture(made, f"sign-in-{theme}").stat().st_size > 5000
            sign_in(made, ADMIN)
            for name, where in pages.items():
                visit(made, f"/console/{where}")
                assert picture(made, f"{name}-{theme}").stat().st_size > 5000
            assert made.evaluate("getComputedStyle(document.body).backgroundColor") == colour
            made.get_by_role("button", name="Sign out").click()
            sign_in(made, made_key["secret"])
            expect(made.get_by_role("heading", name="pictured")).to_be_visible()
            picture(made, f"own-{theme}")
