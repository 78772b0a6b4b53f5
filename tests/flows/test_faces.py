"""What each translated API shares with chat completions: keys, limits, errors, counts, resume, records."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.command import Command
from tests.support.face_setting import Setting
from tests.support.faces import APIS, MESSAGES_API, RESPONSES, Api, script, seen, whole_script
from tests.support.processes import (
    KEY,
    NO_TLS,
    post,
    scrape,
    wait_for,
)
from tests.support.rows import Rows

SECOND = "sk-second-0123456789abcdef"
BOTH = pytest.mark.parametrize("api", APIS.values(), ids=APIS)

# -- keys -------------------------------------------------------------------------------------------------------------

SENT: dict[str, tuple[dict[str, str], int]] = {
    "authorization": ({"authorization": f"Bearer {KEY}"}, 200),
    "x-api-key": ({"x-api-key": KEY}, 200),
    "both the same": ({"authorization": f"Bearer {KEY}", "x-api-key": KEY}, 200),
    "a wrong key beside a right one": ({"authorization": f"Bearer {KEY}", "x-api-key": "wrong"}, 200),
    "a right key beside a wrong one": ({"authorization": "Bearer wrong", "x-api-key": KEY}, 200),
    "another scheme beside a key": ({"authorization": "Basic eDp5", "x-api-key": KEY}, 200),
    "two wrong ones": ({"authorization": "Bearer wrong", "x-api-key": "wrong-too"}, 401),
    "a wrong x-api-key": ({"x-api-key": "wrong"}, 401),
    "none": ({}, 401),
}


@pytest.mark.parametrize("sent", SENT)
def test_either_header_has_the_key_on_every_path(faced: Setting, sent: str) -> None:
    headers, status = SENT[sent]
    with httpx.Client(base_url=faced.gateway.url, headers=headers, verify=NO_TLS) as client:
        chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        models = client.get("/v1/models")
        answers = [client.post(it.path, json=it.body()) for it in APIS.values()]
    assert {it.status_code for it in (chat, models, *answers)} == {status}


def test_of_two_valid_keys_the_one_in_authorization_counts(faced: Setting) -> None:
    ids = {}
    for name, headers in {
        "first": {"authorization": f"Bearer {KEY}"},
        "second": {"authorization": f"Bearer {SECOND}"},
        "both": {"authorization": f"Bearer {KEY}", "x-api-key": SECOND},
    }.items():
        with httpx.Client(base_url=faced.gateway.url, headers=headers, verify=NO_TLS) as client:
            answer = client.post("/v1/messages", json=MESSAGES_API.body())
        ids[name] = faced.gateway.lines(answer.headers["request-id"])[0]["key"]
    assert ids["both"] == ids["first"] != ids["second"]


@pytest.mark.parametrize("how", ["disable", "delete"])
def test_a_revoked_key_has_one_fate_in_whichever_header_it_comes(faced: Setting, how: str) -> None:
    """Beside itself or a wrong key it stays refused, on every path. Only a key in force is accepted beside it."""
    stack = Command(STACK_DATA_DIR=str(faced.data))
    made = stack.json("keys", "create", f"to {how}")
    gone, key_id = made["secret"], made["key"]["id"]

    def fates(authorization: str | None, other: str | None) -> set[int]:
        sent = {"authorization": f"Bearer {authorization}" if authorization else None, "x-api-key": other}
        headers = {name: value for name, value in sent.items() if value}
        with httpx.Client(base_url=faced.gateway.url, headers=headers, verify=NO_TLS) as client:
            calls = [("GET", "/v1/models?limit=1000", None)]
            calls.append(("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}))
            calls += [("POST", it.path, it.body(stream=stream)) for it in APIS.values() for stream in (False, True)]
            with ThreadPoolExecutor(len(calls)) as pool:
                return {it.status_code for it in pool.map(lambda it: client.request(*it[:2], json=it[2]), calls)}

    assert fates(gone, gone) == {200}
    stack("keys", how, key_id, *(["--yes"] if how == "delete" else []))
    wait_for(lambda: fates(gone, None) == {401})
    refused = (gone, None), (None, gone), (gone, gone), (gone, "wrong"), ("wrong", gone), (gone, "sk-" + gone)
    accepted = (gone, KEY), (KEY, gone), (gone, SECOND)
    expected = {pair: {401 if pair in refused else 200} for pair in refused + accepted}
    # At the same time, because an unknown key is looked up twice a second at most.
    with ThreadPoolExecutor(len(expected)) as pool:
        assert dict(zip(expected, pool.map(lambda pair: fates(*pair), expected), strict=True)) == expected


def test_no_key_is_in_the_log(faced: Setting) -> None:
    secret = "sk-wrong-0123456789abcdef0123"
    with httpx.Client(base_url=faced.gateway.url, headers={"x-api-key": secret}, verify=NO_TLS) as client:
        refused = client.post("/v1/messages", json=MESSAGES_API.body())
    faced.gateway.lines(refused.headers["request-id"])
    text = faced.gateway.log_path.read_text()
    assert secret not in text
    assert KEY not in text


# -- counts -----------------------------------------------------------------------------------------------------------


@BOTH
def test_a_count_that_no_engine_makes_is_an_estimate(faced: Setting, api: Api) -> None:
    body = {name: value for name, value in api.body("x" * 400).items() if name != "max_tokens"}
    answer = faced.client.post(api.counts, json=body)
    assert (answer.status_code, answer.headers["x-stack-counted-by"]) == (200, "estimate")
    assert 50 < answer.json()["input_tokens"] < 400


@BOTH
def test_a_wrong_count_has_the_form_of_its_api(faced: Setting, api: Api) -> None:
    answer = faced.client.post(api.counts, json={"model": "fake-model"})
    assert answer.status_code == 400
    api.error(answer.json())


# -- records ----------------------------------------------------------------------------------------------------------


@BOTH
def test_log_usage_and_metrics_name_the_api(faced: Setting, api: Api) -> None:
    before = scrape(faced.metrics).total("stack_requests_total", api=api.name, outcome="finished")
    answer = faced.ask(api)
    request_id = answer.headers["x-request-id"]
    lines = faced.gateway.lines(request_id)
    assert [(it["msg"], it.get("api")) for it in lines] == [
        ("chat_started", api.name),
        ("chat_finished", api.name),
        ("request", None),
    ]
    rows = Rows({"STACK_DATA_DIR": str(faced.data)})
    row = rows.of(request_id)
    sums = {it["api"]: it["requests"] for it in rows.book.totals(["api"], 0, row["at"] + 1)}
    rows.close()
    assert sums[api.name] >= 1
    assert (row["api"], row["kind"], row["outcome"]) == (api.name, "chat", "finished")
    wait_for(
        lambda: scrape(faced.metrics).total("stack_requests_total", api=api.name, outcome="finished") == before + 1
    )


def test_a_client_that_hangs_up_at_the_last_event_has_a_whole_answer(faced: Setting, mark: str) -> None:
    """As Codex does, within 10 ms of `response.completed`, without reading the body's end."""
    body = json.dumps(RESPONSES.body(whole_script(), stream=True)).encode()
    head = (
        f"POST /v1/responses HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\nx-request-id: {mark}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", faced.gateway.port)) as raw:
        raw.sendall(head.encode() + body)
        got = b""
        while b"event: response.completed" not in got:
            got += raw.recv(1 << 16)
    lines = faced.gateway.lines(mark)
    assert [(it["msg"], it.get("outcome"), it.get("status")) for it in lines[1:]] == [
        ("chat_finished_stream", "finished", None),
        ("request", None, 200),
    ]


