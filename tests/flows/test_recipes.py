"""The recipes in ARCHITECTURE.md are complete: a real gateway process serves an engine and an endpoint that are added
to a copy of the gateway exactly as they say."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import MESSAGES, ROOT, FakeEngine, GatewayProcess, fake_engine, running_gateway

SCHEMA = '''
class JudgeRequest(_Open):
    model: str | None = None
    question: str
    texts: list[str]


class Verdicts(_Open):
    results: list[dict[str, Any]]


def judge(body: JudgeRequest) -> None:
    """Judge texts by how well they answer a question."""


SCHEMAS["judge"] = Schema(judge, Verdicts)
'''
ROW = """_JUDGE = Endpoint(
    kind="judge",
    api="judge",
    path="/v1/judge",
    asks="judge",
    content="texts",
    rendered=("question",),
    counted="inputs",
    logged_as="n_texts",
    schema="judge",
)
ROWS: tuple[Endpoint, ...] = (_JUDGE, """
WAYS = """_JUDGE = Ways(parameters=uses(taken="model question texts", ignored="top_n"), count=uncounted)

VLLM = """


FOLDERS = ("gateway", "tests", "scripts", "engine", "docs", "config", "bench")
FILES = [
    *(it.name for it in ROOT.iterdir()),
    *(str(it.relative_to(ROOT)) for at in FOLDERS for it in (ROOT / at).rglob("*.*")),
]
MAPS = [ROOT / "ARCHITECTURE.md", *sorted(ROOT.glob("gateway/*/README.md"))]


def put(file: Path, old: str, new: str) -> None:
    """Replace the one place in a file that has this text."""
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} in {file.name}"
    file.write_text(text.replace(old, new))


def add_engine(gateway: Path) -> None:
    shutil.copy(ROOT / "tests/support/fakes/parrot.py", gateway / "dialects/parrot.py")
    registry = gateway / "dialects/__init__.py"
    put(registry, "import OLLAMA\n", "import OLLAMA\nfrom gateway.dialects.parrot import PARROT\n")
    put(registry, "ALL = (OLLAMA, VLLM, LLAMACPP)", "ALL = (OLLAMA, VLLM, LLAMACPP, PARROT)")


def add_endpoint(gateway: Path) -> None:
    put(gateway / "endpoints.py", "ROWS: tuple[Endpoint, ...] = (", ROW)
    with (gateway / "api/openapi.py").open("a") as schema:
        schema.write(SCHEMA)
    for name in ("ollama", "llamacpp", "parrot"):
        put(gateway / f"dialects/{name}.py", "endpoints={", 'endpoints={"judge": None, ')
    put(gateway / "dialects/vllm.py", "endpoints={", 'endpoints={"judge": _JUDGE, ')
    put(gateway / "dialects/vllm.py", "VLLM = ", WAYS)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the gateway, with a fourth engine and a fourth endpoint."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "gateway", tree / "gateway", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "tests").mkdir()
    shutil.copy(ROOT / "tests/test_dialects.py", tree / "tests")
    add_engine(tree / "gateway")
    add_endpoint(tree / "gateway")
    return tree


CONFIG = """
engines:
  parrot: {{dialect: parrot, base_url: "{parrot}"}}
  vllm: {{dialect: vllm, base_url: "{vllm}"}}
models:
  parrot: {{targets: [{{engine: parrot, model: polly}}]}}
  vllm: {{targets: [{{engine: vllm, model: fake-model}}]}}
default_model: parrot
"""


@pytest.fixture(scope="module")
def parrot() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def vllm() -> Iterator[FakeEngine]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def grown(tree: Path, parrot: FakeEngine, vllm: FakeEngine) -> Iterator[GatewayProcess]:
    file = tree / "stack.yaml"
    file.write_text(CONFIG.format(parrot=parrot.url, vllm=vllm.url))
    with running_gateway(
        tree / "log", parrot.url, tree=tree, LLM_BACKEND="parrot", STACK_CONFIG=str(file), STACK_WORKERS="1"
    ) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def http(grown: GatewayProcess) -> Iterator[httpx.Client]:
    with grown.client() as client:
        yield client


def chat(http: httpx.Client, mark: str, **said: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": "parrot", "messages": MESSAGES, "user": mark} | said)


def python(tree: Path, code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_recipes_name_every_file_that_was_touched(tree: Path) -> None:
    recipes = (ROOT / "ARCHITECTURE.md").read_text().partition("## How to change things")[2]
    changed = [
        str(it.relative_to(tree))
        for it in (tree / "gateway").rglob("*.py")
        if not (known := ROOT / it.relative_to(tree)).exists() or known.read_text() != it.read_text()
    ]
    named = re.findall(r"`(gateway/[\w/.<>]+)`", recipes)
    assert "gateway/dialects/parrot.py" in changed
    engines = {f"gateway/dialects/{it}.py" for it in ("parrot", "ollama", "vllm", "llamacpp")}
    assert {"gateway/dialects/<name>.py" if it in engines else it for it in changed} <= set(named)


@pytest.mark.parametrize("page", MAPS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_map_names_exists(page: Path) -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|sql|md|yaml|sh|toml|tsv))`", page.read_text()))
    assert [it for it in sorted(named) if not any(f"/{file}".endswith(f"/{it}") for file in FILES)] == []


def test_an_engine_that_lacks_the_new_endpoint_is_reported(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "gateway", tmp_path / "gateway", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tree / "tests", tmp_path / "tests")
    put(tmp_path / "gateway/dialects/parrot.py", '"judge": None, ', "")
    found = python(tmp_path, "from tests.test_dialects import gaps; print(gaps())")
    assert found == "[\"parrot: it knows no endpoint 'judge'\"]"


def test_a_text_that_no_estimate_counts_is_reported(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "gateway", tmp_path / "gateway", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tree / "tests", tmp_path / "tests")
    put(tmp_path / "gateway/endpoints.py", '    rendered=("question",),\n', "")
    (found,) = ast.literal_eval(python(tmp_path, "from tests.test_dialects import gaps; print(gaps())"))
    assert found.startswith("judge: no estimate counts 'question'")


def test_the_recipes_leave_no_gap_in_the_engines_tables(tree: Path) -> None:
    assert python(tree, "from tests.test_dialects import gaps; print(gaps())") == "[]"


def test_a_new_engine_has_its_own_defaults(tree: Path) -> None:
    code = "from gateway.settings import EngineSettings as It; it = It(llm_backend='parrot')"
    assert python(tree, f"{code}; print(it.llm_base_url, it.llm_model)") == "http://127.0.0.1:7777/v1 polly"


def test_a_new_engine_answers_and_gets_what_its_file_says(http: httpx.Client, parrot: FakeEngine, mark: str) -> None:
    answer = chat(
        http, mark, messages=[{"role": "developer", "content": "x"}], max_completion_tokens=5, seed=7, volume=11
    )
    (seen,) = parrot.seen(mark)
    assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "one two three")
    assert answer.headers["x-stack-ignored-params"] == "seed,user"
    body = seen["body"]
    assert body["messages"] == [{"role": "system", "content": "x"}]
    assert (body["max_tokens"], body["volume"], body["model"]) == (5, 11, "polly")
    assert "max_completion_tokens" not in body


def test_a_new_engines_stream_passes(http: httpx.Client, mark: str) -> None:
    answer = chat(http, mark, stream=True)
    assert (answer.status_code, answer.text.rstrip().endswith("data: [DONE]")) == (200, True)


def test_a_new_engines_control_field_is_refused_for_all(http: httpx.Client, mark: str) -> None:
    for model in ("parrot", "vllm"):
        refused = chat(http, mark, model=model, perch="high")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "perch")


def test_a_part_that_a_new_engine_refuses_is_refused_by_name(http: httpx.Client, mark: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    refused = chat(http, mark, messages=[{"role": "user", "content": parts}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages[0].content[0].type")


def test_a_new_engines_words_tell_whose_fault_an_error_is(http: httpx.Client, mark: str) -> None:
    squawk = {"error": {"message": "Squawk: no such word.", "type": "x"}}
    error = chat(http, mark, script=[["json", [500, squawk]]])
    assert (error.status_code, error.json()["error"]["message"]) == (400, "The parrot does not repeat that.")
    long = {"error": {"message": "I am out of breath.", "type": "x"}}
    error = chat(http, mark, script=[["json", [400, long]]])
    assert (error.status_code, error.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_an_endpoint_that_an_engine_has_not_is_refused_before_it_is_asked(
    http: httpx.Client, parrot: FakeEngine, mark: str
) -> None:
    for path, content in (("/v1/embeddings", {"input": "x"}), ("/v1/judge", {"texts": ["a"]})):
        refused = http.post(path, json={"model": "parrot", "user": mark} | content)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (404, "unsupported")
        assert path in error["message"]
    assert parrot.seen(mark) == []


def rank(http: httpx.Client, mark: str, texts: Any) -> httpx.Response:
    ranking = {"results": [{"index": 1}, {"index": 0}], "usage": {"prompt_tokens": 5, "total_tokens": 5}}
    said = {"model": "vllm", "question": "q", "texts": texts, "user": mark, "top_n": 1, "stream": True}
    return http.post("/v1/judge", json=said | {"script": [["json", [200, ranking]]]})


def test_a_new_endpoint_is_relayed_counted_and_logged(
    grown: GatewayProcess, http: httpx.Client, vllm: FakeEngine, mark: str
) -> None:
    answer = rank(http, mark, ["a", "b"])
    (seen,) = vllm.seen(mark)
    assert (answer.status_code, [it["index"] for it in answer.json()["results"]]) == (200, [1, 0])
    assert (seen["path"], seen["body"]["texts"]) == ("/v1/judge", ["a", "b"])
    assert answer.headers["x-stack-ignored-params"] == "top_n"
    lines = {it["msg"]: it for it in grown.lines(answer.headers["x-request-id"])}
    assert lines["judge_started"]["n_texts"] == 2
    assert (lines["judge_finished"]["tokens_in"], lines["judge_finished"]["outcome"]) == (5, "finished")


def test_a_new_endpoints_content_is_checked(http: httpx.Client, mark: str) -> None:
    for texts in (None, 3, ["x"] * 2049):
        refused = rank(http, mark, texts)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "texts")


def test_a_new_endpoint_is_in_the_schema_and_takes_post_alone(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    body = schema["paths"]["/v1/judge"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/JudgeRequest"}
    assert http.get("/v1/judge").status_code == 405
