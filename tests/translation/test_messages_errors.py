"""What a Messages client reads beside messages: each error of ours as it must see it, headers, counts."""

from datetime import UTC, datetime

import orjson
import pytest

from gateway import errors
from gateway.translation.messages import counted, envelope, headers

NOW = datetime(2026, 11, 28, 12, 0, 0, 500_000, UTC).timestamp()
ENDINGS: list[tuple[errors.StackError, str]] = [
    (errors.BadRequest("'a' is wrong.", param="a"), "invalid_request_error"),
    (errors.ContextExceeded("Too long.", param="messages"), "invalid_request_error"),
    (errors.InvalidKey("Incorrect API key provided."), "authentication_error"),
    (errors.ModelNotFound("No such model."), "not_found_error"),
    (errors.NotFound("Nothing here."), "not_found_error"),
    (errors.MethodNotAllowed("Use POST.", allow="POST"), "invalid_request_error"),
    (errors.RequestTimeout("Too slow."), "timeout_error"),
    (errors.IdempotencyConflict("Used."), "conflict_error"),
    (errors.TooLarge("Too large."), "request_too_large"),
    (errors.UnsupportedMediaType("JSON only."), "invalid_request_error"),
    (errors.HeadersTooLarge("Too large."), "invalid_request_error"),
    (errors.RateLimited("Slow down.", 2, {}), "rate_limit_error"),
    (errors.QueueShareFull("Wait.", 2), "rate_limit_error"),
    (errors.QuotaSpent("Spent.", {}), "billing_error"),
    (errors.InternalError("Sorry."), "api_error"),
    (errors.EngineError("Broken."), "api_error"),
    (errors.EngineFailed("Died."), "api_error"),
    (errors.EngineRefused("No.", status=422), "invalid_request_error"),
    (errors.EngineUnsupported("It can't."), "invalid_request_error"),
    (errors.EngineUnavailable("Away."), "overloaded_error"),
    (errors.QueueFull("Full.", 2), "overloaded_error"),
    (errors.ModelLoading("Loading."), "overloaded_error"),
    (errors.Draining("Stopping."), "overloaded_error"),
    (errors.GatewayBusy("Busy."), "overloaded_error"),
    (errors.PromptFailed("Template."), "api_error"),
    (errors.StoreUnavailable("Keys."), "api_error"),
    (errors.EngineTimeout("Slow."), "timeout_error"),
]


@pytest.mark.parametrize(("error", "kind"), ENDINGS, ids=lambda it: type(it).__name__ if it is not str else it)
def test_an_error_has_anthropics_shape_and_type(error: errors.StackError, kind: str) -> None:
    body, _ = envelope(error, request_id="r1")
    told = orjson.loads(body)
    assert told.keys() == {"type", "error", "request_id"}
    assert (told["type"], told["request_id"], told["error"]["type"]) == ("error", "r1", kind)
    assert error.message in told["error"]["message"]


def test_every_status_of_ours_has_a_type_of_anthropics() -> None:
    """A class of error that is added is either told by its status or named in the table above."""
    known = {type(error) for error, _ in ENDINGS}
    statuses = {error.status for error, _ in ENDINGS}

    def below(cause: type[errors.StackError]) -> set[type[errors.StackError]]:
        return {cause}.union(*map(below, cause.__subclasses__()))

    missing = {it for it in below(errors.StackError) - known if it.status not in statuses}
    missing = {it for it in missing if not it.__module__.startswith("gateway.console.")}  # which is not an API
    assert missing == {errors.ClientLeft}  # nobody receives that one


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_claude_code_reads() -> None:
    error = errors.ContextExceeded("This model's …", param="messages", tokens=9031, limit=4096)
    body, _ = envelope(error)
    assert orjson.loads(body)["error"]["message"] == "prompt is too long: 9031 tokens > 4096 maximum"
    unsaid, _ = envelope(errors.ContextExceeded("It is.", param="messages"))
    assert orjson.loads(unsaid)["error"]["message"] == "prompt is too long: It is."


def test_a_field_is_named_although_anthropics_errors_have_no_place_for_it() -> None:
    body, _ = envelope(errors.EngineRefused("Not so.", status=400, param="tools"))
    assert orjson.loads(body)["error"]["message"] == "tools: Not so."


def test_a_wrong_key_is_not_tried_again() -> None:
    _, extra = envelope(errors.InvalidKey("Incorrect API key provided."), request_id="r1")
    assert extra == [(b"request-id", b"r1"), (b"x-should-retry", b"false")]


def test_a_refusal_for_a_limit_tells_how_the_key_stands() -> None:
    standing = {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1.5s",
    }
    _, extra = envelope(errors.RateLimited("Slow down.", 2, standing), request_id="r1", now=NOW)
    assert extra == [
        (b"request-id", b"r1"),
        (b"anthropic-ratelimit-requests-limit", b"60"),
        (b"anthropic-ratelimit-requests-remaining", b"0"),
        (b"anthropic-ratelimit-requests-reset", b"2026-11-28T12:00:02Z"),
    ]


@pytest.mark.parametrize(
    ("duration", "moment"),
    [
        (b"0ms", b"2026-11-28T12:00:01Z"),
        (b"12ms", b"2026-11-28T12:00:01Z"),
        (b"500ms", b"2026-11-28T12:00:01Z"),
        (b"501ms", b"2026-11-28T12:00:02Z"),
        (b"59.5s", b"2026-11-28T12:01:00Z"),
        (b"6m0s", b"2026-11-28T12:06:01Z"),
        (b"1h2m3s", b"2026-11-28T13:02:04Z"),
    ],
)
def test_a_reset_is_a_time_and_not_a_duration(duration: bytes, moment: bytes) -> None:
    own = [(b"x-ratelimit-reset-tokens", duration), (b"x-stack-ignored-params", b"a"), (b"x-ratelimit-odd", b"1")]
    assert headers(own, None, NOW) == [(b"anthropic-ratelimit-tokens-reset", moment)]


def test_a_reset_that_cannot_be_told_is_left_out() -> None:
    own = [(b"x-ratelimit-reset-tokens", b"1s"), (b"x-ratelimit-limit-tokens", b"9")]
    assert headers(own, "r1", None) == [(b"request-id", b"r1"), (b"anthropic-ratelimit-tokens-limit", b"9")]
    assert headers([(b"x-ratelimit-reset-tokens", b"soon")], None, NOW) == []


def test_a_count_is_anthropics() -> None:
    assert counted(14) == {"input_tokens": 14}
