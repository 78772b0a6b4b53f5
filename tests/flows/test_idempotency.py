"""Idempotency-Key: a repeated request gets the one answer from its beginning, on any worker."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.processes import (
    AUTH,
    JSON,
    KEY,
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    events,
    fake_engine,
    free_port,
    only,
    post,
    running_gateway,
    text_of,
    wait_for,
    was_cut,
)

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def own(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running_gateway(tmp_path_factory.mktemp("idempotency") / "log", engine.url) as gateway:
        yield gateway


def ask(gateway: GatewayProcess, name: str, body: dict[str, Any], path: str = CHAT, key: str = KEY) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", "idempotency-key": name}
    with gateway.client() as client:
        return post(client, path, json=body, headers=headers, timeout=60)


def gated(mark: str) -> dict[str, Any]:
    """A stream that says 'one two', waits, and says ' three'."""
    script = [["role"], ["token", "one"], ["token", " two"], ["gate", mark], ["token", " three"], ["finish", "stop"]]
    return {"messages": MESSAGES, "stream": True, "user": mark, "script": [*script, ["usage"], ["done"], ["end"]]}


def plain(mark: str, **fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "user": mark, **fields}


class Cut:
    """A client of a stream that hangs up when told to."""

    def __init__(self, gateway: GatewayProcess, name: str, body: dict[str, Any]) -> None:
        self._client = httpx.Client(timeout=60)
        request = self._client.build_request(
            "POST", gateway.url + CHAT, json=body, headers=AUTH | {"idempotency-key": name}
        )
        self.answer = self._client.send(request, stream=True)
        self._lines = self.answer.iter_lines()
        assert " two" in next(line for line in self._lines if " two" in line)

    def rest(self) -> list[Any]:
        """What comes until the stream ends; of one that is cut, None at the end."""
        found = []
        try:
            found += self._lines
        except httpx.RemoteProtocolError:
            return [*events("\n".join(found)), None]
        return events("\n".join(found))

    def hang_up(self) -> None:
        self.answer.close()
        self._client.close()


def test_a_stream_whose_client_was_cut_off_is_whole_on_its_return_and_made_once(
    own: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    first = Cut(own, mark, gated(mark))
    request_id = first.answer.headers["x-request-id"]
    assert "idempotent-replayed" not in first.answer.headers
    first.hang_up()
    assert own.lines(request_id)[-1]["status"] == 499
    with ThreadPoolExecutor() as pool:
        back = pool.submit(ask, own, mark, gated(mark))
        wait_for(
            lambda: [it for it in own.log() if it["msg"] == "idempotent_replay" and it["request_id"] != request_id]
        )
        engine.release(mark)
        answer = back.result()
    assert text_of(events(answer.text)) == "one two three"
    assert events(answer.text)[-1] == "[DONE]"
    assert answer.headers["idempotent-replayed"] == "true"
    assert [it["state"] for it in engine.seen(mark)] == ["done"]
    lines = own.lines(request_id, last="chat_finished_stream")
    assert [it["outcome"] for it in lines if it["msg"] == "chat_finished_stream"] == ["finished"]  # counted once


def test_many_at_once_on_both_workers_are_one(own: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(ask, own, mark, gated(mark)) for _ in range(12)]
        engine.wait_seen(mark)
        engine.release(mark)
        found = [it.result() for it in answers]
    assert {it.text for it in found} == {found[0].text}
    assert text_of(events(found[0].text)) == "one two three"
    assert sum("idempotent-replayed" not in it.headers for it in found) == 1
    assert len(engine.seen(mark)) == 1


def test_a_running_answer_is_joined_on_another_worker(own: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    one, other = own.workers()
    with only(own, one):
        first = Cut(own, mark, gated(mark))
    with ThreadPoolExecutor() as pool:
        with only(own, other):
            joined = pool.submit(Cut, own, mark, gated(mark)).result()  # what is there can be read
        engine.release(mark)
        assert text_of(joined.rest()) == text_of(first.rest()) == " three"
    first.hang_up()
    joined.hang_up()
    assert len(engine.seen(mark)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_answer_is_replayed_by_any_worker(
    own: GatewayProcess, engine: FakeEngine, mark: str, stream: bool
) -> None:
    one, other = own.workers()
    with only(own, one):
        first = ask(own, mark, plain(mark, stream=stream))
    with only(own, other):
        second = ask(own, mark, plain(mark, stream=stream))
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.content == first.content
    assert second.headers["content-type"] == first.headers["content-type"]
    assert ("idempotent-replayed" in first.headers, second.headers["idempotent-replayed"]) == (False, "true")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert len(engine.seen(mark)) == 1


def test_the_official_client_is_served_so(own: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    with openai.OpenAI(base_url=own.url + "/v1", api_key=KEY) as client:
        answers = [
            client.chat.completions.create(
                model="fake-model", messages=MESSAGES, user=mark, extra_headers={"Idempotency-Key": mark}
            )
            for _ in range(2)
        ]
    assert [it.choices[0].message.content for it in answers] == ["one two three"] * 2
    assert len(engine.seen(mark)) == 1


def test_another_request_under_the_same_name_is_a_conflict(own: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    assert ask(own, mark, plain(mark)).status_code == 200
    for body, path in [(plain(mark, seed=1), CHAT), (plain(mark, prompt="x"), "/v1/completions")]:
        answer = ask(own, mark, body, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert answer.json()["error"]["param"] == "Idempotency-Key"
        assert answer.headers["x-should-retry"] == "false"
    assert len(engine.seen(mark)) == 1


def test_another_key_has_names_of_its_own(own: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    ask(own, mark, plain(mark))
    answer = ask(own, mark, plain(mark), key="sk-second-0123456789abcdef")
    assert "idempotent-replayed" not in answer.headers
    assert len(engine.seen(mark)) == 2
    assert ask(own, mark, plain(mark), key="wrong").status_code == 401


@pytest.mark.parametrize("name", ["", "x" * 256, "a\tb", "é".encode()])
def test_a_name_that_is_none_is_refused(own: GatewayProcess, name: str | bytes) -> None:
    answer = httpx.post(own.url + CHAT, json=plain("x"), headers=AUTH | {"idempotency-key": name})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_a_failure_is_not_kept(tmp_path: Path, mark: str) -> None:
    port = free_port()
    with running_gateway(tmp_path / "log", f"http://127.0.0.1:{port}") as gateway:
        assert ask(gateway, mark, plain(mark)).status_code == 503
        broken = plain(mark, stream=True, script=[["role"], ["token", "one"], ["event", {"error": "no"}], ["hang"]])
        with fake_engine(port) as engine:
            wait_for(lambda: ask(gateway, mark, plain(mark)).status_code == 200)
            assert len(engine.seen(mark)) == 1
            for _ in range(2):
                assert "error" in events(ask(gateway, mark + "b", broken).text)[-1]
            assert len(engine.seen(mark)) == 3


def test_an_answer_that_nobody_comes_back_for_is_stopped(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    settings = {"STACK_IDEMPOTENCY_LINGER": "0.5", "STACK_IDEMPOTENCY_TTL": "0.5"}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        Cut(gateway, mark, gated(mark)).hang_up()
        engine.wait_seen(mark, "hung_up")
        # and what was finished is forgotten after its time
        ask(gateway, mark + "f", plain(mark + "f"))
        wait_for(lambda: "idempotent-replayed" not in ask_later(gateway, mark + "f").headers)
        assert len(engine.seen(mark + "f")) == 2


def ask_later(gateway: GatewayProcess, mark: str) -> httpx.Response:
    """Ask with a pause between two looks, because each look keeps the answer for longer."""
    threading.Event().wait(1)
    return ask(gateway, mark, plain(mark))


def test_the_death_of_its_worker_ends_an_answer_honestly(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    with running_gateway(tmp_path / "log", engine.url) as gateway:
        one, other = gateway.workers()
        with only(gateway, one):
            first = Cut(gateway, mark, gated(mark))
        with only(gateway, other):
            joined = Cut(gateway, mark, gated(mark))
            os.kill(one, signal.SIGKILL)
            rest = joined.rest()
            joined.hang_up()
        assert [rest[-2]["error"]["code"], rest[-1]] == ["answer_lost", None]
        first.hang_up()
        engine.release(mark)
        assert text_of(events(ask(gateway, mark, gated(mark)).text)) == "one two three"  # made anew
        assert [it["state"] for it in engine.seen(mark)] == ["hung_up", "done"]


def test_what_is_kept_is_bounded(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    answers = tmp_path / "data" / "answers"
    settings = {"STACK_IDEMPOTENCY_BYTES": "200000", "STACK_DATA_DIR": str(tmp_path / "data")}
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        assert answers.stat().st_mode & 0o777 == 0o700
        for number in range(20):
            large = [["role"], ["tokens", [100, 200]], ["finish", "stop"], ["done"], ["end"]]
            name = f"{mark}{number}"
            assert ask(gateway, name, plain(name, stream=True, script=large)).status_code == 200
            assert sum(it.stat().st_size for it in answers.iterdir()) < 200_000
            assert {it.stat().st_mode & 0o777 for it in answers.iterdir()} == {0o600}
        assert "idempotent-replayed" in ask(gateway, name, plain(name, stream=True, script=large)).headers
        # one alone that is too large: a stream ends with an error, which openai's client does not take for a reason to
        # have another one made, and any other answer is only not kept
        huge = [["role"], ["tokens", [1000, 200]], ["finish", "stop"], ["done"], ["end"]]
        answer = ask(gateway, mark, plain(mark, stream=True, script=huge))
        whole = answer.status_code == 503  # the engine was so fast that nothing had been sent yet
        last = answer.json() if whole else events(answer.text)[-1]
        assert (last["error"]["code"], whole or was_cut(answer)) == ("idempotency_full", True)
        assert answer.headers.get("x-should-retry") == ("false" if whole else None)
        body = {"choices": [], "pad": "x" * 150_000}
        for times in (1, 2):
            answer = ask(gateway, mark, plain(mark + "b", script=[["json", [200, body]]]))
            assert (answer.status_code, "idempotent-replayed" in answer.headers) == (200, False)
            assert (answer.json()["pad"], len(engine.seen(mark + "b"))) == (body["pad"], times)
        assert gateway.stop() == 0
    assert not answers.exists()


def test_a_keys_answers_take_no_room_of_anothers(engine: FakeEngine, tmp_path: Path, mark: str) -> None:
    """In number and in bytes: beyond its own share, a key loses its own oldest answers."""
    second = "sk-second-0123456789abcdef"
    cheap = httpx.Request("POST", CHAT, json={"messages": MESSAGES}).content
    with running_gateway(tmp_path / "log", engine.url, STACK_IDEMPOTENCY_BYTES="1000000", STACK_WORKERS="1") as gateway:
        assert ask(gateway, mark, plain(mark), key=second).status_code == 200
        with closing(HTTPConnection("127.0.0.1", gateway.port, timeout=60)) as client:  # quicker than httpx
            for number in range(1030):
                headers = AUTH | JSON | {"idempotency-key": f"cheap-{number}"}
                client.request("POST", CHAT, cheap, headers)
                with client.getresponse() as answer:
                    assert answer.status == 200
                    answer.read()
        again = ask(gateway, "cheap-1029", {"messages": MESSAGES})
        assert again.headers["idempotent-replayed"] == "true"
        large = [["role"], ["tokens", [200, 200]], ["finish", "stop"], ["done"], ["end"]]
        for number in range(40):
            name = f"large-{number}"
            assert ask(gateway, name, plain(name, stream=True, script=large)).status_code == 200
        assert ask(gateway, mark, plain(mark), key=second).headers["idempotent-replayed"] == "true"
        assert "idempotent-replayed" not in ask(gateway, "cheap-0", {"messages": MESSAGES}).headers
    assert len(engine.seen(mark)) == 1


def test_a_client_that_hangs_up_without_a_name_stops_its_answer_as_ever(
    own: GatewayProcess, engine: FakeEngine, mark: str
) -> None:
    with socket.create_connection(("127.0.0.1", own.port)) as raw, own.client() as client:
        request = client.build_request("POST", CHAT, json=gated(mark), headers={"host": "localhost"})
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        engine.wait_seen(mark)
    engine.wait_seen(mark, "hung_up")
