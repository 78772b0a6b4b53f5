"""Streams of the translated APIs outlive their engine: an answer of reasoning, text and calls is cut at every event of
the engine (at every fourth in two dialects: test_resume_kinds.py has the others), and comes out as if nothing had
happened. The records tell of each resume."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest

from tests.support import judges, twins
from tests.support.faces import APIS, MESSAGES_API, Api, events
from tests.support.fakes.dialects import ENGINES
from tests.support.fakes.told import telling
from tests.support.judges import Said
from tests.support.kinds import ARGUMENTS, MORE, SAID, TOOLS, Kind, engine_events
from tests.support.processes import (
    FakeEngine,
    GatewayProcess,
    free_port,
    post,
    running_gateway,
    scrape,
    was_cut,
)
from tests.support.rows import Rows

ANSWER = {"thinks": ["Hm", ",", " so"], "pieces": SAID, "calls": [["sun", ARGUMENTS], ["rain", MORE]]}
CALLS = (("sun", {"city": "Paris", "days": 3}), ("rain", {"city": "Oslo"}))
WHOLE = {
    api: Said("".join(SAID), "Hm, so", CALLS, finish)
    for api, finish in {"responses": "completed", "messages": "tool_use"}.items()
}
_FUNCTIONS: list[dict[str, Any]] = [it["function"] for it in TOOLS]
ASKS: dict[str, dict[str, Any]] = {
    "responses": {"tools": [{"type": "function", "strict": False, **it} for it in _FUNCTIONS]},
    "messages": {"tools": [{"name": it["name"], "input_schema": it["parameters"]} for it in _FUNCTIONS]},
}


class Setting(NamedTuple):
    gateway: GatewayProcess
    client: httpx.Client
    metrics: int
    data: Path


@pytest.fixture(scope="module")
def at(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    directory, metrics = tmp_path_factory.mktemp("face-resume"), free_port()
    (directory / "stack.yaml").write_text(twins.CONFIG.format(a=engine.url))
    settings = {"STACK_CONFIG": str(directory / "stack.yaml"), "STACK_WORKERS": "1", "STACK_RESUME": "3"}
    settings |= {"STACK_METRICS_BIND": f"127.0.0.1:{metrics}", "STACK_DATA_DIR": str(directory / "data")}
    with running_gateway(directory / "log", engine.url, **settings) as gateway, gateway.client() as client:
        yield Setting(gateway, client, metrics, directory / "data")


def ask(at: Setting, api: Api, dialect: str, **script: Any) -> httpx.Response:
    what = {"dialect": dialect, "choices": [ANSWER]} | script
    text = telling(user=uuid4().hex, script=[["write", what]])
    body = api.body(text, model=dialect, stream=True, temperature=0, **ASKS[api.name])
    return post(at.client, api.path, json=body)


def said(api: Api, answer: httpx.Response) -> Said:
    assert (answer.status_code, was_cut(answer)) == (200, False), answer.text
    told = events(answer.text)
    return judges.message_stream(told) if api is MESSAGES_API else judges.response_stream(told)


@pytest.mark.parametrize("dialect", ENGINES)
@pytest.mark.parametrize("api", APIS.values(), ids=APIS)
def test_a_stream_of_each_api_cut_at_any_event_is_whole(at: Setting, api: Api, dialect: str) -> None:
    length, empty = engine_events(Kind([ANSWER]), dialect), dialect != "ollama"  # whether the first event says nothing
    cuts: list[list[int]] = [[it] for it in range(1, length + 1, 1 if dialect == "vllm" else 4)]
    cuts += [[], [5, length - 2], [length - 3, length - 1]]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda cut: ask(at, api, dialect, cuts=cut), cuts))
    for cut, answer in zip(cuts, answers, strict=True):
        assert said(api, answer) == WHOLE[api.name], cut
        *_, finished = (it for it in at.gateway.lines(answer.headers["x-request-id"]) if "outcome" in it)
        told = (finished["api"], finished["outcome"], finished.get("resumes", 0))
        assert told == (api.name, "finished", 0 if cut == [1] and empty else len(cut)), cut  # nothing to go on with


@pytest.mark.parametrize("dialect", ENGINES)
def test_a_stream_that_goes_on_with_the_callers_beginning_is_whole(at: Setting, dialect: str) -> None:
    pieces = ["ha", "ha", "!", " Well", "."]
    for cut in (3, 5):
        what = {"dialect": dialect, "pieces": pieces, "cuts": [cut], "prefix": "ha"}
        text = telling(user=uuid4().hex, script=[["answer", what]])
        body = MESSAGES_API.body(text, model=dialect, stream=True, temperature=0)
        body["messages"].append({"role": "assistant", "content": "ha"})
        answer = post(at.client, MESSAGES_API.path, json=body)
        assert said(MESSAGES_API, answer).text == "haha! Well.", (cut, answer.text)
        *_, finished = (it for it in at.gateway.lines(answer.headers["x-request-id"]) if "outcome" in it)
        assert (finished["outcome"], finished["resumes"]) == ("finished", 1)


@pytest.mark.parametrize("api", APIS.values(), ids=APIS)
def test_a_resume_is_counted_in_the_usage_and_the_metrics(at: Setting, api: Api) -> None:
    before = scrape(at.metrics)
    answer = ask(at, api, "vllm", cuts=[8, 14])
    assert said(api, answer) == WHOLE[api.name]
    rows = Rows({"STACK_DATA_DIR": str(at.data)})
    row = rows.of(answer.headers["x-request-id"])
    rows.close()
    assert (row["api"], row["outcome"], row["resumes"]) == (api.name, "finished", 2)
    for name, labels, count in (
        ("stack_resumes_total", {"route": "vllm", "outcome": "resumed"}, 2),
        ("stack_requests_total", {"api": api.name, "outcome": "finished"}, 1),
        ("stack_broken_streams_total", {"api": api.name}, 0),
    ):
        assert scrape(at.metrics).total(name, **labels) == before.total(name, **labels) + count
