"""The reader of Responses requests: what becomes of each field, and what a wrong one is told."""

from typing import Any

import pytest

from gateway.errors import BadRequest
from gateway.translation.responses import Asked, previous, read, referred, unknown_previous
from gateway.translation.responses.tools import MAX_NAME

PNG = "data:image/png;base64,iVBORw0KGgo="
WEATHER = {"type": "function", "name": "weather", "description": "Tell it.", "parameters": {"type": "object"}}


def _read(*, stores: bool = True, history: list[dict[str, Any]] | None = None, **fields: Any) -> Asked:
    body = {"model": "m", "input": "Hello", **fields}
    return read(body, request_id="r1", now=1, stores=stores, history=history or [])


def _messages(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = _read(input=list(items), **fields).chat["messages"]
    return messages


def _call(name: str = "weather", arguments: Any = "{}", call_id: str = "c1", **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **more}


def _output(output: Any = "sunny", call_id: str = "c1") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


USER = {"role": "user", "content": "Hello"}


def test_a_plain_request_is_one_message_of_chat() -> None:
    request = _read(instructions="Be brief.", max_output_tokens=24, temperature=0, top_p=0.5)
    assert request.chat == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, USER],
        "max_completion_tokens": 24,
        "temperature": 0,
        "top_p": 0.5,
    }
    assert (request.stream, request.store, request.previous_response_id, request.ignored) == (False, True, None, ())


def test_a_stream_asks_the_engine_for_its_usage() -> None:
    chat = _read(stream=True).chat
    assert (chat["stream"], chat["stream_options"]) == (True, {"include_usage": True})


def test_content_as_a_list_and_as_a_string_gives_the_same_messages() -> None:
    for role, kind in (("user", "input_text"), ("developer", "input_text"), ("assistant", "output_text")):
        listed = _messages({"role": role, "content": [{"type": kind, "text": "Hi"}]}, USER)
        assert listed == _messages({"type": "message", "role": role, "content": "Hi"}, USER)


def test_what_the_assistant_did_in_one_turn_is_one_message() -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"role": "assistant", "content": "Let me look."}
    (_, answer, *results) = _messages(
        USER, thought, said, _call(), _call(call_id="c2"), _output(), _output("rain", "c2")
    )
    assert answer["content"] == "Let me look."
    assert answer["reasoning_content"] == "Hm."
    assert [it["id"] for it in answer["tool_calls"]] == ["c1", "c2"]
    assert results == [
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
    ]


def test_reasoning_and_text_between_calls_leave_the_calls_next_to_their_outputs() -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}], "content": None}
    messages = _messages(USER, thought, _call(), thought, {"role": "assistant", "content": "And"}, _call(call_id="c2"))
    assert len(messages) == 2
    assert messages[1]["reasoning_content"] == "Hm.\n\nHm."
    assert messages[1]["content"] == "And"
    assert len(messages[1]["tool_calls"]) == 2


def test_reasoning_without_a_follower_is_accepted() -> None:
    thought = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA", "content": None}
    assert _messages(USER, thought) == [USER]
    raw = thought | {"content": [{"type": "reasoning_text", "text": "Hm."}]}
    assert _messages(USER, raw, USER)[1] == {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    assert _read(input=[USER, raw]).ignored == ("input[].reasoning",)


def test_empty_and_missing_content_of_the_assistant_is_accepted() -> None:
    for content in ("", None, []):
        assert _messages(USER, {"role": "assistant", "content": content}, USER)[1]["content"] == ""


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ('{"a":  1}', '{"a":  1}'),
        ("", "{}"),
        (None, "{}"),
        ("[1]", '{"raw":"[1]"}'),
        ('{"a": ', '{"raw":"{\\"a\\": "}'),
        ({"a": 1}, '{"a":1}'),
    ],
)
def test_arguments_in_the_history_are_ones_that_every_engine_parses(arguments: Any, kept: str) -> None:
    assert _messages(USER, _call(arguments=arguments))[1]["tool_calls"][0]["function"]["arguments"] == kept


