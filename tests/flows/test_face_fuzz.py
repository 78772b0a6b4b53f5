"""The translated APIs with unusual input: any JSON, and a real client's request with any one value replaced."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.any_json import JSON, written
from tests.support.faces import APIS, MESSAGES_API, RESPONSES, Api
from tests.support.processes import GatewayProcess
from tests.support.recorded import posted

BOUNDED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BIG = st.integers(2**63, 2**70) | st.integers(-(2**70), -(2**63))
VALUE = JSON | BIG | st.lists(BIG, max_size=2) | st.dictionaries(st.text(max_size=8), BIG, max_size=2)
SENT: dict[str, list[dict[str, Any]]] = {
    "responses": [it.body for it in posted("/v1/responses")],
    "messages": [it.body for it in (*posted("/v1/messages"), *posted("/v1/messages/count_tokens"))],
}
ANY_API = st.sampled_from(list(APIS.values()))


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client


def ask(client: httpx.Client, api: Api, content: bytes) -> None:
    for path in (api.path, api.counts):
        answer = client.post(path, content=content)
        honest = answer.status_code == 502 and "use a larger model" in answer.text  # the fake engine makes none
        assert answer.status_code == 200 or 400 <= answer.status_code < 500 or honest, (answer.status_code, answer.text)
        if answer.status_code != 200:
            api.error(answer.json())


@given(api=ANY_API, value=VALUE)
@BOUNDED
def test_any_json(client: httpx.Client, api: Api, value: Any) -> None:
    ask(client, api, written(value))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


@given(api=st.sampled_from([RESPONSES, MESSAGES_API]), data=st.data())
@BOUNDED
def test_a_real_request_with_one_value_replaced(client: httpx.Client, api: Api, data: st.DataObject) -> None:
    body = copy.deepcopy(data.draw(st.sampled_from(SENT[api.name]))) | {"model": "fake-model"}
    *path, last = data.draw(st.sampled_from(list(places(body))))
    inner: Any = body
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(VALUE)
    ask(client, api, json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass"))
