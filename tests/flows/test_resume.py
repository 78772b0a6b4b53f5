"""An answer outlives its engine: what docs/when-an-engine-dies.md says. The engine knows one answer
(support/fakes/model.py). It breaks off where a test says, and goes on only if handed over in its dialect's own way."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support import twins
from tests.support.long import some
from tests.support.processes import (
    MESSAGES,
    FakeEngine,
    GatewayProcess,
    events,
    fake_engine,
    free_port,
    post,
    running_gateway,
    scrape,
    text_of,
    wait_for,
    was_cut,
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


CONFIG = (
    "engines:\n"
    + twins.engines()
    + "  other: {{dialect: llamacpp, slots: 256, base_url: '{b}'}}\n"
    + "models:\n"
    + twins.models()
    + "".join(twins.model(name, "ollama", name) for name in ("smollib", "smol", "smolold", "smolgpt"))
    + """
  smolnat: {{targets: [{{engine: ollama, model: smolnat}}]}}
  mixed:
    targets: [{{engine: vllm, model: fake-model}}]
    fallbacks: [{{engine: ollama, model: fake-model}}]
    resume: {{wait: 0}}
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
)


@dataclass
class Setting:
    """A gateway, its engine, and the engine's dialect, which is also the name of the model."""

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
    return post(at.client, path, json=body_of(at, path, fields), headers=headers)