@BOTH
def test_a_client_that_leaves_stops_the_engine(faced: Setting, api: Api, mark: str) -> None:
    text = script(["role"], ["token", mark], ["gate", mark])
    with faced.client.stream("POST", api.path, json=api.body(text, stream=True)) as answer:
        wait_for(lambda: seen(faced.one, mark))
        next(answer.iter_raw())
    wait_for(lambda: seen(faced.one, mark)[-1]["state"] == "hung_up")


# -- the rest ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_an_idempotency_key_gives_the_same_answer(faced: Setting, api: Api, mark: str, stream: bool) -> None:
    headers = {"idempotency-key": mark}
    body = api.body(mark, stream=stream)
    first, second = (post(faced.client, api.path, json=body, headers=headers) for _ in range(2))
    assert first.text == second.text
    assert second.headers["idempotent-replayed"] == "true"
    assert len(seen(faced.one, mark)) == 1
    other = faced.client.post(api.path, json=api.body(mark + "!"), headers=headers)
    assert other.status_code == 409
    api.error(other.json())


@BOTH
def test_strict_mode_refuses_what_would_be_ignored(faced: Setting, api: Api) -> None:
    fields = {"tools": [{"type": "web_search"}]} if api is RESPONSES else {"thinking": {"type": "adaptive", "x": 1}}
    plain = faced.ask(api, **fields)
    assert plain.status_code == 200
    ignored = plain.headers["x-stack-ignored-params"]
    strict = faced.client.post(api.path, json=api.body(**fields), headers={"x-stack-strict": "true"})
    assert strict.status_code == 400
    assert ignored.split(",")[0] in strict.text


@pytest.mark.parametrize("path", [it.path for it in APIS.values()])
def test_a_web_page_may_call_them_with_their_clients_headers(faced: Setting, path: str) -> None:
    wanted = "x-api-key,anthropic-version,anthropic-beta,x-stainless-lang,idempotency-key,content-type"
    headers = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": wanted,
        "access-control-request-private-network": "true",
    }
    answer = faced.client.options(path, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert set(wanted.split(",")) <= set(answer.headers["access-control-allow-headers"].split(", ")[0].split(","))
    told = faced.client.post(path, json={}, headers={"origin": "https://app.example"})
    assert "request-id" in told.headers["access-control-expose-headers"]


def test_the_documentation_lists_them(faced: Setting) -> None:
    document = faced.client.get("/openapi.json").json()
    paths = document["paths"]
    assert {it for api in APIS.values() for it in (api.path, api.counts)} <= paths.keys()
    shape = paths["/v1/messages"]["post"]["responses"]["429"]["content"]["application/json"]["schema"]["$ref"]
    assert shape.endswith("/MessageErrorEnvelope")
    assert "unless `store` is false" in paths["/v1/responses"]["post"]["description"]
    assert {"store", "previous_response_id"} <= document["components"]["schemas"]["ResponseRequest"][
        "properties"
    ].keys()
