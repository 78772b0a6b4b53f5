"""The ways in which an answer goes on, where they depend on the model, on a death, or on the engine that is left."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest

from tests.support.broken_answers import Asked, ask, outcome, read, together
from tests.support.kinds import CHAT, COMPLETIONS, DIALECTS, GREEDY, KINDS, PET, SAID, Kind, engine_events, schema
from tests.support.long import some
from tests.support.processes import Undying, events, post, running_gateway, undying_engine, wait_for

PAIRS = list(permutations(DIALECTS, 2))
THINKERS = ["thinker", "thinkerlines"]
# By the other names c and d, the engine a goes on at once. By one name alone it is probed first, half a second later.
PLACES = {"a": "a", "b": "b", "c": "a", "d": "a"}


def targets(dialect: str, model: str) -> str:
    names = ", ".join(f"{{{{engine: {dialect}-{place}, model: {model}}}}}" for place in "acd")
    return f"{{{{targets: [{names}]}}}}\n"


CONFIG = (
    "engines:\n"
    + "".join(
        f"  {dialect}-{place}: {{{{dialect: {dialect}, slots: 64, base_url: '{{{url}}}'}}}}\n"
        for dialect in DIALECTS
        for place, url in PLACES.items()
    )
    + "models:\n"
    + "".join(f"  {name}: {targets('ollama', name)}" for name in [*THINKERS, "thinkergpt"])
    + "".join(
        f"  {one}-{two}:\n"
        f"    targets: [{{{{engine: {one}-a, model: {one}}}}}]\n"
        f"    fallbacks: [{{{{engine: {two}-b, model: {two}}}}}]\n"
        "    resume: {{across_models: true}}\n"
        for one, two in [*PAIRS, ("llamacpp", "llamacpp")]
    )
    + f"  llamacpp-thinker: {targets('llamacpp', 'thinker')}"
    + f"  vllm: {targets('vllm', 'fake-model')}"
    + "default_model: vllm\nbreaker: {{failures: 1000}}\nretries: {{budget: 1}}\n"
)


class Setting(NamedTuple):
    asked: Asked
    first: Undying


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """Two engines, each as all three dialects. Both are started again when they die."""
    directory = tmp_path_factory.mktemp("ways")
    with ExitStack() as stack:
        a, b = (stack.enter_context(undying_engine()) for _ in range(2))
        (directory / "stack.yaml").write_text(CONFIG.format(a=a.url, b=b.url))
        settings = {"STACK_CONFIG": str(directory / "stack.yaml"), "STACK_WORKERS": "1", "STACK_RESUME": "3"}
        gateway = stack.enter_context(running_gateway(directory / "log", a.url, **settings))
        yield Setting(Asked(gateway, stack.enter_context(gateway.client())), a)


def ways(at: Setting, answer: httpx.Response) -> list[str]:
    lines = at.asked.gateway.lines(answer.headers["x-request-id"])
    return [it["way"] for it in lines if it["msg"] == "resume"]


def between(at: Setting, kind: Kind, one: str, two: str, *, other: Kind | None = None, **script: Any) -> httpx.Response:
    """Ask a route whose first target is of dialect `one` and whose fallback is another model of dialect `two`. The
    script is the first engine's. `other`: what the second one writes, if it is asked in another way."""
    scripts = {
        one: [["write", {"choices": kind.choices, "dialect": one} | script]],
        two: [["write", {"choices": (other or kind).choices, "dialect": two}]],
    }
    known = {"user": uuid4().hex, "script_for": scripts}
    messages = [{"role": "user", "content": f"Say it. #{json.dumps(known)}"}]
    return post(
        at.asked.client, CHAT, json={"model": f"{one}-{two}", "stream": True, "messages": messages} | known | kind.asks
    )


# -- reasoning ---------------------------------------------------------------------------------------------------------


