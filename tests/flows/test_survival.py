"""An answer with an Idempotency-Key outlives the worker that makes it, and the gateway: another worker, or the next
start, goes on with it."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.command import Command
from tests.support.processes import (
    AUTH,
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    events,
    fake_engine,
    only,
    post,
    running_gateway,
    text_of,
    wait_for,
    was_cut,
)
from tests.support.rows import Rows

CHAT = "/v1/chat/completions"
PIECES = ["Well", ",", " then", ":", " one", " two", " three", "."]
WHOLE = "".join(PIECES)
CUT = 4  # events that the engine sends before it says nothing more: the role, and three tokens
HALF = "".join(PIECES[: CUT - 1])

CONFIG = """
engines:
  vllm: {{dialect: vllm, base_url: '{url}'}}
  llamacpp: {{dialect: llamacpp, slots: 256, base_url: '{url}'}}
models:
  vllm: {{targets: [{{engine: vllm, model: fake-model}}]}}
  llamacpp: {{targets: [{{engine: llamacpp, model: fake-model}}]}}
  never: {{targets: [{{engine: vllm, model: fake-model}}], resume: {{most: 0}}}}
default_model: vllm
"""


@dataclass
class House:
    """A gateway that can be killed and started again, with its data."""

    directory: Path
    engine: FakeEngine

    @property
    def settings(self) -> dict[str, str]:
        return {
            "STACK_CONFIG": str(self.directory / "stack.yaml"),
            "STACK_DATA_DIR": str(self.directory / "data"),
            "STACK_RESUME": "3",
        }

    @contextmanager
    def running(self) -> Iterator[GatewayProcess]:
        (self.directory / "stack.yaml").write_text(CONFIG.format(url=self.engine.url))
        with running_gateway(self.directory / "log", self.engine.url, **self.settings) as gateway:
            wait_for(lambda: _started(gateway) == 2)
            yield gateway

    @contextmanager
    def answering(self, name: str, asked: dict[str, Any]) -> Iterator[tuple[GatewayProcess, "Listener", int, int]]:
        """A gateway that makes this answer: the gateway, a client that has read HALF of the answer, the worker that
        makes it, and the other worker."""
        with self.running() as gateway:
            one, other = gateway.workers()
            with only(gateway, one):
                first = Listener(gateway, name, asked)
            with closing(first):
                yield gateway, first, one, other

    def rows(self) -> list[dict[str, Any]]:
        with closing(Rows(self.settings)) as rows:
            return rows.all()

    def answers(self) -> list[Path]:
        return list((self.directory / "data" / "answers").iterdir())


@pytest.fixture
def house(engine: FakeEngine, tmp_path: Path) -> House:
    return House(tmp_path, engine)


def body(mark: str, model: str = "vllm", cuts: Sequence[int | None] = (CUT,), **fields: Any) -> dict[str, Any]:
    """A stream whose first making says `HALF` and then nothing, and whose next one is whole."""
    script = {"dialect": model if model != "never" else "vllm", "pieces": PIECES, "cuts": cuts, "how": [["hang"]]}
    asked = {"model": model, "messages": MESSAGES, "user": mark, "script": [["answer", script]], "stream": True}
    return asked | {"stream_options": {"include_usage": True}} | fields


def ask(
    gateway: GatewayProcess, name: str, asked: dict[str, Any], key: str = AUTH["authorization"], path: str = CHAT
) -> httpx.Response:
    with gateway.client() as client:
        return post(client, path, json=asked, headers={"idempotency-key": name, "authorization": key}, timeout=60)


class Listener:
    """A client of a stream that has read HALF of it."""

    def __init__(self, gateway: GatewayProcess, name: str, asked: dict[str, Any]) -> None:
        self.client = httpx.Client(timeout=60)
        url, headers = gateway.url + CHAT, AUTH | {"idempotency-key": name}
        self.answer = self.client.send(self.client.build_request("POST", url, json=asked, headers=headers), stream=True)
        self.lines = self.answer.iter_lines()
        self.text = ""
        while text_of(events(self.text)) != HALF:
            self.text += next(self.lines) + "\n"

    def rest(self) -> str:
        """All that it got, once the stream has ended as it should."""
        return self.text + "\n".join(self.lines)

    def close(self) -> None:
        self.answer.close()
        self.client.close()


def kill(worker: int) -> None:
    os.kill(worker, signal.SIGKILL)


def check(answer: httpx.Response) -> list[Any]:
    """It is one stream, whole. Returns its chunks."""
    assert (answer.status_code, answer.headers["idempotent-replayed"]) == (200, "true"), answer.text
    *chunks, done = events(answer.text)
    assert (done, text_of(chunks)) == ("[DONE]", WHOLE), answer.text
    assert len({it["id"] for it in chunks}) == 1
    assert sum("role" in choice["delta"] for it in chunks for choice in it["choices"]) == 1
    assert chunks[-1]["usage"]["completion_tokens"] == len(PIECES)
    return chunks


def test_a_stream_goes_on_on_another_worker(house: House, engine: FakeEngine, mark: str) -> None:
    asked = body(mark)
    with house.answering(mark, asked) as (gateway, first, one, other):
        kill(one)
        answer = ask(gateway, mark, asked)
        check(answer)
        assert ": resumed 1" in answer.text
        assert engine.seen(mark)[1]["body"]["messages"][-1] == {"role": "assistant", "content": HALF}
        assert answer.text.startswith(first.text), "what the first client has is its beginning"
        assert ask(gateway, mark, asked).text == answer.text
        assert len(engine.seen(mark)) == 2
        rows = wait_for(lambda: [it for it in house.rows() if it["outcome"] == "finished"])
        request_id = first.answer.headers["x-request-id"]
        assert [(it["request_id"], it["tokens_out"], it["resumes"]) for it in rows] == [(request_id, len(PIECES), 1)]
        assert len(house.rows()) == 1, "one answer has one row"
        told = gateway.told("answer_taken_over")
        assert [(it["level"], it["after"], it["way"]) for it in told] == [("warning", request_id, "on")]
        assert other in gateway.workers()


def test_a_client_that_had_joined_on_another_worker_notices_nothing(
    house: House, engine: FakeEngine, mark: str
) -> None:
    asked = body(mark)
    with house.answering(mark, asked) as (gateway, _, one, other):
        with only(gateway, other):
            joined = Listener(gateway, mark, asked)
            kill(one)
            rest = joined.rest()
        assert text_of(events(rest)) == WHOLE
        assert events(rest)[-1] == "[DONE]"
        assert len(engine.seen(mark)) == 2
        joined.close()


def test_of_many_repeats_after_the_death_one_goes_on_and_the_others_join(
    house: House, engine: FakeEngine, mark: str
) -> None:
    asked = body(mark)
    with house.answering(mark, asked) as (gateway, _, one, _):
        kill(one)
        with ThreadPoolExecutor(8) as pool:
            answers = [it.result() for it in [pool.submit(ask, gateway, mark, asked) for _ in range(8)]]
        for answer in answers:
            check(answer)
        assert len(engine.seen(mark)) == 2


def test_an_answer_survives_one_death_after_another(house: House, engine: FakeEngine, mark: str) -> None:
    asked = body(mark, cuts=[CUT, 3])
    with house.running() as gateway:
        for number in (1, 2):
            with ThreadPoolExecutor() as pool:
                one = wait_for(lambda: it if len(it := gateway.workers()) == 2 else None)[0]
                with only(gateway, one):
                    pool.submit(ask, gateway, mark, asked)
                    wait_for(lambda: len(engine.seen(mark)) == number)  # noqa: B023  it is over before the next turn
                    said = b" then" if number == 1 else b" one"
                    wait_for(lambda: said in house.answers()[0].read_bytes())  # noqa: B023  as above
                kill(one)
                wait_for(lambda: one not in (it := gateway.workers()) and len(it) == 2)  # noqa: B023  as above
                wait_for(lambda: _started(gateway) == 2 + number)  # noqa: B023  as above
        answer = ask(gateway, mark, asked)
        check(answer)
        assert [it for it in answer.text.splitlines() if it.startswith(": resumed")] == [": resumed 1", ": resumed 2"]
        row = wait_for(lambda: [it for it in house.rows() if it["outcome"] == "finished"])[0]
        assert (len(house.rows()), row["tokens_out"]) == (1, len(PIECES))


def _started(gateway: GatewayProcess) -> int:
    return sum(it["msg"] == "Application startup complete." for it in gateway.log())


def test_the_next_start_of_a_killed_gateway_goes_on(house: House, engine: FakeEngine, mark: str) -> None:
    asked, finished = body(mark), mark + "-finished"
    with house.running() as gateway:
        before = ask(gateway, finished, body(finished, cuts=[]))
        first = Listener(gateway, mark, asked)
        for pid in (gateway.process.pid, *gateway.workers()):
            kill(pid)
        first.close()
    with house.running() as gateway:
        check(ask(gateway, mark, asked))
        assert ask(gateway, finished, body(finished, cuts=[])).text == before.text
        assert (len(engine.seen(mark)), len(engine.seen(finished))) == (2, 1)
        rows = wait_for(
            lambda: [it for it in house.rows() if it["outcome"] == "finished"] if len(house.rows()) == 2 else []
        )
        assert {it["tokens_out"] for it in rows} == {len(PIECES)}
        assert gateway.stop() == 0
    assert not (house.directory / "data" / "answers").exists(), "a gateway that was stopped leaves nothing"


@pytest.mark.parametrize("garbage", [b"\x02", b"\x02\xff\x00\x00\x00data: {", b"\x00" * 4096])
def test_half_a_piece_that_a_killed_worker_left_is_cut_off(
    house: House, engine: FakeEngine, mark: str, garbage: bytes
) -> None:
    asked = body(mark)
    with house.answering(mark, asked) as (gateway, _, one, _):
        kill(one)
        wait_for(lambda: one not in gateway.workers())
        (file,) = house.answers()
        with file.open("ab") as torn:
            torn.write(garbage)
        check(ask(gateway, mark, asked))
        assert len(engine.seen(mark)) == 2


def test_a_file_that_is_no_answer_is_replaced(house: House, mark: str) -> None:
    asked = body(mark)
    with house.answering(mark, asked) as (gateway, _, one, _):
        kill(one)
        wait_for(lambda: one not in gateway.workers())
        (file,) = house.answers()
        file.write_bytes(b"\0" * file.stat().st_size)
        answer = ask(gateway, mark, asked)
        assert text_of(events(answer.text)) == WHOLE
        assert "idempotent-replayed" not in answer.headers


def test_a_blocking_answer_that_is_streamed_and_added_up_goes_on(house: House, engine: FakeEngine, mark: str) -> None:
    asked = body(mark, "llamacpp", stream=False)
    del asked["stream_options"]
    with house.running() as gateway, ThreadPoolExecutor() as pool:
        one, _ = gateway.workers()
        with only(gateway, one):
            first = pool.submit(ask, gateway, mark, asked)
            engine.wait_seen(mark)
            wait_for(lambda: b" then" in house.answers()[0].read_bytes())
        kill(one)
        assert isinstance(first.exception(), httpx.TransportError)
        answer = ask(gateway, mark, asked)
        assert answer.json()["choices"][0]["message"]["content"] == WHOLE
        assert answer.json()["usage"]["completion_tokens"] == len(PIECES)
        assert (answer.headers["x-stack-resumes"], answer.headers["idempotent-replayed"]) == ("1", "true")
        assert engine.seen(mark)[1]["body"]["messages"][-1] == {"role": "assistant", "content": HALF}


@pytest.mark.parametrize("fields", [{"model": "never"}, {"return_token_ids": True, "temperature": 1}])
def test_what_cannot_be_continued_is_made_anew_and_charged_once(
    house: House, engine: FakeEngine, mark: str, fields: dict[str, Any]
) -> None:
    asked = body(mark) | fields
    with house.answering(mark, asked) as (gateway, _, one, other):
        with only(gateway, other):
            joined = Listener(gateway, mark, asked)
            kill(one)
            with pytest.raises(httpx.RemoteProtocolError):
                joined.rest()
            answer = ask(gateway, mark, asked)
        assert text_of(events(answer.text)) == WHOLE
        assert len(house.answers()) == 1
        assert len(engine.seen(mark)) == 2
        wait_for(lambda: [it["outcome"] for it in house.rows()] == ["finished"])
        joined.close()


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize(("quota", "more"), [(15, 429), (16, 200)])
def test_a_key_is_charged_for_the_whole_answer_once(
    house: House, mark: str, restarts: bool, quota: int, more: int
) -> None:
    """The answer takes 15 tokens. What its first worker had set aside for it is no hindrance, and is given back."""
    asked = body(mark, max_tokens=500)
    with house.running() as gateway:
        command = Command(**house.settings)
        limits = "--tokens-per-day", str(quota), "--tokens-per-minute", "600", "--concurrent", "1"
        made = command.json("keys", "create", "x", *limits)
        key = f"Bearer {made['secret']}"
        one, other = gateway.workers()
        with only(gateway, one), httpx.Client() as client:
            headers = {"authorization": key, "idempotency-key": mark}
            with client.stream("POST", gateway.url + CHAT, json=asked, headers=headers, timeout=60) as first:
                lines = first.iter_lines()
                while " then" not in next(lines):
                    pass
                for pid in (gateway.process.pid, one, other) if restarts else (one,):
                    kill(pid)
        if restarts:
            with house.running() as again:
                _check_charges(house, again, mark, asked, key, more)
        else:
            wait_for(lambda: one not in gateway.workers())  # whose request it was is free then
            _check_charges(house, gateway, mark, asked, key, more)


def _check_charges(
    house: House, gateway: GatewayProcess, mark: str, asked: dict[str, Any], key: str, more: int
) -> None:
    check(ask(gateway, mark, asked, key))
    answer = ask(gateway, mark + "-more", body(mark + "-more", cuts=[], max_tokens=10), key)
    assert answer.status_code == more, answer.text
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert left > 500, "nothing is set aside any more"
    row = wait_for(lambda: [it for it in house.rows() if it["outcome"] == "finished"])[0]
    assert row["tokens_in"] + row["tokens_out"] == 15


FACES = {
    "/v1/messages": ("messages", {"max_tokens": 100}, "message_stop"),
    "/v1/responses": ("input", {}, "response.completed"),
}


@pytest.mark.parametrize("path", FACES)
@pytest.mark.parametrize("cut", [1, CUT])  # before and after the first token
def test_a_stream_of_another_api_goes_on_in_its_own_form(tmp_path: Path, mark: str, path: str, cut: int) -> None:
    field, fields, last = FACES[path]
    script = [["answer", {"dialect": "vllm", "pieces": PIECES, "cuts": [cut], "how": [["hang"]]}]]
    said = {"role": "user", "content": "script:" + json.dumps(script)}
    asked = {"model": "vllm", "stream": True, field: [said]} | fields
    with fake_engine() as engine:
        house = House(tmp_path, engine)
        with house.running() as gateway:
            one, other = gateway.workers()
            with ThreadPoolExecutor() as pool:
                with only(gateway, one):
                    first = pool.submit(ask, gateway, mark, asked, path=path)
                    wait_for(lambda: engine.seen() and house.answers())
                    wait_for(lambda: house.answers()[0].read_bytes().count(b'"chunk"') == cut)
                with only(gateway, other):
                    joined = pool.submit(ask, gateway, mark, asked, path=path)
                    wait_for(lambda: [it for it in gateway.log() if it["msg"] == "idempotent_replay"])
                    kill(one)
                    answers = [joined.result(), ask(gateway, mark, asked, path=path)]
                assert first.exception() or was_cut(first.result())
        assert len(engine.seen()) == 2
    for answer in answers:
        told = events(answer.text)
        assert (answer.status_code, told[-1]["type"]) == (200, last), answer.text
        assert "".join(_text(it) for it in told) == WHOLE
    assert answers[0].text == answers[1].text
    numbers = [it["sequence_number"] for it in events(answers[0].text) if "sequence_number" in it]
    assert numbers == list(range(len(numbers)))
    starts = [it for it in events(answers[0].text) if it["type"] in ("message_start", "response.created")]
    assert len(starts) == 1


def _text(event: dict[str, Any]) -> str:
    delta = event.get("delta", "")
    if event["type"] == "response.output_text.delta":
        return str(delta)
    return str(delta.get("text", "")) if event["type"] == "content_block_delta" else ""
