"""Redaction: what callers and engines say, and keys, are in no log line, metric, span or page of the console, and in no
file. Bodies that an operator captures are on the page of their request alone, until they are forgotten."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import unescape
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.collector import Collector, collecting
from tests.support.console import Visit, visiting
from tests.support.keys import ADMIN, admin
from tests.support.parameters import form
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
    wait_for,
)

WORD = "canary-e21b"
OTHER = "canary-header"  # of headers, queries and paths
USER = [{"role": "user", "content": WORD}]
TOOL = {"type": "function", "function": {"name": WORD, "description": WORD, "parameters": {"properties": {WORD: {}}}}}
CALL = {"id": WORD, "type": "function", "function": {"name": WORD, "arguments": f'{{"{WORD}": 1}}'}}
ERROR = {"error": {"message": WORD, "type": WORD, "code": WORD, "param": WORD}}
HEADERS = {"user-agent": OTHER, "x-trace": OTHER, "cookie": OTHER, "referer": OTHER, "baggage": f"a={OTHER}"}
CHAT = "/v1/chat/completions"
SOUND = f"{WORD}.wav", f"RIFF {WORD}".encode(), "audio/wav"
# By what is sent: the path and the body. A body of bytes comes with its headers.
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
    "a sound": ("/v1/audio/transcriptions", form({"model": "fake-model", "prompt": WORD, "language": WORD}, SOUND)),
    "a sound with an unknown field": ("/v1/audio/transcriptions", form({"model": "fake-model", WORD: WORD}, SOUND)),
    "a sound for an unknown model": ("/v1/audio/transcriptions", form({"model": WORD}, SOUND)),
    "a broken form": ("/v1/audio/transcriptions", (form({"prompt": WORD}, SOUND)[0][:-9], form({})[1])),
    "a response": (
        "/v1/responses",
        {"model": "fake-model", "input": WORD, "instructions": WORD, "metadata": {WORD: WORD}, "store": False},
    ),
    "a message": ("/v1/messages", {"model": "fake-model", "messages": USER, "system": WORD, "max_tokens": 5}),
    "a count": ("/v1/messages/count_tokens", {"model": "fake-model", "messages": USER, "system": WORD}),
    "nowhere": (f"/v1/nowhere?{OTHER}", {"messages": USER}),
}


# The console's pages that show any request.
PAGES = "now", "now.json", "requests", "keys", "usage", "usage?by=key", "usage?by=model", "usage.csv?by=model"


@dataclass
class Watched:
    gateway: GatewayProcess
    metrics: int
    collector: Collector
    files: Path
    operator: Visit

    def page(self, where: str) -> bytes:
        """A page of the console. Too many of them are refused for a while."""
        answer = wait_for(lambda: it if (it := self.operator.get(f"/console/{where}")).status_code != 429 else None)
        assert answer
        assert answer.status_code in (200, 404), where
        return answer.content

    def found(self, *words: str, pages: Iterable[str] = PAGES) -> list[str]:
        """Where one of the words is: in the log, metrics, spans and files, and in these pages of the console."""
        places = {
            **{f"console/{page}": self.page(page) for page in pages},
            "log": self.gateway.log_path.read_bytes(),
            "metrics": scrape(self.metrics).text.encode(),
            **{f"spans {number}": body for number, body in enumerate(self.collector.bodies)},
            **{str(file): file.read_bytes() for file in self.files.rglob("*") if file.is_file()},
        }
        return [f"{word}: {place}" for place, content in places.items() for word in words if word.encode() in content]


@pytest.fixture(scope="module")
def watched(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    path, metrics = tmp_path_factory.mktemp("watched"), free_port()
    with collecting() as collector:
        settings = {
            "STACK_LOG_LEVEL": "DEBUG",
            "STACK_LOG_LEVELS": "httpx=DEBUG,sqlalchemy.engine=DEBUG,asyncio=DEBUG,request=DEBUG",
            "STACK_METRICS_BIND": f"127.0.0.1:{metrics}",
            "STACK_DATA_DIR": str(path / "data"),
            "STACK_ADMIN_KEYS": ADMIN,
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        }
        with running_gateway(path / "log", engine.url, **settings) as gateway, visiting(gateway) as operator:
            yield Watched(gateway, metrics, collector, path / "data", operator)


def send_all(watched: Watched, key: str) -> dict[str, httpx.Response]:
    """Send each of SENT, wait until everything about them was told, and return the answers."""
    sent = {case: send(watched, *it, key) for case, it in SENT.items()}
    for answer in sent.values():
        assert watched.collector.of(id_of(answer))
        watched.gateway.lines(id_of(answer))
    return sent


def id_of(answer: httpx.Response) -> str:
    return answer.headers["x-request-id"]


def send(watched: Watched, path: str, body: Any, key: str) -> httpx.Response:
    headers = HEADERS | {"authorization": f"Bearer {key}"}
    content: dict[str, Any] = {"json": body}
    if isinstance(body, str):
        content = {"content": body}
    elif isinstance(body, tuple):
        content, headers = {"content": body[0]}, headers | body[1]
    with watched.gateway.client() as client:
        return post(client, path, headers=headers, **content)


def test_what_is_said_is_nowhere_but_in_the_answer(watched: Watched) -> None:
    sent = send_all(watched, KEY)
    pages = {f"requests/{id_of(answer)}": case for case, answer in sent.items()}
    assert watched.found(WORD, OTHER, pages=pages) == [], pages


def test_what_is_captured_is_on_the_page_of_its_request_alone(watched: Watched) -> None:
    with admin(watched.gateway) as api:
        made = api.post("/admin/keys", json={"name": "captured"}).json()
    where, operator = f"/console/keys/{made['key']['id']}", watched.operator
    operator.send(where, f"{where}/capture", capture="yes")
    answers = send_all(watched, made["secret"])
    sent = {case: id_of(answer) for case, answer in answers.items()}
    engaged = {case: it for case, it in sent.items() if any("outcome" in line for line in watched.gateway.lines(it))}
    assert engaged.keys() >= {"a chat", "a stream", "tools", "a broken stream", "a sound", "a response", "a message"}
    for case, request_id in engaged.items():
        page = watched.page(f"requests/{request_id}")
        assert (WORD.encode() in page, OTHER.encode() in page) == (True, False), case
        got = "bytes of audio/" if case == "a speech" else answers[case].text.strip()
        assert got in unescape(page.decode()), case  # also an error
    others = [f"requests/{it}" for case, it in sent.items() if case not in engaged]
    assert watched.found(WORD, OTHER, pages=[*PAGES, *others]) == []
    with visiting(watched.gateway, made["secret"]) as owner:
        for seen, status in (("own", 200), (f"requests/{engaged['a chat']}", 403)):
            answer = owner.get(f"/console/{seen}")
            assert (answer.status_code, WORD in answer.text) == (status, False)
    operator.send(where, f"{where}/capture", capture="no")
    assert watched.found(WORD, OTHER, pages=[f"requests/{it}" for it in sent.values()]) == []


def test_keys_are_nowhere(watched: Watched) -> None:
    wrong = "sk-canary-key-0123456789"
    answers = [httpx.get(f"{watched.gateway.url}/v1/models?key={wrong}", headers=AUTH)]
    ways = ("authorization", "Bearer "), ("x-api-key", ""), ("authorization", "Basic ")
    for key, (header, scheme) in product((wrong, KEY), ways):
        headers = JSON | {header: scheme + key}
        answers += [httpx.post(watched.gateway.url + CHAT, json={"messages": USER}, headers=headers)]
    for answer in answers:
        watched.collector.of(answer.headers["x-request-id"])
    assert watched.found(wrong, KEY) == []
