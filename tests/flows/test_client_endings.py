"""Which ending each client gets for each of our errors, and what the client was seen to do after such an ending.

A row of `BEFORE` has the ending of a request that got nothing: as a chat completion, as a response, as a response to
Codex (which accepts events alone), as a message; "=" is the ending to the left of it. `WITHIN` has the last event of a
stream that breaks off: as a chat completion, a response, a message. A word after the code says that the ending names a
time to come back (`waits`), forbids to try again (`final`), or says that the prompt is too long (`long`).

`DID` has the number of requests that each client sent after an ending of `BEFORE`, which was the answer to all of them:
with "w" it waited as it was told, with "+" it was seen to try again once and no more was tried. Claude Code was run
with three retries; by default it has ten. opencode, pi, qwen and continue were stopped after 75 seconds.

This file is long because the tables are one thing to read.
"""

from typing import Any

import pytest

from gateway import errors
from gateway.errors import StackError
from tests.support.endings import (
    CLIENTS,
    ERRORS,
    HOPELESS,
    LATE,
    PATHS,
    Ending,
    before,
    of_events,
    of_response,
    reaction,
    within,
)
from tests.support.face_setting import Setting
from tests.support.faces import script, whole_script
from tests.support.processes import post, was_cut

BEFORE = """
BadRequest           400 -, =, =, 400 invalid_request_error
ContextExceeded      400 context_length_exceeded, =, =, 400 invalid_request_error long
InvalidKey           401 invalid_api_key, =, =, 401 authentication_error final
InvalidUser          401 invalid_user, =, =, 401 authentication_error final
ModelNotFound        404 model_not_found, =, =, 404 not_found_error
NotFound             404 not_found, =, =, 404 not_found_error
MethodNotAllowed     405 method_not_allowed, =, =, 405 invalid_request_error
RequestTimeout       408 request_timeout, =, =, 408 timeout_error
IdempotencyConflict  409 idempotency_conflict final, =, stream invalid_prompt, 409 conflict_error final
TooLarge             413 request_too_large, =, stream invalid_prompt, 413 request_too_large
UnsupportedEncoding  415 unsupported_encoding, =, stream invalid_prompt, 415 invalid_request_error
UnsupportedMediaType 415 unsupported_media_type, =, stream invalid_prompt, 415 invalid_request_error
HeadersTooLarge      431 headers_too_large, =, stream invalid_prompt, 431 invalid_request_error
RateLimited          429 rate_limit_exceeded waits, =, =, 429 rate_limit_error waits
QueueShareFull       429 queue_share_full waits, =, =, 429 rate_limit_error waits
QuotaSpent           429 insufficient_quota final, =, =, 429 billing_error final
InternalError        500 internal_error, =, stream server_error, 500 api_error
EngineError          502 engine_error, =, stream server_error, 502 api_error
EngineUnauthorized   502 engine_unauthorized final, 400 engine_unauthorized final, =, 502 api_error final
EngineRefused        422 x, =, stream invalid_prompt, 422 invalid_request_error
EngineUnsupported    400 unsupported, =, =, 400 invalid_request_error
EngineLost           502 engine_broken_stream, =, stream server_error, 502 api_error
EngineDied           502 engine_error, =, stream server_error, 502 api_error
EngineFailed         502 engine_failed final, 400 engine_failed final, =, 502 api_error final
EngineDisobeyed      502 engine_broken_tool_call final, 400 engine_broken_tool_call final, =, 502 api_error final
EngineUnavailable    503 engine_unavailable waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
EngineUnreachable    503 engine_unavailable waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
EngineOverloaded     503 server_is_overloaded waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
EngineFull           503 server_is_overloaded waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
QueueFull            503 queue_full waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
QueueTimeout         503 queue_timeout waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
EngineAsleep         503 engine_asleep waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
LoadFailed           503 model_unavailable waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
ModelLoading         503 model_loading waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
EngineTimeout        504 engine_timeout, =, stream server_error, 504 timeout_error
EngineSilent         504 engine_timeout, =, stream server_error, 504 timeout_error
AnswerTooLong        504 engine_timeout final, =, stream invalid_prompt, 504 timeout_error final
GatewayBusy          503 server_is_overloaded waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
PromptFailed         503 prompt_failed final, 400 prompt_failed final, =, 503 api_error final
StoreUnavailable     503 store_unavailable waits, =, stream rate_limit_exceeded waits, 503 api_error waits
Draining             503 draining waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
Exhausted            503 server_is_overloaded waits, =, stream rate_limit_exceeded waits, 503 overloaded_error waits
"""
DID = """
error                codex claude opencode pi qwen continue openai responses anthropic ai
BadRequest           1     6      1        1  1    1        1      1         1         1
ContextExceeded      1     1      120      2  1    1        1      1         1         1
InvalidKey           6     1      1        1  1    1        1      1         1         1
InvalidUser          6     1      1        1  1    1        1      1         1         1
ModelNotFound        1     2      1        1  1    1        1      1         1         1
NotFound             2+    2      1        1  1    1        1      1         1         1
MethodNotAllowed     6     1      1        1  1    1        1      1         1         1
RequestTimeout       6     1      1        1  1    1        1      1         1         1
IdempotencyConflict  1     1      1        1  1    1        1      1         1         1
TooLarge             1     1      1        1  1    1        1      1         1         1
UnsupportedEncoding  1     1      1        1  1    1        1      1         1         1
UnsupportedMediaType 1     1      1        1  1    1        1      1         1         1
HeadersTooLarge      1     1      1        1  1    1        1      1         1         1
RateLimited          6w    9w     6w       12w 28w  24       3w     3w        3w        3w
QueueShareFull       6w    9w     6w       12w 28w  24       3w     3w        3w        3w
QuotaSpent           1     1      5        12 23   27       1      1         1         3
InternalError        6     4      5        12 24   27       3      3         3         3
EngineError          6     4      5        12 24   27       3      3         3         4
EngineUnauthorized   1     1      5        12 24   27       1      1         1         4
EngineRefused        1     1      1        1  1    1        1      1         1         1
EngineUnsupported    1     6      1        1  1    1        1      1         1         1
EngineLost           6     4      5        12 24   27       3      3         3         4
EngineDied           6     4      5        12 24   27       3      3         3         4
EngineFailed         1     1      5        12 24   27       1      1         1         4
EngineDisobeyed      1     1      5        12 24   27       1      1         1         4
EngineUnavailable    6w    4w     6w       12w 23w  22       3w     3w        3w        3w
EngineUnreachable    6w    4w     6w       12w 23w  22       3w     3w        3w        3w
EngineOverloaded     6w    4w     6w       12w 23w  22       3w     3w        3w        3w
EngineFull           6w    4w     6w       12w 23w  22       3w     3w        3w        3w
QueueFull            6w    4w     6w       12w 23w  22       3w     3w        3w        3w
QueueTimeout         6w    4w     6w       12w 23w  22       3w     3w        3w        3w
EngineAsleep         6w    4w     6w       12w 23w  22       3w     3w        3w        3w
LoadFailed           6w    4w     6w       12w 23w  22       3w     3w        3w        3w
ModelLoading         6w    4w     6w       12w 23w  22       3w     3w        3w        3w
EngineTimeout        6     4      5        12 24   27       3      3         3         3
EngineSilent         6     4      5        12 24   27       3      3         3         3
AnswerTooLong        1     1      5        12 24   27       1      1         1         3
GatewayBusy          6w    4w     6w       12w 23w  22       3w     3w        3w        3w
PromptFailed         1     1      6w       12w 23w  22       1      1         1         3w
StoreUnavailable     6w    4w     6w       12w 23w  22       3w     3w        3w        3w
Draining             6w    4w     6w       12w 23w  22       3w     3w        3w        3w
Exhausted            6w    4w     6w       12w 23w  22       3w     3w        3w        3w
"""
WITHIN = """
InvalidKey           stream invalid_api_key, stream invalid_prompt, stream authentication_error
InternalError        stream internal_error, stream server_error, stream api_error
Draining             stream draining, stream rate_limit_exceeded waits, stream overloaded_error
EngineError          stream engine_error, stream server_error, stream api_error
EngineUnauthorized   stream engine_unauthorized, stream invalid_prompt, stream api_error
EngineRefused        stream x, stream invalid_prompt, stream invalid_request_error
EngineUnsupported    stream unsupported, stream invalid_prompt, stream invalid_request_error
EngineLost           stream engine_broken_stream, stream server_error, stream api_error
EngineDied           stream engine_error, stream server_error, stream api_error
EngineFailed         stream engine_failed, stream invalid_prompt, stream api_error
EngineDisobeyed      stream engine_broken_tool_call, stream invalid_prompt, stream api_error
EngineUnavailable    stream engine_unavailable, stream rate_limit_exceeded waits, stream overloaded_error
EngineUnreachable    stream engine_unavailable, stream rate_limit_exceeded waits, stream overloaded_error
EngineOverloaded     stream server_is_overloaded, stream rate_limit_exceeded waits, stream overloaded_error
EngineFull           stream server_is_overloaded, stream rate_limit_exceeded waits, stream overloaded_error
EngineAsleep         stream engine_asleep, stream rate_limit_exceeded waits, stream overloaded_error
EngineTimeout        stream engine_timeout, stream server_error, stream timeout_error
EngineSilent         stream engine_timeout, stream server_error, stream timeout_error
AnswerTooLong        stream engine_timeout, stream invalid_prompt, stream timeout_error
"""


