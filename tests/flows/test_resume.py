"""An answer outlives its engine: what docs/when-an-engine-dies.md says. The engine knows one answer
(tests/fakes/model.py). It breaks off where a test says, and goes on only if handed over in its dialect's own way."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.processes import (
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    events,
    fake_engine,
    free_port,
    running_gateway,
    scrape,
    text_of,
    wait_for,
)

CHAT = "/v1/chat/completions"
# White space of every kind at the ends of tokens, and an emoji of two characters and a joiner, in two tokens.
PIECES = ["Well", ",", " 👩", "\u200d🚀", " says", ":", "\n\n", "-", " ", " Grüße", ".\n", "\n", "  ", "End", "."]
WHOLE = "".join(PIECES)
USAGE = {"prompt_tokens": 7, "completion_tokens": len(PIECES), "total_tokens": 7 + len(PIECES)}
# Each begins with what only a broken engine does.
HOW = {
    "closed": [["close"]],
    "reset": [["reset"]],
    "a clean end": [["end"]],
    "an empty event, then a clean end": [
        ["event", {"choices": [{"index": 0, "delta": {}, "finish_reason": None}]}],
        ["end"],
    ],
    "[DONE] without a finish_reason": [["done"], ["end"]],
    "an error event": [["event", {"error": {"message": "CUDA died", "code": 500}}], ["hang"]],
    "half a character": [["hex", b'data: {"choices":[{"index":0,"delta":{"content":"\xf0\x9f'.hex()], ["close"]],
    "not JSON": [["text", "data: {]\n\n"], ["hang"]],
    "silence": [["hang"]],
}


CONFIG = """
engines:
  ollama: {{dialect: ollama, slots: 256, base_url: '{a}'}}
  vllm: {{dialect: vllm, base_url: '{a}'}}
  llamacpp: {{dialect: llamacpp, slots: 256, base_url: '{a}'}}
  other: {{dialect: llamacpp, slots: 256, base_url: '{b}'}}
models:
  ollama: {{targets: [{{engine: ollama, model: fake-model}}]}}
  vllm: {{targets: [{{engine: vllm, model: fake-model}}]}}
  llamacpp: {{targets: [{{engine: llamacpp, model: fake-model}}]}}
  pair: {{targets: [{{engine: llamacpp, model: fake-model}}, {{engine: other, model: fake-model}}]}}
  strict:
    targets: [{{engine: llamacpp, model: fake-model}}]
    fallbacks: [{{engine: other, model: "other/model:1b"}}]
    resume: {{wait: 0}}
  across:
    targets: [{{engine: vllm, model: fake-model}}]
    fallbacks: [{{engine: other, model: "other/model:1b"}}]
    resume: {{wait: 2, across_models: true}}
  never: {{targets: [{{engine: llamacpp, model: fake-model}}], resume: {{most: 0}}}}
  once: {{targets: [{{engine: llamacpp, model: fake-model}}], resume: {{most: 1}}}}
  hasty: {{targets: [{{engine: llamacpp, model: fake-model}}], resume: {{wait: 1}}}}
  short: {{targets: [{{engine: llamacpp, model: fake-model}}], timeouts: {{total: 4}}}}
default_model: llamacpp
breaker: {{failures: 1000}}  # what one test breaks is not another's matter
retries: {{budget: 1}}
"""


@dataclass
class Setting:
    """A gateway, its engine, and that one's dialect, which is also the name of the model."""

    gateway: GatewayProcess
    client: httpx.Client
    metrics: int
    engine: FakeEngine
    dialect: str = "llamacpp"


@contextmanager
def serving(directory: Path, engine: FakeEngine, other: FakeEngine, **settings: str) -> Iterator[Setting]:
    file, metrics = directory / "stack.yaml", free_port()
    file.write_text(CONFIG.format(a=engine.url, b=other.url))
    own = {"STACK_CONFIG": str(file), "STACK_WORKERS": "1", "STACK_METRICS_BIND": f"127.0.0.1:{metrics}"}
    settings = {"STACK_RESUME": "3"} | settings | own
    with running_gateway(directory / "log", engine.url, **settings) as gateway, gateway.client() as client:
        yield Setting(gateway, client, metrics, engine)


