"""The Responses API against recordings: what real clients sent, and the streams that all of them accepted."""

import re
from typing import Any

import orjson
import pytest

from gateway.errors import ContextExceeded, InternalError
from gateway.translation.responses import Asked, read
from tests.support.recorded import posted
from tests.support.responses_answers import RECORDED, asked, events_of, recorded_chunks, streamed, types

REQUESTS = {str(it): it.body for it in posted("/v1/responses")}
CODEX = "codex-0.171.0/"


def _read(body: dict[str, Any]) -> Asked:
    return read(body, request_id="r1", now=1, stores=True)


def _codex(number: str) -> Asked:
    return _read(next(body for name, body in REQUESTS.items() if name.startswith(f"{CODEX}{number}")))


@pytest.mark.parametrize("name", REQUESTS)
def test_every_recorded_request_is_read_and_its_last_words_are_kept(name: str) -> None:
    body = REQUESTS[name]
    request = _read(body)
    chat = request.chat
    assert chat["model"] == body["model"]
    assert request.stream == (body.get("stream") is True) == ("stream_options" in chat)
    assert set(request.ignored) <= {"tools.web_search"}
    last = body["input"] if isinstance(body["input"], str) else body["input"][-1]
    said = last if isinstance(last, str) else last.get("content") or last["output"]
    said = said if isinstance(said, str) else said[-1]["text"]
    content = chat["messages"][-1]["content"]
    assert said in (content if isinstance(content, str) else content[-1]["text"])
    assert chat.get("max_completion_tokens") == body.get("max_output_tokens")
    assert ("response_format" in chat) == ("format" in body.get("text", {}))
    assert orjson.dumps(_read(orjson.loads(orjson.dumps(body))).chat) == orjson.dumps(chat)


def test_each_turn_of_codex_begins_with_the_same_bytes() -> None:
    turns = [_codex(number).chat for number in ("02", "03", "05", "06")]
    begin = [orjson.dumps([it["tools"], it["messages"][:4]]) for it in turns]
    assert begin == begin[:1] * 4
    assert orjson.dumps(_codex("16").chat["messages"][:3]) == orjson.dumps(turns[0]["messages"][:3])


@pytest.mark.parametrize("client", ["openai-node", "langchain-js", "openai-agents-js", "pi", "vercel"])
def test_a_second_request_of_a_client_keeps_the_bytes_of_its_first(client: str) -> None:
    bodies = [body for name, body in REQUESTS.items() if name.startswith(client)]
    second = next(it for it in bodies if any(i.get("type") == "function_call" for i in it["input"] if type(i) is dict))
    texts = [_read(it).chat["messages"] for it in bodies]
    grown = _read(second).chat["messages"]
    assert any(orjson.dumps(grown[: len(it)]) == orjson.dumps(it) and len(it) < len(grown) for it in texts)


def test_codex_tools_are_offered_and_its_web_search_is_named() -> None:
    request = _codex("08")
    names = [it["function"]["name"] for it in request.chat["tools"]]
    assert names[:2] == ["exec_command", "write_stdin"]
    assert "multi_agent_v1__close_agent" in names
    assert "mcp__lab__look_up" in names
    assert request.ignored == ("tools.web_search",)


def test_codex_history_of_a_namespaced_call_has_the_name_that_its_tool_is_offered_under() -> None:
    request = _codex("09")
    assistant, tool = request.chat["messages"][-2:]
    name = assistant["tool_calls"][0]["function"]["name"]
    assert name in [it["function"]["name"] for it in request.chat["tools"]]
    assert tool["content"] == "Wall time: 0.0061 seconds\nOutput:\nit means nothing"
    assert tool["tool_call_id"] == assistant["tool_calls"][0]["id"]


def test_codex_reasoning_is_read_from_summary_and_from_content() -> None:
    for number in ("04", "05"):  # content: null, and content with reasoning_text
        message = _codex(number).chat["messages"][-2]
        assert message["reasoning_content"] == "Let me think."
        assert message["tool_calls"][0]["function"]["name"] == "exec_command"


def test_codex_broken_arguments_are_kept_inside_of_an_object() -> None:
    arguments = _codex("06").chat["messages"][-2]["tool_calls"][0]["function"]["arguments"]
    assert orjson.loads(arguments) == {"raw": '{"command": '}