def table(text: str, separator: str | None = ", ") -> dict[str, list[str]]:
    """The rows of a table, by their first word."""
    rows = (line.partition(" ") for line in text.strip().splitlines())
    return {name: [it.strip() for it in rest.strip().split(separator)] for name, _, rest in rows}


def endings(name: str) -> dict[str, Ending]:
    """The endings of an error before anything of an answer, by API; `codex` is a response to Codex."""
    error = ERRORS[name]
    return {api: before(error, api) for api in PATHS} | {"codex": before(error, "responses", codex=True)}


def did(name: str) -> dict[str, str]:
    """What each client did after the ending that this error has for it."""
    told = endings(name)
    return {it: reaction(it, told["codex" if it == "codex" else api]) for it, (api, _) in CLIENTS.items()}


def kinds(error: type[StackError] = StackError) -> set[str]:
    return {it.__name__ for it in error.__subclasses__()}.union(*(kinds(it) for it in error.__subclasses__()))


def test_every_error_has_a_row() -> None:
    # Nobody is there; not of these APIs; never told as it is; as EngineLost, with another code
    never = {"ClientLeft", "EndpointMissing", "EngineFault", "EngineEnded"}
    assert table(BEFORE).keys() == ERRORS.keys() == {it for it in kinds() if hasattr(errors, it)} - never
    assert table(DID, None).keys() - {"error"} == ERRORS.keys()
    assert table(WITHIN).keys() == set(LATE)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_before_the_answer_ends_as_the_table_says(name: str) -> None:
    chat, response, codex, message = table(BEFORE)[name]
    response = chat if response == "=" else response
    codex = response if codex == "=" else codex
    told = {it: str(ending) for it, ending in endings(name).items()}
    assert told == {"chat": chat, "responses": response, "codex": codex, "messages": message}


