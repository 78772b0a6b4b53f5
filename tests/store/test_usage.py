"""Usage: one row for each request that an engine was asked, whatever its end, in either database."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import AUTH, KEY, MESSAGES, FakeEngine, GatewayProcess, running_gateway
from tests.store.rows import Rows

CHAT = "/v1/chat/completions"
START = [["role"], ["token", "one"], ["token", " two"]]
FINISH = [["finish", "stop"], ["usage"], ["done"], ["end"]]


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path, store_settings: dict[str, str]) -> Iterator[GatewayProcess]:
    with running_gateway(tmp_path / "log", engine.url, **store_settings) as gateway:
        yield gateway


@pytest.fixture
def rows(store_settings: dict[str, str]) -> Iterator[Rows]:
    rows = Rows(store_settings)
    yield rows
    rows.store.close()


def ask(gateway: GatewayProcess, request_id: str, path: str = CHAT, **fields: Any) -> httpx.Response:
    body = fields if path != CHAT else {"messages": MESSAGES, **fields}
    return httpx.post(gateway.url + path, json=body, headers=AUTH | {"x-request-id": request_id}, timeout=30)


ENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "blocking": (
        {},
        {"outcome": "finished", "status": 200, "tokens_in": 7, "tokens_out": 3, "exact": True, "stream": False},
    ),
    "stream": (
        {"stream": True},
        {"outcome": "finished", "status": 200, "tokens_in": 7, "tokens_out": 3, "exact": True, "stream": True},
    ),
    "cached": (
        {
            "script": [
                [
                    "json",
                    [
                        200,
                        {
                            "choices": [],
                            "usage": {
                                "prompt_tokens": 70,
                                "completion_tokens": 1,
                                "prompt_tokens_details": {"cached_tokens": 64},
                            },
                        },
                    ],
                ]
            ]
        },
        {"tokens_in": 70, "tokens_out": 1, "cached": 64, "exact": True},
    ),
    "no-count": (
        {"script": [["json", [200, {"choices": []}]]]},
        {"outcome": "finished", "tokens_in": 0, "tokens_out": 0, "exact": False},
    ),
    "huge": (
        {"script": [["json", [200, {"choices": [], "usage": {"prompt_tokens": 2**64 - 1, "completion_tokens": -1}}]]]},
        {"outcome": "finished", "status": 200},
    ),
    "broken": (
        {"stream": True, "script": [*START, ["close"]]},
        {"outcome": "engine_broken_stream", "status": 200, "tokens_out": 2, "exact": False},
    ),
    "refused": (
        {"script": [["json", [422, {"error": {"message": "m"}}]]]},
        {"outcome": "engine_refused", "status": 422, "tokens_out": 0, "attempts": 1},
    ),
    "failed": (
        {"script": [["json", [500, {"error": {"message": "CUDA"}}]]]},
        {"outcome": "engine_error", "status": 502},
    ),
}


def test_a_row_for_each_end(gateway: GatewayProcess, rows: Rows) -> None:
    began = time.time_ns() // 1_000_000
    for name, (fields, _) in ENDS.items():
        ask(gateway, name, **fields)
    ask(gateway, "embedding", "/v1/embeddings", input="x")
    ask(gateway, "not-an-exchange", messages=3)
    with (
        gateway.client() as client,
        client.stream(
            "POST",
            CHAT,
            json={"messages": MESSAGES, "stream": True, "script": [*START, ["hang"]]},
            headers={"x-request-id": "left"},
        ) as answer,
    ):
        next(it for it in answer.iter_lines() if "two" in it)
    found = {name: rows.of(name) for name in [*ENDS, "embedding", "left"]}
    for name, (_, expected) in ENDS.items():
        assert expected.items() <= found[name].items(), name
    assert found["failed"]["attempts"] > 1
    left = {"outcome": "client_left", "status": 499, "tokens_out": 2, "exact": False, "kind": "chat", "stream": True}
    assert left.items() <= found["left"].items()
    assert (found["embedding"]["kind"], found["embedding"]["tokens_in"]) == ("embedding", 7)
    for row in found.values():
        assert (row["model"], row["engine"], row["arm"]) == ("fake-model", "engine", None)
        assert began <= row["at"] <= time.time_ns() // 1_000_000
        assert 0 <= row["duration_ms"] < 30_000
        assert (row["ttft_ms"] is not None) == (row["stream"] is True)
        assert len(row["key_id"]) == 8
        assert KEY not in str(row)
    assert len(rows.all()) == len(found)
