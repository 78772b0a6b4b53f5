"""One model, however it is spelled: for Ollama a tag, capitals and the library's own prefixes make no other one."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.upstream.model_names import canonical
from tests.support.processes import MESSAGES, FakeEngine, fake_engine, running_gateway

CHAT = "/v1/chat/completions"
SAME = ["small", "small:latest", "SMALL", "Small:Latest", "library/small", "registry.ollama.ai/library/small:latest"]
OTHERS = ["small:v9", "smal", "other/small", "hf.co/library/small", "small:", ":small", "small/", "../small", ""]


@pytest.mark.parametrize("dialect", ["vllm", "llamacpp"])
def test_other_engines_names_are_compared_letter_by_letter(dialect: str) -> None:
    assert len({canonical(dialect, name) for name in SAME}) == len(SAME)


@pytest.mark.parametrize(
    ("name", "spelling"),
    {
        "qwen3": "registry.ollama.ai/library/qwen3:latest",
        "qwen3:8B": "registry.ollama.ai/library/qwen3:8b",
        "me/Mine": "registry.ollama.ai/me/mine:latest",
        "hf.co/bartowski/Llama-3.2-1B-GGUF:Q4_K_M": "hf.co/bartowski/llama-3.2-1b-gguf:q4_k_m",
        "https://hf.co/a/b": "hf.co/a/b:latest",
        "localhost:5000/a/b": "localhost:5000/a/b:latest",
        "localhost:5000/a/b:c": "localhost:5000/a/b:c",
    }.items(),
)
def test_an_ollamas_names_have_one_spelling(name: str, spelling: str) -> None:
    assert canonical("ollama", name) == canonical("ollama", spelling) == spelling


@pytest.fixture(scope="module")
def ollama() -> Iterator[FakeEngine]:
    with fake_engine(dialect="ollama") as engine:
        yield engine


@pytest.fixture(scope="module", params=["small", "small:latest"])
def http(
    ollama: FakeEngine, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[httpx.Client]:
    """A gateway whose LLM_MODEL is written so; the engine lists `small:latest`."""
    settings = {"LLM_BACKEND": "ollama", "LLM_MODEL": request.param, "STACK_WORKERS": "1"}
    log = tmp_path_factory.mktemp("names") / "log"
    with running_gateway(log, ollama.url, **settings) as gateway, gateway.client() as client:
        client.headers["x-llm-model"] = request.param
        yield client


def test_a_model_with_several_spellings_is_ready_and_listed_once(http: httpx.Client) -> None:
    ours = http.headers["x-llm-model"]
    assert http.get("/readyz").status_code == 200, http.get("/readyz").text
    listed = [it["id"] for it in http.get("/v1/models").json()["data"]]
    assert [it for it in listed if it in SAME] == [ours]
    assert len(listed) == len(set(listed))
    for name in SAME:
        assert http.get(f"/v1/models/{name}").json()["id"] == name


@pytest.mark.parametrize("name", SAME)
def test_every_spelling_is_answered_by_the_one_model(http: httpx.Client, ollama: FakeEngine, name: str) -> None:
    ollama.set()
    answer = http.post(CHAT, json={"messages": MESSAGES, "model": name})
    assert answer.status_code == 200, answer.text
    assert [it["body"]["model"] for it in ollama.asked(CHAT)] == [http.headers["x-llm-model"]]


def test_a_model_that_is_only_listed_is_asked_by_the_engines_own_name(http: httpx.Client, ollama: FakeEngine) -> None:
    ollama.set()
    for name in ("own-system", "OWN-system:latest", "library/own-system"):
        assert http.post(CHAT, json={"messages": MESSAGES, "model": name}).status_code == 200
    assert {it["body"]["model"] for it in ollama.asked(CHAT)} == {"own-system:latest"}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_not_found(http: httpx.Client, ollama: FakeEngine, name: str) -> None:
    ollama.set()
    answer = http.post(CHAT, json={"messages": MESSAGES, "model": name})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404 if name else 400, "model")
    assert ollama.asked(CHAT) == []


CONFIG = """
engines:
  o: {{dialect: ollama, base_url: "{ollama}", slots: 4}}
  v: {{dialect: vllm, base_url: "{vllm}"}}
models:
  fast: {{targets: [{{engine: o, model: small}}]}}
  small: {{targets: [{{engine: o, model: "small:latest"}}], aliases: [Tiny]}}
  fake-model: {{targets: [{{engine: v, model: fake-model}}]}}
default_model: fast
"""


def test_a_configured_name_is_not_matched_by_an_engines_spelling(ollama: FakeEngine, tmp_path: Path) -> None:
    """Only a name that is the engine's own has its other spellings."""
    file = tmp_path / "stack.yaml"
    with fake_engine(dialect="vllm") as vllm:
        file.write_text(CONFIG.format(ollama=ollama.url, vllm=vllm.url))
        with running_gateway(tmp_path / "log", ollama.url, STACK_CONFIG=str(file)) as gateway, gateway.client() as http:
            for name, status in {
                "fast": 200,
                "small": 200,
                "SMALL:latest": 200,
                "Tiny": 200,
                "fast:latest": 404,
                "FAST": 404,
                "tiny": 404,
                "fake-model:latest": 404,
                "FAKE-model": 404,
            }.items():
                assert http.post(CHAT, json={"messages": MESSAGES, "model": name}).status_code == status, name


def test_the_length_of_vllms_context_is_listed(tmp_path: Path) -> None:
    with (
        fake_engine(dialect="vllm") as vllm,
        running_gateway(tmp_path / "log", vllm.url) as gateway,
        gateway.client() as http,
    ):
        assert http.get("/v1/models/fake-model").json()["max_model_len"] == 1000
