"""Errors of the translated APIs leave in each API's own form, wherever they arise, and name the caller's own fields."""

from typing import Any

import pytest

from tests.support.face_setting import Setting
from tests.support.faces import APIS, MESSAGES_API, RESPONSES, Api, events, script, seen, text_of, whole_script
from tests.support.processes import post, scrape, was_cut

BOTH = pytest.mark.parametrize("api", APIS.values(), ids=APIS)

# -- errors -----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[int, dict[str, Any]]] = {
    "a wrong key": (401, {"headers": {"authorization": "Bearer wrong"}}),
    "another content type": (415, {"headers": {"content-type": "text/plain"}}),
    "a content encoding": (415, {"headers": {"content-encoding": "br"}}),
    "no JSON": (400, {"content": b"{"}),
    "no object": (400, {"content": b"[]"}),
    "too large a body": (413, {"content": b" " * 200_000}),
    "an unknown model": (404, {"model": "nope"}),
    "a dead engine": (503, {"model": "dead", "headers": {"x-stack-resume": "off"}}),  # or it is waited for
    "a name twice": (400, {"content": b'{"model":"a","model":"b"}'}),
}


@BOTH
@pytest.mark.parametrize("case", WRONG)
def test_an_error_has_the_form_of_its_api(faced: Setting, api: Api, case: str) -> None:
    status, how = WRONG[case]
    how = dict(how)
    if "content" not in how:
        how["json"] = api.body(model=how.pop("model", "fake-model"))
    answer = faced.client.post(api.path, **how)
    assert answer.status_code == status
    kind, message = api.error(answer.json())
    assert kind
    assert message
    request_id = answer.headers["x-request-id"]
    if api is MESSAGES_API:
        assert answer.headers["request-id"] == request_id == answer.json()["request_id"]
        assert (answer.headers.get("x-should-retry") == "false") == (status == 401)
    else:
        assert "request-id" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/messages", 405),
        ("DELETE", "/v1/messages", 405),
        ("POST", "/v1/messages/batches", 404),
        ("GET", "/v1/messages/count_tokens", 405),
        ("POST", "/v1/messages/", 404),
    ],
)
def test_a_path_that_is_not_there_is_told_in_anthropics_form(
    faced: Setting, method: str, path: str, status: int
) -> None:
    answer = faced.client.request(method, path)
    assert answer.status_code == status
    MESSAGES_API.error(answer.json())


def test_a_base_url_with_a_slip_is_told_the_right_path(faced: Setting) -> None:
    answer = faced.client.post("/v1/v1/messages", json={})
    assert "Did you mean /v1/messages?" in answer.json()["error"]["message"]
    assert "before /v1" in answer.json()["error"]["message"]


def test_a_refusal_of_the_protocol_has_anthropics_form(faced: Setting) -> None:
    answer = faced.client.post("/v1/messages", json=MESSAGES_API.body(), headers={"host": "evil.example"})
    assert answer.status_code == 400
    MESSAGES_API.error(answer.json())


SMUGGLED: dict[str, dict[str, Any]] = {
    "a field that steers the engine": {"priority": -1},
    "a chat template": {"chat_template": "{{ 1 }}"},
    "another caller's request": {"request_id": "x"},
}


@pytest.mark.parametrize("case", SMUGGLED)
def test_no_api_is_a_way_around_the_guard(faced: Setting, mark: str, case: str) -> None:
    """Responses passes an engine's own fields on, as chat completions do. Messages names them as ignored."""
    field = next(iter(SMUGGLED[case]))
    refused = faced.ask(RESPONSES, mark, **SMUGGLED[case])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    passed = faced.ask(MESSAGES_API, mark, **SMUGGLED[case])
    assert (passed.status_code, passed.headers["x-stack-ignored-params"]) == (200, field)
    assert [field in it["body"] for it in seen(faced.one, mark)] == [False]


TOLD: dict[str, tuple[Api, dict[str, Any], str]] = {
    "too long a schema of an answer": (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"pattern": "(" * 70_000}}}},
        "text.format",
    ),
    "too many log probabilities": (RESPONSES, {"top_logprobs": 99}, "top_logprobs"),
}