@pytest.fixture(scope="module")
def other() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def one(engine: FakeEngine, other: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    patience = {"LLM_FIRST_TOKEN_TIMEOUT": "3", "LLM_IDLE_TIMEOUT": "1.5"}
    with serving(tmp_path_factory.mktemp("resume"), engine, other, **patience) as setting:
        yield setting


@pytest.fixture(params=["ollama", "vllm", "llamacpp"])
def each(request: pytest.FixtureRequest, one: Setting) -> Setting:
    return replace(one, dialect=request.param)


def ask(at: Setting, *, path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """A stream with usage, unless `fields` say otherwise. `answer` is for the model: where it breaks off, and how."""
    return at.client.post(path, json=body_of(at, path, fields), headers=headers)


def body_of(at: Setting, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    script = {"dialect": at.dialect, "pieces": PIECES} | fields.pop("answer", {})
    body = {"model": at.dialect, "user": uuid4().hex, "script": [["answer", script]], "messages": MESSAGES}
    if fields.get("stream", True):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if path != CHAT:
        del body["messages"]
    return body | fields


def together(jobs: list[Callable[[], httpx.Response]]) -> list[httpx.Response]:
    with ThreadPoolExecutor(32) as pool:
        return [job.result() for job in [pool.submit(job) for job in jobs]]


def resumes(answer: httpx.Response) -> list[str]:
    return [line for line in answer.text.splitlines() if line.startswith(": resumed")]


def check_one_stream(answer: httpx.Response, dialect: str) -> list[Any]:
    """It looks like one engine's, but for the comments: nothing shows where its parts came from. Returns its chunks."""
    *chunks, done = events(answer.text)
    assert done == "[DONE]", answer.text
    assert "error" not in answer.text, answer.text
    for name in ("id", "created", "model", "system_fingerprint", "object"):
        assert len({chunk[name] for chunk in chunks if name in chunk}) == 1, (name, answer.text)
    said = [choice for chunk in chunks for choice in chunk["choices"]]
    roles = ["role" in choice.get("delta", {}) for choice in said]
    assert roles[0] == ("delta" in said[0])
    assert sum(roles) <= 1 or dialect == "ollama"  # which says it in every event of its own
    assert [bool(choice["finish_reason"]) for choice in said] == [False] * (len(said) - 1) + [True]
    return chunks


def outcome(answer: httpx.Response) -> tuple[str, str]:
    """A stream's text, and its finish_reason or, where it ends with an error, that one's code."""
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    if "error" in chunks[-1]:
        return text_of(chunks[:-1]), chunks[-1]["error"]["code"]
    return text_of(chunks), [it["finish_reason"] for chunk in chunks for it in chunk["choices"]][-1]


def test_cut_at_every_event_in_every_way_the_text_is_whole(each: Setting) -> None:
    length = len(events(ask(each).text)) - 2  # up to its finish_reason; after it nothing is missing
    cuts = [(cut, how) for cut in range(1, length) for how in HOW if how != "silence" or cut % 5 == 1]
    answers = together([partial(ask, each, answer={"cuts": [cut], "how": HOW[how]}) for cut, how in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        chunks = check_one_stream(answer, each.dialect)
        assert text_of(chunks) == WHOLE, cut
        usage = chunks[-1]["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == 7 + len(PIECES)
        # White space at the seam that isn't handed over is taken for one token; here it may be three.
        assert usage["prompt_tokens"] in ((7,) if each.dialect == "llamacpp" else (5, 6, 7)), cut
        assert outcome(answer) == (WHOLE, "stop")
        assert resumes(answer) == [": resumed 1"]


def test_cut_twice_the_text_is_whole(each: Setting) -> None:
    cuts = [[first, second] for first in range(1, len(PIECES)) for second in (1, 2, 5)]
    for cut, answer in zip(cuts, together([partial(ask, each, answer={"cuts": it}) for it in cuts]), strict=True):
        assert text_of(check_one_stream(answer, each.dialect)) == WHOLE, cut
        assert len(resumes(answer)) == (2 if sum(cut) < len(PIECES) else len(resumes(answer)))


def test_a_blocking_answer_is_whole_too(each: Setting) -> None:
    """An engine that is asked for a stream even so (gateway.fold) has it continued; any other makes it again."""
    folds = each.dialect == "llamacpp"
    uncut = ask(each, stream=False).json()
    cuts = range(1, len(PIECES) + 1) if folds else (1, 8)  # a retry is paid for
    for cut, answer in zip(
        cuts, together([partial(ask, each, stream=False, answer={"cuts": [it]}) for it in cuts]), strict=True
    ):
        same = {name: value for name, value in answer.json().items() if name in ("object", "model", "choices", "usage")}
        assert uncut | same == uncut, cut
        assert answer.headers.get("x-stack-resumes") == ("1" if folds and cut > 1 else None)


def test_the_first_event_is_not_there_yet_so_the_request_is_made_again(each: Setting) -> None:
    answer = ask(each, answer={"cuts": [0]})
    assert outcome(answer) == (WHOLE, "stop")
    assert not resumes(answer)


def test_limits_of_tokens_count_what_was_made(each: Setting) -> None:
    name = "max_tokens" if each.dialect == "ollama" else "max_completion_tokens"
    cases = [(limit, cut) for limit in (1, 3, 4, 7, 10) for cut in range(1, limit + 2)]
    answers = together([partial(ask, each, answer={"cuts": [cut]}, **{name: limit}) for limit, cut in cases])
    for (limit, cut), answer in zip(cases, answers, strict=True):
        assert outcome(answer) == ("".join(PIECES[:limit]), "length"), (limit, cut)
        *_, last = check_one_stream(answer, each.dialect)
        # Where nothing is left, no engine is asked, and none says how long the prompt was.
        assert last["choices"] or last["usage"]["total_tokens"] == 7 + limit


STOPS = [["\u200d"], [":\n\n-"], [" says:", "Grüße."], " G", ["never", ", 👩\u200d🚀"], ["\n\n\n"]]


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_sequence_across_the_seam_is_honoured(each: Setting, stop: Any) -> None:
    """This engine holds nothing back for a stop sequence that has begun, so that uncut its beginning is sent."""
    ends = min((WHOLE.index(it) for it in ([stop] if isinstance(stop, str) else stop) if it in WHOLE), default=None)
    cuts = range(1, len(PIECES))
    uncut, *answers = together([partial(ask, each, stop=stop, answer={"cuts": [it]}) for it in [None, *cuts]])
    for cut, answer in zip(cuts, answers, strict=True):
        text, reason = outcome(answer)
        assert reason == "stop"
        assert text.startswith(WHOLE[:ends]), cut
        assert outcome(uncut)[0].startswith(text), cut
        check_one_stream(answer, each.dialect)


def seen(at: Setting, answer: httpx.Response) -> list[dict[str, Any]]:
    """The bodies that the engine was sent for a request."""
    return [it["body"] for it in at.engine.seen(json.loads(answer.request.content)["user"])]


def test_what_is_handed_over_and_asked_for(each: Setting) -> None:
    """Six tokens were made."""
    cut = 6 if each.dialect == "ollama" else 7
    answer = ask(each, answer={"cuts": [cut]}, max_tokens=30, min_tokens=8, seed=4, temperature=0.5)
    first, second = seen(each, answer)
    said = {"messages": [*MESSAGES, {"role": "assistant", "content": "Well, 👩\u200d🚀 says:"}]}
    way = {"add_generation_prompt": False, "continue_final_message": True} if each.dialect == "vllm" else {}
    assert second == first | said | way | {"max_tokens": 24, "min_tokens": 2}


def test_an_answer_that_goes_on_with_the_callers_own_words(each: Setting) -> None:
    own: dict[str, Any] = {"messages": [*MESSAGES, {"role": "assistant", "content": "Oh."}]}
    if each.dialect == "vllm":
        own |= {"add_generation_prompt": False, "continue_final_message": True}
    cuts = range(1, len(PIECES))
    for cut, answer in zip(
        cuts, together([partial(ask, each, answer={"cuts": [it], "prefix": "Oh."}, **own) for it in cuts]), strict=True
    ):
        check_one_stream(answer, each.dialect)
        assert outcome(answer) == (WHOLE, "stop"), cut
    if each.dialect == "vllm":  # without the two fields it begins a new message
        *_, mine, new = seen(each, ask(each, answer={"cuts": [6]}, messages=own["messages"]))[1]["messages"]
        assert (mine["content"], new["content"]) == ("Oh.", "Well, 👩\u200d🚀 says")


def test_a_completion_goes_on_from_prompt_and_text(each: Setting) -> None:
    cuts = range(1, len(PIECES))
    asked = {"path": "/v1/completions", "prompt": "Say: ", "max_tokens": 40}
    jobs = [partial(ask, each, answer={"cuts": [it], "prefix": "Say: "}, **asked) for it in cuts]
    for cut, answer in zip(cuts, together(jobs), strict=True):
        chunks = check_one_stream(answer, each.dialect)
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == WHOLE, cut
        assert chunks[-1]["usage"] == USAGE


def test_where_only_the_role_had_come_any_request_is_made_again(one: Setting) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    answer = ask(one, answer={"cuts": [1]}, response_format=schema, tools=[TOOL], tool_choice="required")
    assert outcome(answer) == (WHOLE, "stop")
    check_one_stream(answer, one.dialect)
    first, second = seen(one, answer)
    assert first == second


def test_usage_that_the_engine_told_all_along_is_kept(one: Setting) -> None:
    at = replace(one, dialect="vllm")
    options = {"include_usage": True, "continuous_usage_stats": True}
    for limit in (40, 4):  # to the end; and with nothing left, so that no engine is asked
        answer = ask(at, answer={"cuts": [5]}, stream_options=options, max_tokens=limit)
        made = min(limit, len(PIECES))
        assert check_one_stream(answer, at.dialect)[-1]["usage"] == USAGE | {
            "completion_tokens": made,
            "total_tokens": 7 + made,
        }
        told = {"finish_reason": "stop" if limit == 40 else "length", "tokens_in": 7, "tokens_out": made, "resumes": 1}
        line = at.gateway.lines(answer.headers["x-request-id"])[-2]
        assert line | told == line


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
NEVER: dict[str, dict[str, Any]] = {
    "a forced tool": {"tools": [TOOL], "tool_choice": "required"},
    "a named tool": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    "JSON": {"response_format": {"type": "json_object"}},
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    "llama.cpp's schema": {"json_schema": {}},
    "a grammar": {"grammar": "root ::= [a-z]+"},
    "vLLM's constraints": {"structured_outputs": {"choice": ["a", "b"]}},
    "vLLM's older constraints": {"guided_regex": "a+"},
    "logprobs": {"logprobs": True},
    "audio": {"modalities": ["text", "audio"]},
    "no turn of the assistant's": {"add_generation_prompt": False},
    "a beginning that isn't text": {"messages": [*MESSAGES, {"role": "assistant", "content": [{"type": "text"}]}]},
    "a great many stop sequences": {"stop": ["x" * 3000, "y" * 3000]},
    "a completion of tokens": {"path": "/v1/completions", "prompt": [1, 2, 3]},
    "a completion of several prompts": {"path": "/v1/completions", "prompt": ["a", "b"]},
    "a completion's logprobs": {"path": "/v1/completions", "prompt": "", "logprobs": 0},
    "a completion that echoes": {"path": "/v1/completions", "prompt": "", "echo": True},
    "a completion with an end": {"path": "/v1/completions", "prompt": "", "suffix": "x"},
}
BEGUN = {
    "a tool call": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
    "a call of the old kind": {"function_call": {"arguments": "{"}},
    "reasoning": {"reasoning_content": "hm"},
    "reasoning, by another name": {"content": "", "reasoning": "hm"},
    "a refusal": {"refusal": "No"},
    "content that isn't text": {"content": [{"type": "text", "text": "x"}]},
}


@pytest.mark.parametrize("case", NEVER)
def test_what_cannot_be_continued_ends_with_an_error(one: Setting, case: str) -> None:
    answer = ask(one, answer={"cuts": [3], "dialect": "vllm"}, **NEVER[case])
    assert "error" in events(answer.text)[-2]
    assert not resumes(answer)
    assert len(seen(one, answer)) == 1


def test_two_answers_cannot_be_continued(one: Setting) -> None:
    more = ["event", {"choices": [{"index": 1, "delta": {"content": "x"}, "finish_reason": None}]}]
    answer = ask(one, n=2, script=[["role"], ["token", "x"], more, ["close"]])
    assert events(answer.text)[-2]["error"]["code"] == "engine_broken_stream"
    assert len(seen(one, answer)) == 1


@pytest.mark.parametrize("case", BEGUN)
def test_what_has_begun_that_isnt_text_cannot_be_continued(one: Setting, case: str) -> None:
    begun = ["event", {"choices": [{"index": 0, "delta": BEGUN[case], "finish_reason": None}]}]
    answer = ask(one, script=[["role"], ["token", "x"], begun, ["close"]])
    assert events(answer.text)[-2]["error"]["code"] == "engine_broken_stream"
    assert len(seen(one, answer)) == 1


def test_an_error_about_the_request_is_told_as_it_is(one: Setting) -> None:
    wrong = ["event", {"error": {"message": "too long", "code": 400}}]
    answer = ask(one, script=[["role"], ["token", "x"], wrong, ["hang"]])
    assert events(answer.text)[-2]["error"]["message"] == "too long"
    assert len(seen(one, answer)) == 1


@pytest.mark.parametrize("value", ["off", "OFF", "on"])
def test_a_caller_may_decline(one: Setting, value: str) -> None:
    answer = ask(one, answer={"cuts": [3]}, headers={"x-stack-resume": value})
    assert outcome(answer)[1] == ("stop" if value == "on" else "engine_broken_stream")


def test_a_header_that_says_neither_on_nor_off_is_refused(one: Setting) -> None:
    answer = ask(one, headers={"x-stack-resume": "maybe"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-stack-resume")


@pytest.mark.parametrize(("model", "most"), [("never", 0), ("once", 1), ("llamacpp", 3)])
def test_an_answer_is_continued_so_often_and_no_more(one: Setting, model: str, most: int) -> None:
    answer = ask(one, model=model, answer={"cuts": [3, 3, 3, 3, 3]}, headers={"x-stack-resume": "on"})
    assert outcome(answer) == ("".join(PIECES[: 2 * (most + 1)]), "engine_broken_stream")
    assert resumes(answer) == [f": resumed {number}" for number in range(1, most + 1)]
    line = one.gateway.lines(answer.headers["x-request-id"])[-2]
    assert (line.get("resumes", 0), line["tokens_out"]) == (most, 2 * (most + 1))


def test_the_setting_switches_it_off(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    body = {"messages": MESSAGES, "user": mark, "stream": True, "script": [["role"], ["token", "x"], ["close"]]}
    with gateway.client() as client:
        assert outcome(client.post(CHAT, json=body)) == ("x", "engine_broken_stream")
    assert len(engine.seen(mark)) == 1


def test_another_engine_goes_on_at_once_and_it_is_told(one: Setting) -> None:
    before = scrape(one.metrics)
    mortal = {"cuts": [3], "at": [one.engine.process.pid]}
    answers = together([partial(ask, one, model="pair", answer=mortal) for _ in range(10)])
    assert all(outcome(it) == (WHOLE, "stop") for it in answers)
    resumed = [it for it in answers if resumes(it)]
    assert resumed
    for answer in resumed:
        lines = one.gateway.lines(answer.headers["x-request-id"])
        assert [it["msg"] for it in lines] == ["chat_started", "resume", "chat_finished_stream", "request"]
        assert lines[1] | {"from": "llamacpp", "to": "other", "after": "engine_broken_stream"} == lines[1]
        expected = {"engine": "other", "resumes": 1, "attempts": 2, "outcome": "finished", "finish_reason": "stop"}
        assert lines[2] | expected | {"tokens_in": 7, "tokens_out": len(PIECES)} == lines[2]
    after = scrape(one.metrics)
    assert after.total("stack_resumes_total", route="pair", outcome="resumed") == len(resumed)
    assert after.total("stack_broken_streams_total") == before.total("stack_broken_streams_total")
    assert after.total("stack_tokens_total", model="pair", direction="output") == len(PIECES) * len(answers)


def test_another_model_goes_on_only_where_the_route_allows_it(one: Setting) -> None:
    """And an engine of another dialect is handed the text in its own way."""
    script = {
        "fake-model": [["answer", {"dialect": "vllm", "pieces": PIECES, "cuts": [6]}]],
        "other/model:1b": [["answer", {"dialect": "llamacpp", "pieces": PIECES}]],
    }
    assert outcome(ask(one, model="strict", script_for=script)) == ("Well, 👩\u200d🚀 says", "engine_broken_stream")
    assert outcome(ask(one, model="across", script_for=script)) == (WHOLE, "stop")


CONTINUATIONS: dict[str, list[Any]] = {
    "refuses it": [["json", [400, {"error": {"message": "prefill is incompatible with thinking"}}]]],
    "has too much to do": [["json", [503, {"error": {"message": "busy"}}]]],
    "fails": [["json", [500, {"error": {"message": "boom"}}]]],
    "says nothing": [["hang"]],
    "breaks off at once": [["close"]],
    "begins with an error": [["event", {"error": {"code": 500}}], ["hang"]],
}


@pytest.mark.parametrize("case", CONTINUATIONS)
def test_where_nobody_can_go_on_what_broke_it_off_is_told(one: Setting, case: str) -> None:
    dying = [["answer", {"dialect": "vllm", "pieces": PIECES, "cuts": [3, 0, 0, 0, 0, 0, 0]}]]
    answer = ask(one, model="across", script_for={"fake-model": dying, "other/model:1b": CONTINUATIONS[case]})
    assert outcome(answer) == ("Well,", "engine_broken_stream")
    assert not resumes(answer)


class Live(threading.Thread):
    """A stream whose text can be looked at while it comes."""

    def __init__(self, at: Setting, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.leave = threading.Event()
        self._at, self._body = at, body_of(at, CHAT, fields)
        self.start()

    def run(self) -> None:
        with self._at.gateway.client() as client, client.stream("POST", CHAT, json=self._body) as answer:
            self.id = answer.headers["x-request-id"]
            for piece in answer.iter_text():
                self.text += piece
                if self.leave.is_set():
                    break

    def wait(self) -> list[Any]:
        self.join(60)
        assert not self.is_alive()
        return events(self.text)


@contextmanager
def broken_off(directory: Path, other: FakeEngine, models: list[str]) -> Iterator[tuple[Setting, list[Live], int]]:
    """Answers whose engine was killed in their midst; their clients get pings. And the port that it had."""
    settings = {"STACK_HOLD": "0.3", "STACK_GRACE": "3"}
    with fake_engine() as first, serving(directory, first, other, **settings) as at:
        hang = {"cuts": [4], "how": [["hang"]], "at": [first.process.pid]}
        streams = [Live(at, model=model, answer=hang) for model in models]
        wait_for(lambda: all(PIECES[1] in it.text for it in streams))
        first.process.kill()
        first.process.wait()
        wait_for(lambda: all(": ping" in it.text.partition('"content"')[2] for it in streams))
        yield at, streams, int(first.url.rpartition(":")[2])


def test_the_same_engine_goes_on_once_it_is_back(other: FakeEngine, tmp_path: Path) -> None:
    with broken_off(tmp_path, other, ["llamacpp"] * 10) as (_, streams, port), fake_engine(port):
        assert {text_of(it.wait()) for it in streams} == {WHOLE}


def test_what_ends_the_wait_for_an_engine(other: FakeEngine, tmp_path: Path) -> None:
    """The end of the wait, that of the time for the whole answer, the client's leaving, the gateway's stopping."""
    with broken_off(tmp_path, other, ["hasty", "short", "llamacpp", "once"]) as (at, streams, _):
        hasty, short, left, stopped = streams
        left.leave.set()
        assert hasty.wait()[-2]["error"]["code"] == "engine_broken_stream"
        assert short.wait()[-2]["error"]["code"] == "engine_timeout"
        told = [at.gateway.lines(it.id)[-2]["outcome"] for it in (hasty, short, left)]
        assert told == ["engine_broken_stream", "engine_timeout", "client_left"]
        samples = scrape(at.metrics)
        assert samples.by("stack_resumes_total", "outcome") == {"failed": 1, "abandoned": 2}
        assert samples.total("stack_requests_in_flight") == 1
        assert at.gateway.stop() == 0
        assert stopped.wait()[-2]["error"]["code"] == "draining"