def test_codex_image_is_a_part_of_chat_with_its_detail() -> None:
    parts = _codex("13").chat["messages"][-1]["content"]
    assert [it["type"] for it in parts] == ["text", "image_url", "text", "text"]
    assert parts[1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert parts[1]["image_url"]["detail"] == "high"


def test_codex_output_schema_is_chats_response_format() -> None:
    form = _codex("14").chat["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["name"] == "codex_output_schema"
    assert form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"]["required"] == ["name"]


NAMESPACE = {
    "type": "namespace",
    "name": "mcp__lab",
    "description": "A lab.",
    "tools": [{"type": "function", "name": "look_up", "parameters": {"type": "object"}, "strict": False}],
}
# The recorded chat stream beside the Responses stream that tells the same, with the request's fields that make it so.
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "responses-text.sse": ("chat-text.sse", {}),
    "responses-text-minimal.sse": ("chat-text-minimal.sse", {}),
    "responses-reason.sse": ("chat-reason.sse", {}),
    "responses-reason-summary.sse": ("chat-reason.sse", {"reasoning": {"summary": "auto"}}),
    "responses-reasonboth.sse": ("chat-reasonboth.sse", {}),
    "responses-tool.sse": ("chat-tool.sse", {}),
    "responses-tool-minimal-one.sse": ("chat-tool-minimal-one.sse", {}),
    "responses-two.sse": ("chat-two.sse", {}),
    "responses-tool-tool-look-up-ns-mcp-lab.sse": ("chat-tool.sse", {"tools": [NAMESPACE]}),
    "responses-text-incomplete-max-output-tokens.sse": ("chat-text.sse", {}),
}


def _events(name: str) -> list[dict[str, Any]]:
    return events_of((RECORDED / "answers" / name).read_bytes())


def _as_recorded(chunks: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chunks with the calls of the Responses stream, whose tools and arguments have other names."""
    calls = [it["item"] for it in events if it["type"] == "response.output_item.done" and "call_id" in it["item"]]
    pieces = iter([it["delta"] for it in events if it["type"] == "response.function_call_arguments.delta"])
    for chunk in chunks:
        for choice in chunk["choices"]:
            for piece in choice["delta"].get("tool_calls", ()):
                if "id" in piece:
                    it = calls[piece["index"]]
                    piece["id"] = it["call_id"]
                    flat = f"{it['namespace']}__{it['name']}" if "namespace" in it else it["name"]
                    piece["function"]["name"] = flat
                if piece["function"]["arguments"]:
                    piece["function"]["arguments"] = next(pieces)
    return chunks


def _without(event: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {
        name: _without(it, names) if isinstance(it, dict) else it for name, it in event.items() if name not in names
    }


def _assert_holds(made: Any, wanted: Any, where: str) -> None:
    """Every field of the recorded event is in ours, with the same value."""
    if isinstance(wanted, dict):
        for name, value in wanted.items():
            assert name in made, f"{where}.{name}"
            _assert_holds(made[name], value, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(made) == len(wanted), where
        for index, value in enumerate(wanted):
            _assert_holds(made[index], value, f"{where}[{index}]")
    else:
        assert made == wanted, where


@pytest.mark.parametrize("name", PAIRS)
def test_each_event_of_a_stream_that_all_clients_accepted_is_written(name: str) -> None:
    chat, fields = PAIRS[name]
    wanted = _events(name)
    request = asked(**fields, store=False)
    chunks = _as_recorded(recorded_chunks(chat), wanted)
    aside = set(fields)  # what the recorded server echoed is not what this request says
    if "incomplete" in name:
        # The recorded server called the cut item completed.
        wanted = orjson.loads(orjson.dumps(wanted).replace(b'"completed"', b'"incomplete"'))
        for it in chunks:
            for choice in it["choices"]:
                choice["finish_reason"] = choice["finish_reason"] and "length"
    made = streamed(request, chunks)
    if "minimal" in name:
        made = [it for it in made if it["type"] in types(wanted)]
    assert types(made) == types(wanted)
    for ours, its in zip(made, wanted, strict=True):
        told = orjson.loads(re.sub(rb"_mock_(\d)", rb"_mock\1", orjson.dumps(ours)))
        _assert_holds(told, _without(its, aside), its["type"])


def test_the_recorded_broken_stream_is_written_up_to_its_error_and_then_fails() -> None:
    wanted = _events("responses-text-error-server-error.sse")
    writer = asked(store=False).writer
    chunks = recorded_chunks("chat-text-error-server-error.sse")[:2]  # the chat stream goes on for one chunk more
    stream = writer.head() + b"".join(map(writer.chunk, chunks))
    made = events_of(stream + writer.failed(InternalError("The mock broke in the midst.", code="server_error")))
    assert types(made) == [*types(wanted), "response.failed"]
    _assert_holds(made[-2], _without(wanted[-1], {"sequence_number"}), "error")
    assert made[-1]["response"]["status"] == "failed"
    assert made[-1]["response"]["error"] == {"code": "server_error", "message": "The mock broke in the midst."}


def test_a_context_that_is_too_long_fails_as_the_recorded_stream_does() -> None:
    wanted = _events("responses-text-failed-context-length-exceeded.sse")[-1]
    writer = asked(store=False).writer
    made = events_of(writer.head() + writer.failed(ContextExceeded("Too long", param="input")))[-1]
    _assert_holds(made, _without(wanted, {"sequence_number", "usage"}), "failed")