@pytest.mark.parametrize("case", TOLD)
def test_an_error_about_the_chat_completion_names_the_callers_field(faced: Setting, case: str) -> None:
    api, fields, param = TOLD[case]
    answer = faced.ask(api, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


REFUSALS = {
    "messages": {"responses": "input", "messages": "messages"},
    "tools": {"responses": "tools", "messages": "tools"},
    "max_tokens": {"responses": "max_output_tokens", "messages": "max_tokens"},
    "response_format": {"responses": "text.format", "messages": "output_config.format"},
    "tool_choice": {"responses": "tool_choice", "messages": "tool_choice"},
}


@BOTH
@pytest.mark.parametrize("param", REFUSALS)
def test_an_engines_refusal_names_the_callers_field(faced: Setting, api: Api, param: str) -> None:
    error = {"message": "It is wrong.", "type": "invalid_request_error", "param": param, "code": None}
    answer = faced.ask(api, script(["json", [400, {"error": error}]]))
    assert answer.status_code == 400
    told = REFUSALS[param][api.name]
    if api is RESPONSES:
        assert answer.json()["error"]["param"] == told
    else:
        assert answer.json()["error"]["message"] == f"{told}: It is wrong."


# -- streams that fail ------------------------------------------------------------------------------------------------


NO_WAIT = {"x-stack-resume": "off"}  # for an engine that is down


def test_a_streamed_response_without_an_engine_is_a_stream_that_says_so(faced: Setting) -> None:
    """Codex retries 30 times after a 5xx, and waits as long as it is told after this."""
    answer = post(faced.client, RESPONSES.path, json=RESPONSES.body(model="dead", stream=True), headers=NO_WAIT)
    told = events(answer.text)
    assert (answer.status_code, was_cut(answer)) == (200, True)
    kinds = ["response.created", "response.in_progress", "error", "response.failed"]
    assert [it["type"] for it in told] == kinds
    assert [it["sequence_number"] for it in told] == [0, 1, 2, 3]
    error = told[-1]["response"]["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert "try again in 5s" in error["message"]
    (finished,) = (it for it in faced.gateway.lines(answer.headers["x-request-id"]) if "outcome" in it)
    assert finished["outcome"] == "engine_unavailable"


def test_a_streamed_message_without_an_engine_has_its_status(faced: Setting) -> None:
    answer = post(faced.client, MESSAGES_API.path, json=MESSAGES_API.body(model="dead", stream=True), headers=NO_WAIT)
    assert answer.status_code == 503
    assert MESSAGES_API.error(answer.json())[0] == "overloaded_error"


def test_a_blocking_response_that_must_not_be_asked_for_again_is_a_400(faced: Setting) -> None:
    answer = faced.ask(RESPONSES, script(["json", [401, {"error": {"message": "no", "type": "x"}}]]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "engine_unauthorized")


@BOTH
def test_a_stream_that_breaks_ends_as_its_api_has_it_and_is_cut(faced: Setting, api: Api, mark: str) -> None:
    body = api.body(whole_script(["pause", 0], ["event", {"error": {"message": mark, "code": 400}}]), stream=True)
    told = post(faced.client, api.path, json=body, headers={"x-stack-resume": "off"})
    assert (told.status_code, was_cut(told)) == (200, True)
    assert text_of(events(told.text)) == "one two"
    assert events(told.text)[-1]["type"] == api.failed


@BOTH
def test_a_stream_whose_engine_is_lost_goes_on_at_another(faced: Setting, api: Api) -> None:
    lost = script(["role"], ["token", "one"], ["token", " two"], ["close"])
    told = faced.stream(api, lost, model="pair")
    assert not was_cut(told)
    text = text_of(events(told.text))
    assert text.startswith("one two")
    assert len(text) > len("one two")
    assert events(told.text)[-1]["type"] == api.last


@BOTH
def test_an_answer_with_a_malformed_choice_is_a_failure(faced: Setting, api: Api) -> None:
    number = {"choices": [{"index": 0, "delta": {"content": 5}, "finish_reason": None}]}
    body = api.body(script(["role"], ["token", "one"], ["event", number], ["hang"]), stream=True)
    told = post(faced.client, api.path, json=body, headers={"x-stack-resume": "off"})
    assert was_cut(told)
    assert events(told.text)[-1]["type"] == api.failed


NAMELESS = {
    "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "c", "function": {"arguments": "{}"}}]}}]
}


@BOTH
def test_a_call_that_gets_no_name_is_a_failure_in_the_log_and_the_metrics_too(faced: Setting, api: Api) -> None:
    before = scrape(faced.metrics)
    calls = script(["role"], ["token", "one"], ["event", NAMELESS], ["finish", "tool_calls"], ["usage"], ["done"])
    told = faced.stream(api, calls)
    assert (told.status_code, was_cut(told)) == (200, True)
    assert [it["type"] for it in events(told.text)].count(api.failed) == 1
    assert events(told.text)[-1]["type"] == api.failed
    (finished,) = (it for it in faced.gateway.lines(told.headers["x-request-id"]) if "outcome" in it)
    assert (finished["outcome"], finished["level"]) == ("engine_error", "error")
    after = scrape(faced.metrics)
    for name, labels in (
        ("stack_requests_total", {"outcome": "engine_error"}),
        ("stack_broken_streams_total", {"api": api.name}),
    ):
        assert after.total(name, **labels) == before.total(name, **labels) + 1


@BOTH
def test_a_blocking_answer_with_a_call_without_a_name_is_an_error(faced: Setting, api: Api) -> None:
    call = {"id": "c", "type": "function", "function": {"arguments": "{}"}}
    choice = {"index": 0, "message": {"role": "assistant", "tool_calls": [call]}, "finish_reason": "tool_calls"}
    answer = faced.ask(api, script(["json", [200, {"choices": [choice]}]]))
    assert answer.status_code == 502


def test_a_failed_stream_is_not_kept_for_its_idempotency_key(faced: Setting, mark: str) -> None:
    body = RESPONSES.body(mark, model="dead", stream=True)
    answers = [
        post(faced.client, RESPONSES.path, json=body, headers=NO_WAIT | {"idempotency-key": mark}) for _ in range(2)
    ]
    assert [it.status_code for it in answers] == [200, 200]
    assert [events(it.text)[-1]["type"] for it in answers] == ["response.failed"] * 2
    assert ["idempotent-replayed" in it.headers for it in answers] == [False, False]
    assert all(map(was_cut, answers))