def body_of(at: Setting, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    script = {"dialect": at.dialect, "pieces": PIECES} | fields.pop("answer", {})
    known: dict[str, Any] = {"user": uuid4().hex, "script": [["answer", script]]}
    # A raw request to Ollama has no field for a script, so the message holds it, too.
    messages = [{"role": "user", "content": f"Say it. #{json.dumps(known)}"}] if at.dialect == "ollama" else MESSAGES
    body = {"model": at.dialect, "messages": messages} | known
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
    """Check that the stream looks like one engine's, except for comments, and return its chunks."""
    *chunks, done = events(answer.text)
    assert done == "[DONE]", answer.text
    assert "error" not in answer.text, answer.text
    for name in ("id", "created", "model", "system_fingerprint", "object"):
        values = {chunk[name] for chunk in chunks if name in chunk}
        absent = name == "system_fingerprint" and dialect == "vllm"  # it is in the last event
        assert len(values) == 1 or (absent and not values), (name, answer.text)
    said = [choice for chunk in chunks for choice in chunk["choices"]]
    roles = ["role" in choice.get("delta", {}) for choice in said]
    assert roles[0] == ("delta" in said[0])
    assert sum(roles) <= 1
    assert [bool(choice["finish_reason"]) for choice in said] == [False] * (len(said) - 1) + [True]
    return chunks


def outcome(answer: httpx.Response) -> tuple[str, str]:
    """Return a stream's text, and its finish_reason or the code of its error."""
    *chunks, last = events(answer.text)
    if "error" in last:
        assert was_cut(answer)
        return text_of(chunks), last["error"]["code"]
    assert last == "[DONE]"
    assert not was_cut(answer)
    return text_of(chunks), [it["finish_reason"] for chunk in chunks for it in chunk["choices"]][-1]


def test_cut_at_every_event_in_every_way_the_text_is_whole(each: Setting) -> None:
    """No other engine is there to continue it."""
    length = len(events(ask(each).text)) - 2  # up to its finish_reason; after it nothing is missing
    cuts = [(cut, "closed") for cut in range(1, length)]
    cuts += some([(cut, how) for cut in range(1, length) for how in [*HOW][1:] if how != "silence" or cut % 5 == 1], 7)
    alone = partial(ask, each, model=f"{each.dialect}-alone")
    answers = together([partial(alone, answer={"cuts": [cut], "how": HOW[how]}) for cut, how in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        chunks = check_one_stream(answer, each.dialect)
        assert text_of(chunks) == WHOLE, cut
        usage = chunks[-1]["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == 7 + len(PIECES)
        # White space at the seam that isn't handed over is taken for one token; here it may be three.
        assert usage["prompt_tokens"] in ((5, 6, 7) if each.dialect == "vllm" else (7,)), cut
        assert outcome(answer) == (WHOLE, "stop")
        assert resumes(answer) == [": resumed 1"]


def test_cut_twice_the_text_is_whole(each: Setting) -> None:
    cuts = some([[first, second] for first in range(1, len(PIECES)) for second in (1, 2, 5)], 4)
    answers = together([partial(ask, each, answer={"cuts": it}) for it in cuts])
    asked = Counter(it["body"].get("user") for it in each.engine.seen())
    for cut, answer in zip(cuts, answers, strict=True):
        assert text_of(check_one_stream(answer, each.dialect)) == WHOLE, cut
        tries = asked[json.loads(answer.request.content)["user"]]
        assert len(resumes(answer)) == tries - 1, cut
        # The second cut may come after the last event of a rest that is short.
        assert tries == 3 if sum(cut) < len(PIECES) else tries in (2, 3), cut


def test_a_blocking_answer_is_whole_too(each: Setting) -> None:
    """An engine that is asked for a stream even so (relay.fold) has it continued; any other makes it again. An Ollama
    that has made no token is not asked again itself (gateway.relay.suspects)."""
    folds = each.dialect != "vllm"
    uncut = ask(each, stream=False).json()
    cuts = some(range(1, len(PIECES) + 1) if folds else (1, 8))  # a retry is paid for
    first = 1 if each.dialect == "ollama" else 2  # the event with a token: others send the role before it
    for cut, answer in zip(
        cuts, together([partial(ask, each, stream=False, answer={"cuts": [it]}) for it in cuts]), strict=True
    ):
        assert answer.status_code == 200, answer.text
        same = {name: value for name, value in answer.json().items() if name in ("object", "model", "choices")}
        assert uncut | same == uncut, cut
        assert answer.json()["usage"].items() <= uncut["usage"].items(), cut
        assert answer.headers.get("x-stack-resumes") == ("1" if folds and cut >= first else None)


def test_a_blocking_answer_of_an_ollama_that_cannot_be_continued_is_not_made_again_there(one: Setting) -> None:
    """Its model's process may have died of the request, while the server stays well."""
    at = replace(one, dialect="ollama")
    answer = ask(at, stream=False, answer={"cuts": [3]}, headers={"x-stack-resume": "off"})
    assert answer.status_code == 502, answer.text


def test_an_engine_that_fails_before_the_first_event_has_the_request_retried(each: Setting) -> None:
    answer = ask(each, answer={"cuts": [0]})
    assert outcome(answer) == (WHOLE, "stop")
    assert not resumes(answer)


def test_limits_of_tokens_count_what_was_made(each: Setting) -> None:
    name = "max_tokens" if each.dialect == "ollama" else "max_completion_tokens"
    cases = some([(limit, cut) for limit in (1, 3, 4, 7, 10) for cut in range(1, limit + 2)])
    answers = together([partial(ask, each, answer={"cuts": [cut]}, **{name: limit}) for limit, cut in cases])
    for (limit, cut), answer in zip(cases, answers, strict=True):
        assert outcome(answer) == ("".join(PIECES[:limit]), "length"), (limit, cut)
        *_, last = check_one_stream(answer, each.dialect)
        # Where nothing is left, no engine is asked: of them only vLLM has said how long the prompt was.
        assert last["choices"] or last["usage"]["total_tokens"] == 7 + limit


STOPS = [["\u200d"], [":\n\n-"], [" says:", "Grüße."], " G", ["never", ", 👩\u200d🚀"], ["\n\n\n"]]


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_sequence_that_spans_two_engines_ends_the_answer(each: Setting, stop: Any) -> None:
    """This engine does not hold back the beginning of a stop sequence, so without a cut that beginning is sent."""
    ends = min((WHOLE.index(it) for it in ([stop] if isinstance(stop, str) else stop) if it in WHOLE), default=None)
    cuts = some(range(1, len(PIECES)))
    uncut, *answers = together([partial(ask, each, stop=stop, answer={"cuts": [it]}) for it in [None, *cuts]])
    for cut, answer in zip(cuts, answers, strict=True):
        text, reason = outcome(answer)
        assert reason == "stop"
        assert text.startswith(WHOLE[:ends]), cut
        assert outcome(uncut)[0].startswith(text), cut
        check_one_stream(answer, each.dialect)


def seen(at: Setting, answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the bodies that the engine got for a request."""
    return [it["body"] for it in at.engine.seen(json.loads(answer.request.content)["user"])]


def test_each_engine_gets_the_text_in_its_own_form(each: Setting) -> None:
    """Six tokens were made."""
    if each.dialect == "ollama":
        pytest.skip("raw: test_the_raw_request_to_an_ollama")
    answer = ask(each, answer={"cuts": [7]}, max_tokens=30, min_tokens=8, seed=4, temperature=0.5)
    first, second = seen(each, answer)
    said = {"messages": [*MESSAGES, {"role": "assistant", "content": "Well, 👩\u200d🚀 says:"}]}
    way = {"add_generation_prompt": False, "continue_final_message": True} if each.dialect == "vllm" else {}
    assert second == first | said | way | {"max_tokens": 24, "min_tokens": 2}


def test_an_assistant_message_that_the_caller_began_is_continued(each: Setting) -> None:
    own: dict[str, Any] = {"messages": [*MESSAGES, {"role": "assistant", "content": "Oh."}]}
    if each.dialect == "vllm":
        own |= {"add_generation_prompt": False, "continue_final_message": True}
    cuts = some(range(1, len(PIECES)))
    for cut, answer in zip(
        cuts, together([partial(ask, each, answer={"cuts": [it], "prefix": "Oh."}, **own) for it in cuts]), strict=True
    ):
        check_one_stream(answer, each.dialect)
        assert outcome(answer) == (WHOLE, "stop"), cut
    if each.dialect == "vllm":  # without the two fields it begins a new message
        *_, mine, new = seen(each, ask(each, answer={"cuts": [6]}, messages=own["messages"]))[1]["messages"]
        assert (mine["content"], new["content"]) == ("Oh.", "Well, 👩\u200d🚀 says")


@pytest.mark.parametrize("model", ["smollib", "smol", "smolnat"])  # each kind of template
def test_an_ollama_continues_behind_the_prompt_with_every_template(one: Setting, model: str) -> None:
    at, cuts = replace(one, dialect="ollama"), some(range(1, len(PIECES) + 1))
    answers = together([partial(ask, at, model=model, answer={"cuts": [it]}) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        chunks = check_one_stream(answer, at.dialect)
        assert outcome(answer) == (WHOLE, "stop"), cut
        assert chunks[-1]["usage"] == USAGE, cut
        first, second = seen(at, answer)
        assert ("messages" in first, second["raw"]) == (True, True)


def test_the_raw_request_to_an_ollama(one: Setting) -> None:
    """Six tokens were made, and the white space at their end is kept."""
    at = replace(one, dialect="ollama")
    said = {"max_tokens": 30, "seed": 4, "temperature": 0.5, "stop": ["never"], "presence_penalty": 0.5}
    first, second = seen(at, ask(at, answer={"cuts": [7]}, **said))
    prompt = f"<|im_start|>user\n{first['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    options = {"temperature": 0.5, "top_p": 1.0, "seed": 4, "presence_penalty": 0.5, "num_predict": 23}
    whole = {"model": "fake-model", "raw": True, "think": False, "truncate": False, "stream": True}
    asked = whole | {"prompt": prompt + "".join(PIECES[:7]), "options": options | {"stop": ["never"]}}
    assert second.items() >= asked.items()
    assert second.keys() - asked.keys() == {"user", "script"}  # which the engine found in the prompt


@pytest.mark.parametrize("model", ["smolold", "smolgpt"])
def test_an_answer_that_ollama_cannot_continue_is_made_again_and_joined_if_it_agrees(one: Setting, model: str) -> None:
    at, cuts = replace(one, dialect="ollama"), some(range(1, len(PIECES) + 1))
    answers = together([partial(ask, at, model=model, answer={"cuts": [it]}) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        chunks = check_one_stream(answer, at.dialect)
        assert outcome(answer) == (WHOLE, "stop"), cut
        assert chunks[-1]["usage"] == USAGE, cut
        first, second = seen(at, answer)
        assert first == second
        assert first["seed"] > 0


OTHERWISE: dict[str, list[str]] = {
    "another word": ["Well", ",", " I", " say", "."],
    "another word within what was sent": ["Well", ";", " 👩", "\u200d🚀", " says"],
    "a shorter answer": ["Well", ","],
}


def test_an_answer_made_again_that_does_not_agree_is_not_joined(one: Setting) -> None:
    at = replace(one, dialect="ollama")
    jobs = [partial(ask, at, model="smolold", answer={"cuts": [4], "again": it}) for it in OTHERWISE.values()]
    for case, answer in zip(OTHERWISE, together(jobs), strict=True):
        assert outcome(answer) == ("".join(PIECES[:4]), "engine_broken_stream"), case
        assert not resumes(answer), case
        assert at.gateway.lines(answer.headers["x-request-id"])[-2].get("resumes", 0) == 0, case


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def test_an_answer_with_tools_is_not_continued_raw(one: Setting) -> None:
    """A call would come as text. With a template that closes a last message, the answer is made again."""
    at = replace(one, dialect="ollama")
    for model, again in (("smollib", False), ("smol", True)):
        answer = ask(at, model=model, answer={"cuts": [6]}, tools=[TOOL])
        assert outcome(answer) == (WHOLE, "stop")
        first, second = seen(at, answer)
        assert (first == second) == again
        assert "raw" not in second


def test_the_way_of_a_model_is_tried_once_for_all_its_answers(one: Setting) -> None:
    def trials() -> int:
        return sum(it["body"].get("max_tokens") == 8 and it["body"]["model"] == "smolnat" for it in one.engine.seen())

    at = replace(one, dialect="ollama")
    ask(at, model="smolnat", answer={"cuts": [3]})
    before = trials()
    together([partial(ask, at, model="smolnat", answer={"cuts": [3]}) for _ in range(5)])
    assert trials() == before > 0


def test_a_model_is_tried_with_the_effort_of_the_request(one: Setting) -> None:
    at = replace(one, dialect="ollama")
    asked: list[dict[str, Any]] = [{"reasoning_effort": "max"}, {"reasoning": {"effort": "none"}}]
    for fields in asked:
        assert outcome(ask(at, model="smolnat", answer={"cuts": [3]}, **fields)) == (WHOLE, "stop")
    tried = [it["body"] for it in one.engine.seen() if it["body"].get("max_tokens") == 8]
    assert {"max", "none"} <= {it.get("reasoning_effort") for it in tried if it["model"] == "smolnat"}


@pytest.mark.parametrize("model", ["ollama", "smol", "smolold"])
def test_a_completion_of_an_ollama_is_continued_behind_its_rendered_prompt_or_made_again(
    one: Setting, model: str
) -> None:
    at, cuts = replace(one, dialect="ollama"), some(range(1, len(PIECES)))

    def complete(cut: int) -> httpx.Response:
        known = {"user": uuid4().hex, "script": [["answer", {"dialect": "ollama", "pieces": PIECES, "cuts": [cut]}]]}
        prompt = f"Say: #{json.dumps(known)}"
        script = {"cuts": [cut], "prefix": prompt}
        return ask(at, path="/v1/completions", model=model, answer=script, prompt=prompt, user=known["user"])

    for cut, answer in zip(cuts, together([partial(complete, it) for it in cuts]), strict=True):
        chunks = check_one_stream(answer, at.dialect)
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == WHOLE, cut
        assert [it.get("raw", False) for it in seen(at, answer)] == [False, model != "smolold"]


def test_a_completion_that_another_engine_began_is_never_continued_by_an_ollama(one: Setting) -> None:
    """Ollama puts the prompt through the chat template, so prompt and text would be another question."""
    at = replace(one, dialect="vllm")
    answer = ask(at, model="mixed", answer={"cuts": [3], "prefix": "Say: "}, path="/v1/completions", prompt="Say: ")
    assert events(answer.text)[-1]["error"]["code"] == "engine_broken_stream"
    assert not resumes(answer)


def test_timings_and_details_of_the_last_part_are_left_out(one: Setting) -> None:
    for stream in (True, False):
        uncut, resumed = ask(one, stream=stream), ask(one, stream=stream, answer={"cuts": [5]})
        assert "timings" in uncut.text
        assert "timings" not in resumed.text
        last = events(resumed.text)[-2] if stream else resumed.json()
        assert last["usage"] == USAGE


def test_a_completion_is_continued_from_its_prompt_and_text(each: Setting) -> None:
    if each.dialect == "ollama":
        pytest.skip("raw: test_a_completion_of_an_ollama_is_continued_behind_its_rendered_prompt_or_made_again")
    cuts = some(range(1, len(PIECES)))
    asked = {"path": "/v1/completions", "prompt": "Say: ", "max_tokens": 40}
    jobs = [partial(ask, each, answer={"cuts": [it], "prefix": "Say: "}, **asked) for it in cuts]
    for cut, answer in zip(cuts, together(jobs), strict=True):
        chunks = check_one_stream(answer, each.dialect)
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == WHOLE, cut
        assert chunks[-1]["usage"] == USAGE


def test_any_request_is_retried_if_only_the_role_had_come(one: Setting) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    answer = ask(one, answer={"cuts": [1]}, response_format=schema)
    assert outcome(answer) == (WHOLE, "stop")
    check_one_stream(answer, one.dialect)
    first, second = seen(one, answer)
    assert first == second


def test_usage_that_the_engine_reported_in_every_chunk_is_kept(one: Setting) -> None:
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


NEVER: dict[str, dict[str, Any]] = {
    "audio": {"modalities": ["text", "audio"]},
    "a completion that echoes": {"path": "/v1/completions", "prompt": "", "echo": True},
    "a completion with an end": {"path": "/v1/completions", "prompt": "", "suffix": "x"},
}
BEGUN = {
    "a call of the old kind": {"function_call": {"arguments": "{"}},
    "a refusal": {"refusal": "No"},
}


CONSTRAINED: dict[str, dict[str, Any]] = {
    "JSON": {"response_format": {"type": "json_object"}},
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    "llama.cpp's schema": {"json_schema": {}},
    "a grammar": {"grammar": "root ::= [a-z]+"},
    "vLLM's constraints": {"structured_outputs": {"choice": ["a", "b"]}},
    "vLLM's older constraints": {"guided_regex": "a+"},
}
UNUSUAL: dict[str, dict[str, Any]] = {
    "no turn of the assistant's": {"add_generation_prompt": False},
    "a beginning that isn't text": {"messages": [*MESSAGES, {"role": "assistant", "content": [{"type": "text"}]}]},
    "a great many stop sequences": {"stop": ["x" * 3000, "y" * 3000]},
}
JSON_PIECES = ['{"', "na", 'me":', ' "', "Ä", '"', ", ", '"b": [', "1", "2", "]}"]
THINKS = ["Hm", ",", " \n", "so", "."]


def test_an_answer_that_no_engine_can_continue_is_made_again_and_joined_if_it_agrees(one: Setting) -> None:
    """The same request is sent, because with a text handed over a grammar would begin again in the middle of it."""
    cases = [*product(CONSTRAINED | UNUSUAL, ([3], [4, 6]))]
    asks = partial(ask, one, temperature=0)
    jobs = [
        partial(asks, answer={"cuts": cuts, "dialect": "vllm"}, **(CONSTRAINED | UNUSUAL)[case]) for case, cuts in cases
    ]
    for (case, cuts), answer in zip(cases, together(jobs), strict=True):
        assert outcome(answer) == (WHOLE, "stop"), case
        assert len(resumes(answer)) == len(cuts), case
        first, *more = seen(one, answer)
        assert len(more) == len(cuts), case
        assert all(it == first for it in more), case


def test_json_cut_at_every_event_is_whole(each: Setting) -> None:
    said = {"response_format": {"type": "json_object"}, "temperature": 0}
    length = len(events(ask(each, answer={"pieces": JSON_PIECES}, **said).text)) - 2
    cuts = range(1, length)
    jobs = [partial(ask, each, answer={"pieces": JSON_PIECES, "cuts": [it]}, **said) for it in cuts]
    for cut, answer in zip(cuts, together(jobs), strict=True):
        text = text_of(check_one_stream(answer, each.dialect))
        assert text == "".join(JSON_PIECES), cut
        json.loads(text)


def thoughts(answer: httpx.Response) -> str:
    deltas = [choice["delta"] for it in events(answer.text)[:-1] for choice in it["choices"]]
    return "".join(it.get("reasoning") or it.get("reasoning_content") or "" for it in deltas)


def test_reasoning_cut_at_every_event_is_whole_and_so_is_the_text_after_it(each: Setting) -> None:
    """With an answer begun by a sampling vLLM alone there is no seed, as another test says."""
    what: dict[str, Any] = {"thinks": THINKS}
    length = len(events(ask(each, answer=what, temperature=0).text)) - 2
    cuts = some([[it] for it in range(1, length)] + [[first, first + 2] for first in range(1, length - 2)])
    jobs = [partial(ask, each, answer=what | {"cuts": it}, temperature=0) for it in cuts]
    for cut, answer in zip(cuts, together(jobs), strict=True):
        chunks = check_one_stream(answer, each.dialect)
        assert (thoughts(answer), text_of(chunks)) == ("".join(THINKS), WHOLE), cut
        assert outcome(answer) == (WHOLE, "stop")


def test_reasoning_that_differs_the_second_time_is_not_joined(one: Setting) -> None:
    at, what = replace(one, dialect="vllm"), {"thinks": THINKS, "cuts": [9], "again": ["Well", ";", " no"]}
    answer = ask(at, answer=what, temperature=0)
    assert outcome(answer) == ("".join(PIECES[:3]), "engine_broken_stream")
    assert not resumes(answer)


def test_a_sampled_answer_is_made_again_only_with_a_seed(each: Setting) -> None:
    """The gateway adds a seed for Ollama and llama.cpp."""
    asks = partial(ask, each, answer={"thinks": THINKS, "cuts": [4]})
    seeded, answer = together([partial(asks, seed=7), asks])
    assert (outcome(seeded), thoughts(seeded)) == ((WHOLE, "stop"), "".join(THINKS))
    if each.dialect == "vllm":
        assert outcome(answer) == ("", "engine_broken_stream")
        assert len(seen(each, answer)) == 1
    else:
        assert (outcome(answer), thoughts(answer)) == ((WHOLE, "stop"), "".join(THINKS))
        assert len({it["seed"] for it in seen(each, answer)}) == 1


@pytest.mark.parametrize("case", NEVER)
def test_what_cannot_be_continued_ends_with_an_error(one: Setting, case: str) -> None:
    answer = ask(one, answer={"cuts": [3], "dialect": "vllm"}, **NEVER[case])
    assert "error" in events(answer.text)[-1]
    assert not resumes(answer)
    assert len(seen(one, answer)) == 1


@pytest.mark.parametrize("case", BEGUN)
def test_a_refusal_or_a_call_of_the_old_kind_is_not_continued(one: Setting, case: str) -> None:
    begun = ["event", {"choices": [{"index": 0, "delta": BEGUN[case], "finish_reason": None}]}]
    answer = ask(one, script=[["role"], ["token", "x"], begun, ["close"]])
    assert events(answer.text)[-1]["error"]["code"] == "engine_broken_stream"
    assert len(seen(one, answer)) == 1


def test_an_engines_error_about_the_request_is_passed_on(one: Setting) -> None:
    wrong = ["event", {"error": {"message": "too long", "code": 400}}]
    answer = ask(one, script=[["role"], ["token", "x"], wrong, ["hang"]])
    assert events(answer.text)[-1]["error"]["message"] == "too long"
    assert len(seen(one, answer)) == 1


@pytest.mark.parametrize("value", ["off", "OFF", "on"])
def test_the_header_turns_resume_off(one: Setting, value: str) -> None:
    answer = ask(one, answer={"cuts": [3]}, headers={"x-stack-resume": value})
    assert outcome(answer)[1] == ("stop" if value == "on" else "engine_broken_stream")


def test_a_header_that_says_neither_on_nor_off_is_refused(one: Setting) -> None:
    answer = ask(one, headers={"x-stack-resume": "maybe"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-stack-resume")


def test_an_answer_is_continued_at_most_as_often_as_allowed(one: Setting) -> None:
    allowed = {"never": 0, "once": 1, "llamacpp": 3}
    asks = partial(ask, one, answer={"cuts": [3, 3, 3, 3, 3]}, headers={"x-stack-resume": "on"})
    answers = together([partial(asks, model=model) for model in allowed])
    for most, answer in zip(allowed.values(), answers, strict=True):
        assert outcome(answer) == ("".join(PIECES[: 2 * (most + 1)]), "engine_broken_stream")
        assert resumes(answer) == [f": resumed {number}" for number in range(1, most + 1)]
        line = one.gateway.lines(answer.headers["x-request-id"])[-2]
        assert (line.get("resumes", 0), line["tokens_out"]) == (most, 2 * (most + 1))


def test_the_setting_turns_resume_off(gateway: GatewayProcess, engine: FakeEngine, mark: str) -> None:
    body = {"messages": MESSAGES, "user": mark, "stream": True, "script": [["role"], ["token", "x"], ["close"]]}
    with gateway.client() as client:
        assert outcome(post(client, CHAT, json=body)) == ("x", "engine_broken_stream")
    assert len(engine.seen(mark)) == 1


def test_another_engine_continues_at_once_and_the_client_and_the_log_are_told(one: Setting) -> None:
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


def test_another_model_continues_only_if_the_route_allows_it(one: Setting) -> None:
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


def test_without_an_engine_to_continue_the_client_gets_the_original_error(one: Setting) -> None:
    dying = [["answer", {"dialect": "vllm", "pieces": PIECES, "cuts": [3, 0, 0, 0, 0, 0, 0]}]]
    scripts = [{"fake-model": dying, "other/model:1b": it} for it in CONTINUATIONS.values()]
    answers = together([partial(ask, one, model="across", script_for=it) for it in scripts])
    for case, answer in zip(CONTINUATIONS, answers, strict=True):
        assert outcome(answer) == ("Well,", "engine_broken_stream"), case
        assert not resumes(answer), case


class Live(threading.Thread):
    """A stream whose text can be read while it comes."""

    def __init__(self, at: Setting, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.leave = threading.Event()
        self._at, self._body = at, body_of(at, CHAT, fields)
        self.start()

    def run(self) -> None:
        told = suppress(httpx.RemoteProtocolError)  # of one that is cut the text says how it ended
        with told, self._at.gateway.client() as client, client.stream("POST", CHAT, json=self._body) as answer:
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
    """Yield answers whose engine was killed in the middle, and the port that it had. Their clients get pings."""
    settings = {"STACK_HOLD": "0.3", "STACK_GRACE": "1"}
    with fake_engine() as first, serving(directory, first, other, **settings) as at:
        hang = {"cuts": [4], "how": [["hang"]], "at": [first.process.pid]}
        streams = [Live(at, model=model, answer=hang) for model in models]
        wait_for(lambda: all(PIECES[1] in it.text for it in streams))
        first.process.kill()
        first.process.wait()
        wait_for(lambda: all(": ping" in it.text.partition('"content"')[2] for it in streams))
        yield at, streams, int(first.url.rpartition(":")[2])


def test_the_same_engine_continues_when_it_is_back(other: FakeEngine, tmp_path: Path) -> None:
    with broken_off(tmp_path, other, ["llamacpp"] * 10) as (_, streams, port), fake_engine(port):
        assert {text_of(it.wait()) for it in streams} == {WHOLE}


def test_what_ends_the_wait_for_an_engine(other: FakeEngine, tmp_path: Path) -> None:
    """The end of the wait, the end of the total time, the client's disconnect, and the stop of the gateway."""
    with broken_off(tmp_path, other, ["hasty", "short", "llamacpp", "once"]) as (at, streams, _):
        hasty, short, left, stopped = streams
        left.leave.set()
        assert hasty.wait()[-1]["error"]["code"] == "engine_broken_stream"
        assert short.wait()[-1]["error"]["code"] == "engine_timeout"
        told = [at.gateway.lines(it.id)[-2]["outcome"] for it in (hasty, short, left)]
        assert told == ["engine_broken_stream", "engine_timeout", "client_left"]
        samples = scrape(at.metrics)
        assert samples.by("stack_resumes_total", "outcome") == {"failed": 1, "abandoned": 2}
        assert samples.total("stack_requests_in_flight") == 1
        assert at.gateway.stop() == 0
        assert stopped.wait()[-1]["error"]["code"] == "draining"
