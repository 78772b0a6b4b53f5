"""Messages requests that are wrong: each is refused, by the caller's own path."""

from typing import Any

import pytest

from gateway.errors import BadRequest
from gateway.translation.messages.conversation import BILLING
from tests.support.message_requests import IMAGE, TOOL, asked, assistant, call, image, result, text, user

DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"a": DEEP}
URL = {"type": "url", "url": "http://10.0.0.1/"}
TIFF = IMAGE["source"] | {"media_type": "image/tiff"}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": None}),
    ("model", {"model": ""}),
    ("max_tokens", {"max_tokens": None}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": True}),
    ("max_tokens", {"max_tokens": 1.5}),
    ("max_tokens", {"max_tokens": 2**64}),
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": [user("a")] * 100_001}),
    ("messages[0]", {"messages": ["hi"]}),
    ("messages[0].role", {"messages": [{"role": "tool", "content": "a"}]}),
    ("messages[1].content", {"messages": [user("a"), assistant(None)]}),
    ("messages[0].content[1]", {"messages": [user([text("a"), "b"])]}),
    ("messages[0].content[0].text", {"messages": [user([text("a") | {"text": None}])]}),
    ("messages[0].content[0].type", {"messages": [user([{"type": "container_upload"}])]}),
    ("messages[0].content[0].type", {"messages": [assistant([IMAGE])]}),
    ("messages[0].content[0].type", {"messages": [{"role": "system", "content": [IMAGE]}]}),
    ("messages[0].content[0].source", {"messages": [user([{"type": "image"}])]}),
    ("messages[0].content[0].source.url", {"messages": [user([image(URL)])]}),
    ("messages[0].content[0].source.type", {"messages": [user([image({"type": "file"})])]}),
    ("messages[0].content[0].source.media_type", {"messages": [user([image(TIFF)])]}),
    ("messages[0].content[0].source.data", {"messages": [user([image(IMAGE["source"] | {"data": "no base64"})])]}),
    ("messages[0].content[0].tool_use_id", {"messages": [user([result("a") | {"tool_use_id": None}])]}),
    ("messages[0].content[0].is_error", {"messages": [user([result("a", is_error="yes")])]}),
    ("messages[0].content[0].content[0].tool_name", {"messages": [user([result([{"type": "tool_reference"}])])]}),
    ("messages[0].content[0].content[0].type", {"messages": [user([result([result("a")])])]}),
    ("messages[0].content[0].input", {"messages": [assistant([call() | {"input": "text"}])]}),
    ("messages[0].content[0].input", {"messages": [assistant([call(given=DEEP)])]}),
    ("messages[0].content[0].name", {"messages": [assistant([call() | {"name": ""}])]}),
    ("system", {"system": 1}),
    ("system[1].text", {"system": [text(BILLING), {"type": "text"}]}),
    ("system[0].type", {"system": [IMAGE]}),
    ("stream", {"stream": 1}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": 2}),
    ("top_k", {"top_k": -1}),
    ("stop_sequences", {"stop_sequences": "END"}),
    ("stop_sequences[1]", {"stop_sequences": ["END", None]}),
    ("tools", {"tools": {}}),
    ("tools[0].name", {"tools": [{"input_schema": {}}]}),
    ("tools[0].input_schema", {"tools": [{"name": "a"}]}),
    ("tools[0].type", {"tools": [{"type": 1}]}),
    ("tools[1].name", {"tools": [TOOL, TOOL]}),
    ("tool_choice.type", {"tools": [TOOL], "tool_choice": {"type": "must"}}),
    ("tool_choice.name", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}),
    ("thinking.type", {"thinking": {}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled"}}),
    ("output_config", {"output_config": "high"}),
    ("output_config.effort", {"output_config": {"effort": "huge"}}),
    ("output_config.format.schema", {"output_config": {"format": {"type": "json_schema"}}}),
    ("output_format", {"output_format": {}, "output_config": {"format": {}}}),
    ("context_management.edits", {"context_management": {"edits": 1}}),
    ("container", {"container": "c1"}),
    ("mcp_servers", {"mcp_servers": [{}]}),
    ("n", {"n": 2}),
    ("stop", {"stop": ["END"]}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("a b", {"a b": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "fields"), WRONG)
def test_what_is_wrong_is_named_by_the_callers_path(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        asked(**fields)
    assert caught.value.param == param
    assert f"'{param}'" in caught.value.message


def test_more_unknown_fields_than_a_header_carries_are_refused() -> None:
    with pytest.raises(BadRequest, match="more than 32 unknown fields"):
        asked(**{f"x{index}": 1 for index in range(33)})
