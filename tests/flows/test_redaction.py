"""Redaction: what callers and engines say, and keys, are in no log line, metric or span, and in no file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.collector import Collector, collecting
from tests.support.processes import (
    AUTH,
    JSON,
    KEY,
    FakeEngine,
    GatewayProcess,
    free_port,
    post,
    running_gateway,
    scrape,
)

WORD = "canary-e21b"
OTHER = "canary-header"  # of headers, queries and paths
USER = [{"role": "user", "content": WORD}]
TOOL = {"type": "function", "function": {"name": WORD, "description": WORD, "parameters": {"properties": {WORD: {}}}}}
CALL = {"id": WORD, "type": "function", "function": {"name": WORD, "arguments": f'{{"{WORD}": 1}}'}}
ERROR = {"error": {"message": WORD, "type": WORD, "code": WORD, "param": WORD}}
HEADERS = {"user-agent": OTHER, "x-trace": OTHER, "cookie": OTHER, "referer": OTHER, "baggage": f"a={OTHER}"}
CHAT = "/v1/chat/completions"
# By what is sent: the path and the body.
SENT: dict[str, tuple[str, Any]] = {
    "a chat": (CHAT, {"messages": USER, "user": WORD, "stop": WORD, "metadata": {WORD: WORD}}),
    "a stream": (
        CHAT,
        {"messages": USER, "stream": True, "script": [["token", WORD], ["finish", "stop"], ["done"], ["end"]]},
    ),
    "tools": (
        CHAT,
        {
            "messages": [
                *USER,
                {"role": "assistant", "content": WORD, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": WORD, "content": WORD},
            ],
            "tools": [TOOL],
        },
    ),
    "an unknown field": (CHAT, {"messages": USER, WORD: WORD}),
    "a wrong field": (CHAT, {"messages": WORD}),
    "an unknown model": (CHAT, {"messages": USER, "model": WORD}),
    "no JSON": (CHAT, f'{{"messages": {WORD}}}'),
    "an error of the engine": (CHAT, {"messages": USER, "script": [["json", [422, ERROR]]]}),
    "an answer that is none": (CHAT, {"messages": USER, "script": [["text", WORD], ["end"]]}),
    "an error in a stream": (
        CHAT,
        {"messages": USER, "stream": True, "script": [["role"], ["token", WORD], ["event", ERROR], ["end"]]},
    ),
    "a broken stream": (
        CHAT,
        {"messages": USER, "stream": True, "script": [["token", WORD], ["text", f"data: {WORD}\n\n"], ["end"]]},
    ),
    "a completion": ("/v1/completions", {"prompt": WORD, "suffix": WORD}),
    "an embedding": ("/v1/embeddings", {"input": [WORD, WORD]}),
    "a ranking": ("/v1/rerank", {"query": WORD, "documents": [WORD]}),
    "a speech": ("/v1/audio/speech", {"input": WORD, "voice": WORD, "instructions": WORD}),
    "a response": ("/v1/responses", {"input": WORD, "instructions": WORD, "metadata": {WORD: WORD}}),
    "a message": ("/v1/messages", {"messages": USER, "system": WORD, "max_tokens": 5}),
    "a count": ("/v1/messages/count_tokens", {"messages": USER, "system": WORD}),
    "nowhere": (f"/v1/nowhere?{OTHER}", {"messages": USER}),
}


@dataclass
class Watched:
    gateway: GatewayProcess
    metrics: int
    collector: Collector
    files: Path

    def found(self, word: str) -> list[str]:
        """Where the word is."""
        places = {
            "log": self.gateway.log_path.read_bytes(),
            "metrics": scrape(self.metrics).text.encode(),
            **{f"spans {number}": body for number, body in enumerate(self.collector.bodies)},
            **{str(file): file.read_bytes() for file in self.files.rglob("*") if file.is_file()},
        }
        return [place for place, content in places.items() if word.encode() in content]


@pytest.fixture(scope="module")
def watched(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    path, metrics = tmp_path_factory.mktemp("watched"), free_port()
    with collecting() as collector:
        settings = {
            "STACK_LOG_LEVEL": "DEBUG",
            "STACK_LOG_LEVELS": "httpx=DEBUG,sqlalchemy.engine=DEBUG,asyncio=DEBUG,request=DEBUG",
            "STACK_METRICS_BIND": f"127.0.0.1:{metrics}",
            "STACK_DATA_DIR": str(path / "data"),
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        }
        with running_gateway(path / "log", engine.url, **settings) as gateway:
            yield Watched(gateway, metrics, collector, path / "data")


@pytest.mark.parametrize("case", SENT)
def test_what_is_said_is_nowhere_but_in_the_answer(watched: Watched, case: str) -> None:
    path, body = SENT[case]
    with watched.gateway.client() as client:
        content = {"content": body} if isinstance(body, str) else {"json": body}
        answer = post(client, path, headers=HEADERS, **content)
    spans = watched.collector.of(answer.headers["x-request-id"])
    watched.gateway.lines(answer.headers["x-request-id"])
    assert spans
    assert watched.found(WORD) == []
    assert watched.found(OTHER) == []


def test_keys_are_nowhere(watched: Watched) -> None:
    wrong = "sk-canary-key-0123456789"
    for key in (wrong, KEY):
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"authorization": f"Basic {key}"}):
            answer = httpx.post(watched.gateway.url + CHAT, json={"messages": USER}, headers=JSON | headers)
            watched.collector.of(answer.headers["x-request-id"])
    answer = httpx.get(f"{watched.gateway.url}/v1/models?key={wrong}", headers=AUTH)
    watched.collector.of(answer.headers["x-request-id"])
    assert watched.found(wrong) == []
    assert watched.found(KEY) == []