@pytest.mark.parametrize("name", LATE)
def test_an_error_within_the_answer_ends_as_the_table_says(name: str) -> None:
    assert [str(within(ERRORS[name], api)) for api in PATHS] == table(WITHIN)[name]


@pytest.mark.parametrize("name", ERRORS)
def test_clients_do_after_an_ending_what_the_table_says(name: str) -> None:
    rows = table(DID, None)
    assert did(name) == dict(zip(rows["error"], rows[name], strict=True))


# They repeat every 5xx and 429 until they are stopped, whatever it says: one request in some seconds.
# opencode shortens the conversation after "too long", and the request for that got the same answer here. In a real
# conversation it is short enough.
ENDLESS = {"opencode", "pi", "qwen", "continue"}
KNOWN = {("ContextExceeded", "opencode")}


@pytest.mark.parametrize("name", ERRORS)
def test_no_client_asks_thirty_times_in_vain(name: str) -> None:
    for client, told in did(name).items():
        count = int(told.rstrip("w+"))
        assert count < 30 or (name, client) in KNOWN
        if name in HOPELESS and client not in ENDLESS:
            assert count <= 6
    for client in ("codex", "claude"):  # who is told a time keeps to it
        assert did(name)[client].endswith("w") == any(it.waits for it in endings(name).values())


@pytest.mark.parametrize("name", LATE)
def test_a_stream_that_broke_off_is_not_asked_for_thirty_times(name: str) -> None:
    for client, (api, _) in CLIENTS.items():
        told = reaction(client, within(ERRORS[name], api))
        assert int(told.rstrip("w+")) < 10
        assert (client, name in HOPELESS) != ("codex", True) or told == "1"


# -- the same endings through the front door --------------------------------------------------------------------------

