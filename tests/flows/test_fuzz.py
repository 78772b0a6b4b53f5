"""The JSON entrance under what no one thought of: any bytes, any JSON, any request with one field replaced. It answers
with 200 or with a 4xx in our envelope; a 5xx is a bug."""

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.any_json import JSON, written
from tests.support.processes import MESSAGES, GatewayProcess

BOUNDED = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PATHS = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
SOUND: dict[str, Any] = {
    "model": "fake-model",
    "messages": MESSAGES,
    "prompt": "x",
    "input": ["x"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 1,
}
PART = st.dictionaries(
    st.sampled_from(["type", "text", "image_url", "input_audio", "file", "url", "data"]), JSON | st.text(), max_size=4
)


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> Any:
    with gateway.client() as client:
        yield client


def ask(client: httpx.Client, path: str, content: bytes) -> None:
    answer = client.post(path, content=content)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@given(path=PATHS, content=st.binary(max_size=200))
@BOUNDED
def test_any_bytes(client: httpx.Client, path: str, content: bytes) -> None:
    ask(client, path, content)


@given(path=PATHS, value=JSON)
@BOUNDED
def test_any_json(client: httpx.Client, path: str, value: Any) -> None:
    ask(client, path, written(value))


@given(path=PATHS, name=st.sampled_from(sorted(SOUND)), value=JSON, cut=st.integers(0, 40))
@BOUNDED
def test_a_sound_request_with_one_field_replaced(
    client: httpx.Client, path: str, name: str, value: Any, cut: int
) -> None:
    content = written(SOUND | {name: value})
    ask(client, path, content)
    ask(client, path, content[: len(content) - cut])


@given(content=st.lists(PART | JSON, max_size=4), role=JSON | st.just("user"))
@BOUNDED
def test_any_parts_of_a_message(client: httpx.Client, content: Any, role: Any) -> None:
    ask(client, "/v1/chat/completions", written({"messages": [{"role": role, "content": content}]}))