def test_a_custom_tool_is_a_function_with_one_text() -> None:
    rule = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
    tool = {"type": "custom", "name": "patch", "description": "Patch.", "format": rule}
    call = {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "x"}
    output = {"type": "custom_tool_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "done"}]}
    request = _read(tools=[tool], tool_choice={"type": "custom", "name": "patch"}, input=[USER, call, output])
    function = request.chat["tools"][0]["function"]
    assert function["parameters"]["required"] == ["input"]
    assert function["description"].endswith("lark grammar:\nstart: /x/")
    assert request.chat["tool_choice"] == {"type": "function", "function": {"name": "patch"}}
    assert request.chat["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"input":"x"}'
    assert request.chat["messages"][2]["content"] == "done"
    assert request.ignored == ("tools.custom.format",)


def test_images_of_tool_outputs_follow_the_last_of_the_outputs() -> None:
    image = {"type": "input_image", "image_url": PNG}
    text = {"type": "input_text", "text": "Here."}
    messages = _messages(USER, _call(), _call(call_id="c2"), _output([text, image]), _output("rain", "c2"), USER)
    assert [it["role"] for it in messages] == ["user", "assistant", "tool", "tool", "user", "user"]
    assert messages[2]["content"] == "Here."
    assert messages[4]["content"][1] == {"type": "image_url", "image_url": {"url": PNG}}


def test_names_in_a_namespace_are_short_enough_and_differ() -> None:
    tools = [{"type": "function", "name": f"{'x' * 60}{at}"} for at in range(3)]
    space = {"type": "namespace", "name": "mcp__long", "description": "Long.", "tools": tools}
    clash = [
        {"type": "function", "name": "a__b"},
        {"type": "namespace", "name": "a", "tools": [{"type": "function", "name": "b"}]},
    ]
    offered = _read(tools=[space, *clash]).chat["tools"]
    names = [it["function"]["name"] for it in offered]
    assert len(set(names)) == 5
    assert all(len(it) <= MAX_NAME for it in names)
    assert offered[0]["function"]["description"] == "Long."


def test_hosted_and_unknown_tools_are_named_and_not_offered() -> None:
    request = _read(tools=[{"type": "web_search"}, {"type": "image_generation"}, {"type": "x y"}, WEATHER])
    assert len(request.chat["tools"]) == 1
    assert request.ignored == ("tools.web_search", "tools.image_generation", "tools.x?y")


def test_hosted_tools_alone_are_no_tools_to_an_engine() -> None:
    chat = _read(tools=[{"type": "web_search"}], tool_choice="auto", parallel_tool_calls=False).chat
    assert chat.keys() == {"model", "messages"}


def test_allowed_tools_leaves_the_others_out() -> None:
    other = WEATHER | {"name": "other"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    chat = _read(tools=[other, WEATHER], tool_choice=choice).chat
    assert [it["function"]["name"] for it in chat["tools"]] == ["weather"]
    assert chat["tool_choice"] == "required"


def test_settings_are_translated_to_chats_fields() -> None:
    schema = {"type": "json_schema", "name": "p", "strict": True, "schema": {"type": "object"}}
    chat = _read(
        text={"format": schema, "verbosity": "low"},
        reasoning={"effort": "high", "summary": "auto"},
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        include=["message.output_text.logprobs"],
        top_k=5,
    ).chat
    assert chat["response_format"]["json_schema"] == {"name": "p", "schema": {"type": "object"}, "strict": True}
    assert (chat["verbosity"], chat["reasoning_effort"]) == ("low", "high")
    assert (chat["tool_choice"], chat["parallel_tool_calls"]) == ("required", False)
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, 0)
    assert chat["top_k"] == 5


def test_bookkeeping_reaches_no_engine() -> None:
    fields = {"metadata": {"a": "b"}, "prompt_cache_key": "k", "user": "u", "service_tier": "auto", "max_tool_calls": 3}
    request = _read(**fields, safety_identifier="s", client_metadata={"x": 1}, stream_options={})
    assert request.chat == _read().chat
    assert request.ignored == ()


def test_what_cannot_be_honoured_is_named() -> None:
    request = _read(truncation="auto", moderation={"model": "x"}, input=[USER | {"colour": "red"}])
    assert set(request.ignored) == {"truncation", "moderation", "input[].colour"}


def test_the_history_of_a_previous_response_stands_before_the_input() -> None:
    first = _read(input="Hi")
    first.writer.whole({"choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}]})
    items = [*first.writer.input_items(), *first.writer.response()["output"]]
    second = _read(input="And?", previous_response_id="resp_r1", history=items)
    assert [it["content"] for it in second.chat["messages"]] == ["Hi", "Hello.", "And?"]
    assert second.previous_response_id == "resp_r1"
    assert second.writer.response()["previous_response_id"] == "resp_r1"
    assert items[0] == {
        "type": "message",
        "id": "in_r1_0",
        "role": "user",
        "content": [{"type": "input_text", "text": "Hi"}],
    }


@pytest.mark.parametrize("form", [{"type": "item_reference"}, {"type": None}, {}])
def test_an_item_that_is_referred_to_is_put_in_its_place(form: dict[str, Any]) -> None:
    body = {"model": "m", "input": [{**form, "id": "msg_1"}, USER]}
    assert referred(body) == ("msg_1",)
    kept = {"msg_1": {"type": "message", "role": "assistant", "content": "Hi"}}
    request = read(body, request_id="r1", now=1, kept=kept)
    assert [it["content"] for it in request.chat["messages"]] == ["Hi", "Hello"]


def test_without_a_store_its_fields_are_refused_and_its_default_is_not() -> None:
    assert _read(stores=False).store is False
    assert _read(stores=False, store=False).store is False
    for fields in ({"store": True}, {"previous_response_id": "resp_1"}):
        with pytest.raises(BadRequest) as caught:
            _read(stores=False, **fields)
        assert caught.value.param == next(iter(fields))


def test_an_unknown_previous_response_has_openais_code() -> None:
    assert previous({"previous_response_id": "resp_1"}) == "resp_1"
    assert unknown_previous("resp_1").code == "previous_response_not_found"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": {}}, "input"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{"type": "nothing"}]}, "input[0].type"),
    ({"input": [USER, {"role": "tool", "content": ""}]}, "input[1].role"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"role": "user", "content": [{"type": "video"}]}]}, "input[0].content[0].type"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]},
        "input[0].content[0].image_url",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
        "input[0].content[0].file_id",
    ),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
    ({"input": [{"id": "x"}]}, "input[0].id"),
    ({"input": [{"id": "x", "content": "x"}]}, "input[0].type"),
    ({"input": [_call(call_id="")]}, "input[0].call_id"),
    ({"input": [_output(output={})]}, "input[0].output"),
    ({"tools": [{"name": "x"}]}, "tools[0].type"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": True}, "temperature"),
    ({"include": ["x", 1]}, "include[1]"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"messages": []}, "messages"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"Input": "x"}, "Input"),
    ({"metadata": {"a": 1}}, "metadata.a"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[f"{at}-{it[1]}" for at, it in enumerate(WRONG)])
def test_a_wrong_field_is_named_by_the_callers_own_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        _read(**fields)
    assert caught.value.param == param
    assert param in caught.value.message


def test_developer_messages_in_the_middle_stay_in_their_place() -> None:
    messages = _messages(USER, {"role": "developer", "content": "Be brief."}, USER)
    assert [it["role"] for it in messages] == ["user", "developer", "user"]