ENGINE_SAYS: dict[str, list[Any]] = {
    "EngineUnauthorized": ["json", [401, {"error": {"message": "no", "type": "x"}}]],
    "EngineRefused": ["json", [422, {"error": {"message": "m", "code": "x"}}]],
    "EngineError": ["json", [500, {"error": {"message": "CUDA"}}]],
    "EngineOverloaded": ["json", [429, {"error": "busy"}]],
    "ModelLoading": ["json", [503, {"error": {"message": "Loading model"}}]],
    "ContextExceeded": ["json", [400, {"error": {"code": 400, "message": "x", "type": "exceed_context_size_error"}}]],
}
CALLER_SAYS: dict[str, dict[str, Any]] = {
    "InvalidKey": {"headers": {"authorization": "Bearer wrong"}},
    "UnsupportedMediaType": {"headers": {"content-type": "text/plain"}},
    "UnsupportedEncoding": {"headers": {"content-encoding": "br"}},
    "TooLarge": {"content": b" " * 200_000},
    "BadRequest": {"content": b"{"},
    "ModelNotFound": {"model": "nope"},
    "EngineUnreachable": {"model": "dead"},
}


def body_of(api: str, text: str = "Hello", model: str = "fake-model") -> dict[str, Any]:
    said = {"input": text} if api == "responses" else {"messages": [{"role": "user", "content": text}]}
    return {"model": model, "stream": True} | ({"max_tokens": 100} if api == "messages" else {}) | said


@pytest.mark.parametrize("name", [*CALLER_SAYS, *ENGINE_SAYS])
@pytest.mark.parametrize("who", [*PATHS, "codex"])
def test_the_gateway_ends_a_request_so(faced: Setting, who: str, name: str) -> None:
    api = "responses" if who == "codex" else who
    how = dict(CALLER_SAYS.get(name, {}))
    text = script(ENGINE_SAYS[name]) if name in ENGINE_SAYS else "Hello"
    if "content" not in how:
        how["json"] = body_of(api, text, how.pop("model", "fake-model"))
    else:
        how["headers"] = {"content-type": "application/json"}
    accept = {"accept": "text/event-stream"} if who == "codex" else {}
    how["headers"] = {"x-stack-resume": "off", **accept, **how.get("headers", {})}
    answer = post(faced.client, PATHS[api], **how)
    if answer.status_code != 200:
        got = of_response(answer.status_code, answer.headers, answer.content)
    else:
        assert was_cut(answer)
        assert answer.headers["content-type"].startswith("text/event-stream")
        got = of_events(answer.content, api)
    expected = endings(name)[who]
    if who == "responses" and (expected.status or 0) >= 500:
        expected = within(ERRORS[name], api)  # it is known to be a stream
    assert str(got) == str(expected)


EVENTS: dict[str, list[Any]] = {
    "EngineRefused": ["event", {"error": {"message": "m", "code": 400}}],
    "EngineError": ["event", {"error": {"message": "CUDA died", "type": "x"}}],
    "EngineOverloaded": ["event", {"error": {"message": "busy", "code": 429}}],
    "EngineLost": ["close"],
}


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("api", PATHS)
def test_the_gateway_ends_a_stream_so(faced: Setting, api: str, name: str) -> None:
    body = body_of(api, whole_script(["pause", 0], EVENTS[name]))
    answer = post(faced.client, PATHS[api], json=body, headers={"x-stack-resume": "off"})
    assert (answer.status_code, was_cut(answer)) == (200, True)
    got, expected = of_events(answer.content, api), within(ERRORS[name], api)
    if name == "EngineRefused" and api == "chat":
        assert got.status is None  # the code is the engine's own
    else:
        assert str(got) == str(expected)


def test_an_error_in_a_stream_for_an_idempotency_key_arrives_whole(faced: Setting, mark: str) -> None:
    headers = {"accept": "text/event-stream", "idempotency-key": mark}
    body = body_of("responses", script(ENGINE_SAYS["EngineRefused"]))
    for _ in range(2):  # a failed answer is not kept
        answer = post(faced.client, PATHS["responses"], json=body, headers=headers)
        assert (answer.status_code, was_cut(answer)) == (200, True)
        assert str(of_events(answer.content, "responses")) == "stream invalid_prompt"


def test_codex_is_told_within_a_stream_that_nothing_can_be_answered_now(faced: Setting) -> None:
    """Before its body is read, too: a 5xx would be repeated 30 times. The log has the error's code and its level."""
    headers = {"accept": "text/event-stream", "content-encoding": "br"}
    answer = post(faced.client, PATHS["responses"], json=body_of("responses"), headers=headers)
    assert (answer.status_code, was_cut(answer)) == (200, True)
    (line,) = faced.gateway.lines(answer.headers["x-request-id"])
    assert (line["msg"], line["status"], line["code"]) == ("request", 200, "unsupported_encoding")
