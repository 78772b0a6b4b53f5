"""Rerank: documents are ordered by an engine that ranks, and a model without one gives a 404."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import (
    NO_TLS,
    FakeEngine,
    GatewayProcess,
    fake_engine,
    free_port,
    running_gateway,
    scrape,
    wait_for,
)

DOCUMENTS = ["a b", "a longer one", "x"]


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


def ask(http: httpx.Client, model: str, path: str = "/v1/rerank", **said: Any) -> httpx.Response:
    return http.post(path, json={"model": model, "query": "which one", "documents": DOCUMENTS} | said)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
@pytest.mark.parametrize("engine", ["vllm", "llamacpp"])
def test_an_engine_that_ranks_answers_on_every_path(
    http: httpx.Client, before_all: GatewayProcess, fakes: dict[str, FakeEngine], engine: str, path: str
) -> None:
    fakes[engine].set()
    answer = ask(http, engine, path, top_n=2, return_documents=False)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert [it["index"] for it in told["results"]] == [1, 0]
    assert [it["relevance_score"] for it in told["results"]] == [0.12, 0.03]
    (seen,) = fakes[engine].asked("/v1/rerank")
    assert (seen["body"]["model"], seen["body"]["documents"]) == ("fake-model", DOCUMENTS)
    assert answer.headers["x-stack-ignored-params"] == "return_documents"
    lines = {it["msg"]: it for it in before_all.lines(answer.headers["x-request-id"])}
    assert (lines["rerank_started"]["n_documents"], lines["rerank_started"]["api"]) == (3, "rerank")
    assert lines["rerank_finished"]["tokens_in"] == told["usage"]["prompt_tokens"] == 12


def test_a_document_may_be_an_object_with_a_text(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["vllm"].set()
    assert ask(http, "vllm", documents=[{"text": "a"}, "b c"]).status_code == 200
    (seen,) = fakes["vllm"].asked("/v1/rerank")
    assert seen["body"]["documents"] == ["a", "b c"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_without_an_engine_that_ranks_it_is_a_404_and_no_engine_is_asked(
    http: httpx.Client, fakes: dict[str, FakeEngine], path: str
) -> None:
    fakes["ollama"].set()
    answer = ask(http, "ollama", path)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "unsupported")
    assert "/v1/rerank" in error["message"]
    assert fakes["ollama"].asked("/v1/rerank") == []


def test_only_an_engine_that_ranks_is_asked(http: httpx.Client, fakes: dict[str, FakeEngine]) -> None:
    fakes["vllm"].set()
    assert ask(http, "ollama-then-vllm").status_code == 200
    assert len(fakes["vllm"].asked("/v1/rerank")) == 1


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"query": None}, "query"),
    ({"query": ""}, "query"),
    ({"query": ["a"]}, "query"),
    ({"documents": None}, "documents"),
    ({"documents": []}, "documents"),
    ({"documents": "one"}, "documents"),
    ({"documents": {"content": []}}, "documents"),
    ({"documents": ["a", 3]}, "documents[1]"),
    ({"documents": [[1, 2]]}, "documents[0]"),
    ({"documents": [{"image_url": {"url": "http://10.0.0.1/"}}]}, "documents[0]"),
    ({"documents": [{"text": "x", "image": "y"}]}, "documents[0]"),
    ({"documents": ["x"] * 2049}, "documents"),
    ({"top_n": 0}, "top_n"),
    ({"top_n": -1}, "top_n"),
    ({"top_n": 1.5}, "top_n"),
    ({"top_n": True}, "top_n"),
]


@pytest.mark.parametrize(("said", "param"), WRONG, ids=[str(it[0])[:50] for it in WRONG])
@pytest.mark.parametrize("engine", ["vllm", "llamacpp"])
def test_a_wrong_field_is_named(http: httpx.Client, engine: str, said: dict[str, Any], param: str) -> None:
    answer = ask(http, engine, **said)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_model_that_cannot_rank_is_told_in_our_words(tmp_path: Path) -> None:
    """llama.cpp answers like this unless it was started for ranking."""
    said = {"error": {"code": 501, "message": "This server does not support reranking. Start it with `--reranking`"}}
    with (
        fake_engine() as engine,
        running_gateway(tmp_path / "log", engine.url, LLM_BACKEND="llamacpp", STACK_WORKERS="1") as gateway,
        gateway.client() as http,
    ):
        answer = ask(http, "fake-model", script=[["json", [501, said]]])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported")
    assert answer.json()["error"]["message"] == "The model behind this name does not rank documents."


def test_documents_are_counted(fakes: dict[str, FakeEngine], tmp_path: Path) -> None:
    port = free_port()
    settings = {"STACK_METRICS_BIND": f"127.0.0.1:{port}", "STACK_ADMIN_KEYS": "sk-admin-0123456789abcdef"}
    with running_gateway(tmp_path / "log", fakes["vllm"].url, **settings) as gateway, gateway.client() as http:
        for size in (3, 1):
            assert ask(http, "fake-model", documents=DOCUMENTS[:size]).status_code == 200
        assert http.post("/v1/embeddings", json={"input": ["a", "b"]}).status_code == 200
        assert ask(http, "fake-model", documents=[]).status_code == 400
        assert scrape(port).by("stack_documents_total", "api") == {"rerank": 4.0}
        found = rows(gateway)
    assert found["rerank"]["documents"] == 4
    assert found["rerank"]["requests"] == 2
    assert found["embeddings"]["documents"] == 0


def rows(gateway: GatewayProcess) -> dict[str, dict[str, Any]]:
    """The usage by API, once all three requests are in it."""
    headers = {"authorization": "Bearer sk-admin-0123456789abcdef"}

    def look() -> dict[str, dict[str, Any]]:
        told = httpx.get(gateway.url + "/admin/usage?by=api", headers=headers, verify=NO_TLS).json()["data"]
        return {it["api"]: it for it in told} if sum(it["requests"] for it in told) == 3 else {}

    return wait_for(look, deadline=10)
