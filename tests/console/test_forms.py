"""Forms on a bare socket: one that does not arrive whole changes nothing."""

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.support.attacks import answer, connect, rest, send
from tests.support.console import Visit, console_gateway, make_key
from tests.support.keys import admin
from tests.support.processes import FakeEngine, GatewayProcess

KEPT = "/console/keys/{}"
FORMS = {  # by the page with the form: the path that takes it, and a part that would be understood as all of it
    KEPT: (KEPT, "name=after"),
    "/console/limits": ("/console/limits", "requests_per_minute=7"),
    "/console/keys/new": ("/console/keys", "name=only+a+part"),
    "/console/prompts": ("/console/prompts", "name=only-a-part&template=Begin"),
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
BREAKS = {"stalls": (408, "did not arrive in time"), "is malformed": (400, "not valid HTTP")}


@pytest.fixture(scope="module")
def console(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    log = tmp_path_factory.mktemp("forms") / "log"
    with console_gateway(log, engine.url, STACK_READ_TIMEOUT="1") as gateway:
        yield gateway
        assert "Traceback" not in log.read_text()


def begin(gateway: GatewayProcess, visit: Visit, path: str, framing: str, body: str, mark: str) -> socket.socket:
    """Send the head of a form and, once the console reads its body, a part of that."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"host: 127.0.0.1:{gateway.port}",
        f"origin: {visit.origin}",
        "cookie: " + "; ".join(f"{name}={value}" for name, value in visit.http.cookies.items()),
        "content-type: application/x-www-form-urlencoded",
        f"x-request-id: {mark}",
        "expect: 100-continue",
        framing,
    ]
    raw = connect(gateway)
    send(raw, ("\r\n".join(lines) + "\r\n\r\n").encode())
    assert raw.recv(len(CONTINUE), socket.MSG_WAITALL) == CONTINUE
    send(raw, body.encode())
    return raw


def stored(gateway: GatewayProcess) -> list[object]:
    with admin(gateway) as api:
        return [api.get(f"/admin/{it}").json() for it in ("keys", "limits", "prompts")]


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("page", FORMS)
def test_a_form_of_which_only_a_part_arrives_changes_nothing(
    console: GatewayProcess, operator: Visit, mark: str, page: str, how: str
) -> None:
    key_id, _ = make_key(operator, "whole", owner="Ann", models="fake-model", concurrent="3", expires="2099-01-31")
    before = stored(console)
    path, fields = (it.format(key_id) for it in FORMS[page])
    part = f"form_token={operator.token(page.format(key_id))}&{fields}"
    framing, body = {
        "stalls": (f"content-length: {len(part) + 20}", part),
        "is malformed": ("transfer-encoding: chunked", f"{len(part):x}\r\n{part}\r\nno number\r\n"),
    }[how]
    with closing(begin(console, operator, path, framing, body, mark)) as raw:
        status, headers, text = answer(rest(raw))
    wanted, words = BREAKS[how]
    assert status == wanted
    assert headers["content-type"].startswith("text/html")
    assert words in text.decode()
    assert stored(console) == before
    assert [(it["msg"], it["status"]) for it in console.lines(mark)] == [("request", wanted)]


@pytest.mark.parametrize("path", ["/console/sign-in", "/console/sign-out"])
def test_a_form_at_the_door_of_which_only_a_part_arrives_is_refused(
    console: GatewayProcess, stranger: Visit, mark: str, path: str
) -> None:
    stranger.token("/console/sign-in")
    with closing(begin(console, stranger, path, "content-length: 50", "key=", mark)) as raw:
        assert answer(rest(raw))[0] == 408


@pytest.mark.parametrize("path", ["/console/sign-in", "/console/sign-out"])
def test_who_hangs_up_in_a_form_at_the_door_leaves_one_line_in_the_log(
    console: GatewayProcess, stranger: Visit, mark: str, path: str
) -> None:
    begin(console, stranger, path, "content-length: 50", "key=", mark).close()
    assert [(it["msg"], it["level"], it["status"]) for it in console.lines(mark)] == [("request", "info", 499)]


def test_who_hangs_up_in_a_form_changes_nothing_and_leaves_one_line_in_the_log(
    console: GatewayProcess, operator: Visit, mark: str
) -> None:
    before = stored(console)
    part = f"form_token={operator.token('/console/limits')}&requests_per_minute=7"
    begin(console, operator, "/console/limits", f"content-length: {len(part) + 20}", part, mark).close()
    assert [(it["msg"], it["status"]) for it in console.lines(mark)] == [("request", 499)]
    assert stored(console) == before