def test_a_model_of_llamacpp_goes_on_with_reasoning_that_its_template_leaves_open(at: Setting) -> None:
    """JSON that has begun behind it is made anew."""
    kind = replace(KINDS["reasoning, then JSON"], asks=schema(PET) | {"model": "llamacpp-thinker"})
    whole = read(ask(at.asked, kind, "llamacpp"))
    answers = together([partial(ask, at.asked, kind, "llamacpp", cuts=[it]) for it in (2, 3, 4, 7)])
    for answer, way in zip(answers, ["thought", "thought", "thought", "anew"], strict=True):
        assert outcome(answer, whole) == "whole", answer.text
        assert ways(at, answer) == [way]
    kind = Kind([{"thinks": ["Hm", ",", " so"], "pieces": SAID}], {"model": "llamacpp-thinker"})
    whole = read(ask(at.asked, kind, "llamacpp"))
    another = [{"thinks": ["No"], "pieces": ["No", "."]}]
    cuts: list[Any] = [*some([[it] for it in range(2, engine_events(kind, "llamacpp") + 1)]), [3, 3], [6, 2]]
    answers = together([partial(ask, at.asked, kind, "llamacpp", cuts=it, again=another) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        assert outcome(answer, whole) == "whole", (cut, answer.text)
        assert set(ways(at, answer)) == {"thought"}, cut


@pytest.mark.parametrize("model", THINKERS)
def test_a_model_of_ollama_goes_on_with_its_reasoning_behind_the_prompt(at: Setting, model: str) -> None:
    """Its answer is sampled, and would be another one if it were made anew. The tag that ends the reasoning comes in
    several pieces."""
    choice = {"thinks": ["Hm", ",", " so", " </", "thin", "\n"], "pieces": SAID}
    kind = Kind([choice], {"model": model})
    whole = read(ask(at.asked, kind, "ollama"))
    assert whole[0]["thoughts"] == "".join(choice["thinks"])
    another = [{"thinks": ["No"], "pieces": ["No", "."]}]
    cuts: list[Any] = [
        *some([[it] for it in range(1, engine_events(kind, "ollama") + 1)]),
        [2, 2],
        [4, 6],
        [2, 9],
        [8, 2],
    ]
    answers = together([partial(ask, at.asked, kind, "ollama", cuts=it, again=another) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        assert outcome(answer, whole) == "whole", (cut, answer.text)
        assert set(ways(at, answer)) == {"thought"}, cut


def test_a_model_of_ollama_whose_reasoning_cannot_be_told_apart_thinks_anew(at: Setting) -> None:
    """Raw answers lack the token that ends it."""
    kind = replace(KINDS["reasoning, then text"], asks=GREEDY | {"model": "thinkergpt"})
    whole = read(ask(at.asked, kind, "ollama"))
    answer = ask(at.asked, kind, "ollama", cuts=[2])
    assert outcome(answer, whole) == "whole"
    assert ways(at, answer) == ["thought", "anew"]


# -- another kind of engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_json_and_calls_go_on_at_an_engine_of_another_kind(at: Setting, one: str, two: str) -> None:
    """A grammar or a schema says what may still come, whoever has begun. Of a call, the arguments are completed."""
    kind = replace(KINDS["JSON by a schema"], asks=schema(PET) | GREEDY)
    whole = read(between(at, kind, one, two))
    length = engine_events(kind, one)
    cuts = some(range(1, length + 1))
    answers = together([partial(between, at, kind, one, two, cuts=[it]) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        assert outcome(answer, whole) == "whole", (cut, answer.text)
    seen = {way for it in answers[1:-1] for way in ways(at, it)}  # nothing is left to be made after the last cut
    assert seen - {"again"} == {"nailed" if two == "ollama" else "rest"}
    kind = KINDS["a tool call"]
    whole = read(between(at, kind, one, two))
    cuts = some(range(1 + (one != "ollama"), engine_events(kind, one) + 1))
    answers = together([partial(between, at, kind, one, two, cuts=[it]) for it in cuts])
    for cut, answer in zip(cuts, answers, strict=True):
        assert outcome(answer, whole) == "whole", (cut, answer.text)


def test_reasoning_does_not_go_on_at_an_engine_of_another_kind(at: Setting) -> None:
    """Another model would think something else, and has other tags. The first one breaks off each time."""
    answer = between(at, KINDS["reasoning, then text"], "vllm", "llamacpp", cuts=[3, 0, 0, 0, 0, 0])
    assert outcome(answer, {}) == "error"


def test_a_forced_call_that_has_not_begun_is_forced_by_an_engine_of_another_kind(at: Setting) -> None:
    """There the gateway forces it, by a schema."""
    kind = KINDS["a call that vLLM forces"]
    whole = read(between(at, kind, "vllm", "llamacpp"))
    answer = between(at, kind, "vllm", "llamacpp", other=KINDS["forced calls"], cuts=[1])
    assert outcome(answer, whole) == "whole", answer.text


# -- deaths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_several_choices_go_on_elsewhere_when_their_engine_dies(at: Setting, *, stream: bool) -> None:
    """A request for several choices of llama.cpp is no likelier to be the reason than one for a single choice."""
    asked = {"model": "llamacpp-llamacpp", "stream": stream} | ({} if stream else {"stream_options": None})
    kind = replace(KINDS["two choices"], asks=KINDS["two choices"].asks | asked)
    whole = ask(at.asked, kind, "llamacpp")
    for cut in (3, 5, 11):
        deaths = at.first.deaths
        answer = dies(at, kind, cut)
        if stream:
            assert outcome(answer, read(whole)) == "whole", (cut, answer.text)
        else:
            assert answer.json()["choices"] == whole.json()["choices"], cut
        wait_for(lambda deaths=deaths: at.first.deaths > deaths and alive(at.first))


def dies(at: Setting, kind: Kind, cut: int) -> httpx.Response:
    """Ask, and have the first engine die after so many events."""
    known = replace(kind, script=kind.script | {"at": [at.first.process.pid]})
    return ask(at.asked, known, "llamacpp", cuts=[cut], how=[["die"]])


def alive(engine: Undying) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{engine.url}/health").status_code == 200
    return False


# -- log probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("stop", "cut"), [(" it is\nno", 3), ("\nso.x", 5)])
def test_text_that_waits_for_a_stop_sequence_keeps_its_log_probabilities(
    at: Setting, path: str, stop: str, cut: int
) -> None:
    """It is no stop sequence in the end, once because of what comes, and once because the answer is over."""
    kind = KINDS["log probabilities" if path == CHAT else "a completion's log probabilities"]
    kind = replace(kind, asks=kind.asks | {"stop": [stop]})
    whole = ask(at.asked, kind, "vllm")
    answer = ask(at.asked, kind, "vllm", cuts=[cut + (path == CHAT)])
    assert outcome(answer, read(whole)) == "whole", answer.text
    assert read(answer)[0]["tokens"] == SAID
    assert offsets(answer) == offsets(whole)


def offsets(answer: httpx.Response) -> list[int]:
    """Where the tokens of a completion begin, as they are told."""
    choices = [it for chunk in events(answer.text)[:-1] for it in chunk["choices"]]
    return [offset for it in choices for offset in (it.get("logprobs") or {}).get("text_offset", ())]
