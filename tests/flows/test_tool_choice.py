"""A demanded tool call as its client sees it: its pieces, its header, its price, and its errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from tests.support.fakes.dialects import ENGINES
from tests.support.processes import FakeEngine, GatewayProcess, events, post, was_cut
from tests.support.tool_demands import DEMANDS, GOOD, NAMED, RIGHT, TOOLS, TWO, WEATHER, WRONG, body, joined, verdict

MISFIT = {"say": ['{"name": "get_weather", "arg', 'uments": {"city": 5}}']}
CALL = {"calls": [["get_weather", {"city": "Oslo"}]], "finish": "tool_calls"}
USAGE = {"include_usage": True}
NO_PARSER = {"refuse": 'tool_choice="required" requires --tool-call-parser to be set'}


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


def ask(http: httpx.Client, engine: str, mark: str, *tries: dict[str, Any], **said: Any) -> httpx.Response:
    return post(http, "/v1/chat/completions", json=body(engine, mark, *tries, **said))


def asked(fakes: dict[str, FakeEngine], engine: str, mark: str) -> list[dict[str, Any]]:
    return [it["body"] for it in fakes[engine].all_seen()["seen"] if it["body"].get("mark") == mark]


def peak(gateway: GatewayProcess) -> int:
    """The most kilobytes that its worker has used so far."""
    return int(Path(f"/proc/{gateway.workers()[0]}/status").read_text().partition("VmHWM:")[2].split()[0])


def forced_by(answer: httpx.Response) -> str | None:
    return answer.headers.get("x-stack-forced-tools")


@pytest.mark.parametrize("engine", ["ollama", "llamacpp"])
def test_a_stream_tells_the_name_first_and_the_arguments_as_they_come(
    http: httpx.Client, mark: str, engine: str
) -> None:
    answer = ask(http, engine, mark, TWO, tool_choice="required", stream=True)
    chunks = [it["choices"][0] for it in events(answer.text) if it != "[DONE]"]
    pieces = [piece for it in chunks for piece in it["delta"].get("tool_calls", ())]
    assert chunks[0]["delta"]["role"] == "assistant"
    assert [(it["index"], it["function"]["name"]) for it in pieces if "name" in it["function"]] == [
        (0, "get_weather"),
        (1, "get_time"),
    ]
    assert len(pieces) > 6, "the arguments come in pieces"
    assert chunks[-1]["finish_reason"] == "tool_calls"
    assert (forced_by(answer), answer.headers.get("x-stack-ignored-params")) == ("schema", None)
    assert not any(it["delta"].get("content") for it in chunks), "none of the JSON is text"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_thinking_passes_and_the_call_follows(http: httpx.Client, mark: str, engine: str, stream: bool) -> None:
    first = RIGHT["thinking, and then a call"] if engine != "vllm" else CALL | {"think": "Let me see."}
    answer = ask(http, engine, mark, first, tool_choice="required", stream=stream)
    message = joined(answer.text)[0] if stream else answer.json()["choices"][0]["message"]
    assert message["reasoning_content"] == "Let me see."
    assert [it["function"]["name"] for it in message["tool_calls"]] == ["get_weather"]


def test_an_engine_that_obeys_is_left_alone(http: httpx.Client, fakes: dict[str, FakeEngine], mark: str) -> None:
    answer = ask(http, "vllm", mark, CALL, tool_choice="required")
    (sent,) = asked(fakes, "vllm", mark)
    assert (sent["tools"], sent["tool_choice"], "response_format" in sent) == (TOOLS, "required", False)
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert (call["id"], forced_by(answer)) == ("call_0", None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_vllm_without_a_parser_is_forced_by_a_schema(http: httpx.Client, mark: str, stream: bool) -> None:
    answer = ask(http, "vllm", mark, NO_PARSER, GOOD, tool_choice="required", stream=stream)
    assert verdict(answer, DEMANDS["required"], stream=stream) == "called"
    assert forced_by(answer) == "schema"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_call_is_asked_for_once_more_and_both_are_charged(
    http: httpx.Client, before_all: GatewayProcess, fakes: dict[str, FakeEngine], mark: str, engine: str
) -> None:
    for number, stream in enumerate((False, True)):
        name = f"{mark}-{number}"
        answer = ask(
            http, engine, name, WRONG["prose"], GOOD, tool_choice="required", stream=stream, stream_options=USAGE
        )
        assert verdict(answer, DEMANDS["required"], stream=stream) == "called"
        usage = answer.json()["usage"] if not stream else events(answer.text)[-2]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (14, 6)
        line = before_all.lines(answer.headers["x-request-id"])[-2]
        assert (line["tokens_in"], line["finish_reason"]) == (14, "tool_calls")
        assert line["tokens_out"] >= 6, "pieces that were seen count, if they are more"
        assert forced_by(answer) == "schema,repaired" or stream
        first, second = asked(fakes, engine, name)
        assert "not accepted" not in json.dumps(first)
        assert "not accepted" in second["messages"][-1]["content"], "the model is told why"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_call_that_stays_wrong_is_an_error_that_clients_do_not_repeat(
    http: httpx.Client, before_all: GatewayProcess, fakes: dict[str, FakeEngine], mark: str, engine: str
) -> None:
    answer = ask(http, engine, mark, MISFIT, MISFIT, GOOD, tool_choice="required")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (502, "engine_broken_tool_call")
    assert answer.headers["x-should-retry"] == "false"
    if engine != "vllm":
        assert "'city'" in error["message"]
    assert len(asked(fakes, engine, mark)) == 2
    line = before_all.lines(answer.headers["x-request-id"])[-2]
    words = 2 * 5  # a call's name and arguments, made twice: more than the engine's usage of 3 tokens each
    assert (line["outcome"], line["tokens_out"]) == ("engine_broken_tool_call", words)


@pytest.mark.parametrize("engine", ENGINES)
def test_text_up_to_the_token_limit_is_no_call(http: httpx.Client, mark: str, engine: str) -> None:
    talk = {"say": ["Well, ", "let me ", "tell you"], "finish": "length"}
    answer = ask(http, engine, mark, talk, GOOD, tool_choice="required", max_tokens=20)
    assert verdict(answer, DEMANDS["required"], stream=False) == "called"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_whose_engine_dies_inside_a_call_is_cut(http: httpx.Client, mark: str, engine: str) -> None:
    begun = {"say": ['{"name": "get_weather", "arguments": {"ci'], "cut": 2}
    first = CALL | {"cut": 3} if engine == "vllm" else begun
    answer = ask(http, engine, mark, first, tool_choice="required", stream=True)
    assert was_cut(answer)
    assert events(answer.text)[-1]["error"]["code"] == "engine_broken_stream"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_token_limit_cuts_says_length(http: httpx.Client, mark: str, stream: bool) -> None:
    cut = {"say": ['{"name": "get_weather", "arguments": {"city": "Os'], "finish": "length"}
    answer = ask(http, "ollama", mark, cut, tool_choice="required", max_tokens=5, stream=stream)
    if stream:
        message, finish = joined(answer.text)
    else:
        (choice,) = answer.json()["choices"]
        message, finish = choice["message"], choice["finish_reason"]
    assert (message["tool_calls"][0]["function"]["arguments"], finish) == ('{"city": "Os', "length")


# -- the other demands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_with_tool_choice_none_no_call_passes(
    http: httpx.Client, fakes: dict[str, FakeEngine], mark: str, engine: str, stream: bool
) -> None:
    answer = ask(http, engine, mark, CALL | {"say": ["Sunny."]}, tool_choice="none", stream=stream)
    message, finish = joined(answer.text) if stream else (answer.json()["choices"][0]["message"], "")
    assert (message["content"], message.get("tool_calls") or []) == ("Sunny.", [])
    assert not stream or finish == "stop"
    (sent,) = asked(fakes, engine, mark)
    assert ("tools" in sent) == (engine == "vllm")
    name = f"{mark}-again"
    again = ask(http, engine, name, CALL, {"say": ["Sunny."]}, tool_choice="none", stream=stream)
    assert "Sunny." in again.text, "a call in place of an answer is asked for again"
    assert "get_weather" not in again.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_without_parallel_calls_only_the_first_call_passes(
    http: httpx.Client, mark: str, engine: str, stream: bool
) -> None:
    two = {"calls": [["get_weather", {"city": "Oslo"}], ["get_time", {"zone": "UTC"}]], "finish": "tool_calls"}
    answer = ask(http, engine, mark, two, parallel_tool_calls=False, stream=stream)
    message = joined(answer.text)[0] if stream else answer.json()["choices"][0]["message"]
    assert [it["function"]["name"] for it in message["tool_calls"]] == ["get_weather"]
    assert "get_time" not in answer.text
    assert answer.headers.get("x-stack-ignored-params") is None


@pytest.mark.parametrize("engine", ENGINES)
def test_arguments_of_a_strict_function_fit_its_schema(http: httpx.Client, mark: str, engine: str) -> None:
    named = {name: it | {"id": name, "$anchor": name} for name, it in WEATHER["properties"].items()}  # zod writes `id`
    function = {"name": "get_weather", "parameters": WEATHER | {"properties": named}, "strict": True}
    wrong = {"calls": [["get_weather", {"city": 5}]], "finish": "tool_calls"}
    answer = ask(http, engine, mark, wrong, GOOD, tools=[{"type": "function", "function": function}])
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    jsonschema_rs.validate(WEATHER, json.loads(call["function"]["arguments"]))


def test_patterns_that_would_take_half_a_gigabyte_are_not_compiled(
    http: httpx.Client, before_all: GatewayProcess, mark: str
) -> None:
    names = {f"^.{{1,5000}}{number}$": {} for number in range(50)}
    function = {"name": "get_weather", "parameters": WEATHER | {"patternProperties": names}}
    before = peak(before_all)
    answer = ask(http, "vllm", mark, CALL, tools=[{"type": "function", "function": function}], tool_choice="required")
    assert verdict(answer, DEMANDS["required"], stream=False) == "called"
    assert peak(before_all) - before < 50_000, "kilobytes"


def applied(levels: int) -> dict[str, Any]:
    """A schema that applies its last definition to `x` in 2^levels ways."""
    parts = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(levels)}
    last = {f"a{levels}": {"type": "integer"}}
    return {"type": "object", "properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": parts | last}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("levels", "told"), [(4, "called"), (12, "failed")])
def test_the_checks_of_all_calls_of_an_answer_are_bounded_together(
    http: httpx.Client, mark: str, levels: int, told: str, stream: bool
) -> None:
    """Each of the sixty calls takes 0.1 s with 12 levels, and other requests waited for 6 s."""
    function = {"name": "f", "parameters": applied(levels)}
    tools, calls = [{"type": "function", "function": function}], {"calls": [["f", {"x": 1}]] * 60}
    answer = ask(http, "vllm", mark, calls, calls, tools=tools, tool_choice="required", stream=stream)
    if told == "failed":
        assert "need too many steps" in answer.text
    else:
        assert answer.status_code == 200
        assert answer.text.count('"name":"f"') == 60


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_allowed_tools_are_offered(
    http: httpx.Client, fakes: dict[str, FakeEngine], mark: str, engine: str
) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
    ask(http, engine, mark, CALL, tool_choice=allowed)
    (sent,) = asked(fakes, engine, mark)
    assert (sent["tools"], sent["tool_choice"]) == ([TOOLS[0]], "auto")


def test_a_conversation_that_grows_keeps_its_prefix(
    http: httpx.Client, fakes: dict[str, FakeEngine], mark: str
) -> None:
    history = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Oslo?"}]
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    grown = [
        *history,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "4 degrees"},
    ]
    for number, messages in enumerate((history, grown)):
        ask(http, "llamacpp", f"{mark}-{number}", GOOD, tool_choice="required", messages=messages)
    (first,), (second,) = (asked(fakes, "llamacpp", f"{mark}-{number}") for number in (0, 1))
    assert second["messages"][: len(history)] == first["messages"]
    assert second["messages"][len(history) :] == grown[len(history) :], "the history's calls and results stay"
    assert first["response_format"] == second["response_format"]


PARAMETERS = "tools[0].function.parameters"
# References that the gateway does not follow. Not to follow them would mean that no call fits.
UNFOLLOWED: list[dict[str, Any]] = [
    {"$ref": "http://[::1]/x"},
    {"$ref": "#/$defs/nobody"},
    {"properties": {"a": {"$ref": "#city"}}, "$defs": {"b": {"$anchor": "city"}}},
    {"properties": {"a": {"$ref": "city"}}, "$defs": {"b": {"$id": "city"}}},
    {"properties": {"a": {"$id": "city", "$ref": "#/$defs/b"}}, "$defs": {"b": {}}},
]
WRONG_DEMANDS: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice.function.name"),
    ({"tool_choice": {"type": "function", "name": "get_weather"}}, "tool_choice.function.name"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools.mode"),
    ({"tool_choice": "required", "tools": [{"type": "function"}]}, "tools[0].function.name"),
    ({"tool_choice": "required", "tools": "get_weather"}, "tools"),
    (
        {"tool_choice": "required", "tools": [{"function": {"name": "f", "parameters": {"type": "strng"}}}]},
        "tools[0].function.parameters",
    ),
    *(
        ({"tool_choice": "required", "tools": [{"function": {"name": "f", "parameters": it}}]}, PARAMETERS)
        for it in UNFOLLOWED
    ),
]


@pytest.mark.parametrize(("said", "param"), WRONG_DEMANDS)
def test_a_demand_that_cannot_be_met_is_refused_by_its_field(
    http: httpx.Client, fakes: dict[str, FakeEngine], mark: str, said: dict[str, Any], param: str
) -> None:
    answer = ask(http, "ollama", mark, GOOD, **said)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not asked(fakes, "ollama", mark)


def test_a_completion_has_no_tools_to_force(http: httpx.Client, mark: str) -> None:
    said = {"model": "ollama", "prompt": "x", "mark": mark, "tries": [{"text": "a"}]}
    answer = http.post("/v1/completions", json=said | {"tools": TOOLS, "tool_choice": "required"})
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "a")
