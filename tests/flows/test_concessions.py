"""A translated request that an engine refuses for its roles or for a tool's pattern is asked in another form, and a
header says so.

A gateway remembers what an engine refused, so each test goes from an engine that takes everything to one that does not.
"""

from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest

from tests.support.faces import APIS, MESSAGES_API, RESPONSES, Api, script
from tests.support.fakes.dialects import ENGINES
from tests.support.processes import KEY, NO_TLS, FakeEngine, GatewayProcess

CHAT = "/v1/chat/completions"
IGNORED, ROLES, FORCED = "x-stack-ignored-params", "x-stack-changed-roles", "x-stack-forced-tools"
STRICT = {"x-stack-strict": "true"}
EACH = pytest.mark.parametrize("engine", ENGINES)
BOTH = pytest.mark.parametrize("api", APIS.values(), ids=APIS)

CODEX: list[dict[str, Any]] = [
    {"role": "developer", "content": "rules"},
    {"role": "developer", "content": "more"},
    {"role": "user", "content": "Hello"},
    {"role": "developer", "content": "now"},
    {"role": "assistant", "content": "Hi."},
    {"role": "developer", "content": "and"},
    {"role": "user", "content": "Go on."},
]
CLAUDE: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello"},
    {"role": "system", "content": "now"},
    {"role": "assistant", "content": "Hi."},
    {"role": "system", "content": "and"},
    {"role": "user", "content": "Go on."},
]


@pytest.fixture(scope="module")
def http(before_all: GatewayProcess) -> Iterator[httpx.Client]:
    with before_all.client() as client:
        yield client


@pytest.fixture
def fake(fakes: dict[str, FakeEngine], engine: str) -> Iterator[FakeEngine]:
    fakes[engine].set()
    yield fakes[engine]
    fakes[engine].set(one_system=False, alternating=False, anchored=False)


def body(api: Api, engine: str, turns: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    field = {"responses": "input", "messages": "messages"}[api.name]
    return api.body(model=engine, **more) | {field: turns}


def asked(fake: FakeEngine) -> list[list[dict[str, Any]]]:
    return [it["body"]["messages"] for it in fake.asked(CHAT)]


def roles(messages: list[dict[str, Any]]) -> list[str]:
    return [it["role"] for it in messages]


@BOTH
def test_a_refusal_that_another_form_does_not_help_is_told_as_it_came_first(http: httpx.Client, api: Api) -> None:
    refused = {"error": {"message": "It is wrong.", "type": "BadRequestError", "param": None, "code": 400}}
    turns = [*{"responses": CODEX, "messages": CLAUDE}[api.name], {"role": "assistant", "content": "Well."}]
    turns.append({"role": "user", "content": script(["json", [400, refused]])})
    answer = http.post(api.path, json=body(api, "vllm", turns, stream=True))
    assert (answer.status_code, api.error(answer.json())[1]) == (400, "It is wrong.")
    assert ROLES not in answer.headers


@EACH
def test_a_developers_message_in_the_midst_follows_the_rule_of_its_engine(
    http: httpx.Client, fake: FakeEngine, engine: str
) -> None:
    taken = http.post(RESPONSES.path, json=body(RESPONSES, engine, CODEX))
    name = "system" if engine == "ollama" else "developer"
    assert roles(asked(fake)[0]) == [name, name, "user", name, "assistant", name, "user"]
    assert taken.headers.get(ROLES) == ("developer=system" if engine == "ollama" else None)

    fake.set(one_system=True)
    strict = http.post(RESPONSES.path, json=body(RESPONSES, engine, CODEX), headers=STRICT)
    assert (strict.status_code, len(asked(fake))) == (400, 1)
    assert "System message must be at the beginning" in strict.json()["error"]["message"]

    for tries, stream in ((3, False), (4, True)):  # the second answer is right at once
        answer = http.post(RESPONSES.path, json=body(RESPONSES, engine, CODEX, stream=stream))
        assert answer.status_code == 200
        assert "one two three" in answer.text
        assert len(asked(fake)) == tries
        changes = {"ollama": "developer=system,system=user"}.get(engine, "developer=system,developer=user")
        assert answer.headers[ROLES] == changes
        assert asked(fake)[-1] == [
            {"role": "system", "content": "rules\n\nmore"},
            {"role": "user", "content": "Hello\n\nnow"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "and\n\nGo on."},
        ]


@EACH
def test_a_system_message_in_the_midst_stays_in_its_place_or_becomes_the_users(
    http: httpx.Client, fake: FakeEngine, engine: str
) -> None:
    fake.set(one_system=True)
    answer = http.post(MESSAGES_API.path, json=body(MESSAGES_API, engine, CLAUDE, system="rules"))
    assert (answer.status_code, answer.headers[ROLES]) == (200, "system=user")
    whole = asked(fake)[-1]
    assert roles(whole) == ["system", "user", "assistant", "user"]
    for count in (2, 3):  # what is asked now is the beginning of what is asked next
        http.post(MESSAGES_API.path, json=body(MESSAGES_API, engine, CLAUDE[:count], system="rules"))
        assert orjson.dumps(asked(fake)[-1]) == orjson.dumps(whole[:count])
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    seen = [{"role": "user", "content": [image]}, {"role": "system", "content": "now"}]
    http.post(MESSAGES_API.path, json=body(MESSAGES_API, engine, seen))
    assert roles(asked(fake)[-1]) == ["user"]
    assert [it["type"] for it in asked(fake)[-1][0]["content"]] == ["image_url", "text"]
    plain = http.post(MESSAGES_API.path, json=MESSAGES_API.body(model=engine, system="rules"))
    assert (plain.status_code, plain.headers.get(ROLES)) == (200, None)


PICTURE = "data:image/png;base64,iVBORw0KGgo="
TURNS: dict[str, list[dict[str, Any]]] = {
    "responses": [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "Hm."},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "So."}]},
        {"role": "assistant", "content": "I do."},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": PICTURE}]},
        {"role": "user", "content": "And?"},
    ],
    "messages": [
        {"role": "user", "content": "Look"},
        {"role": "user", "content": "here."},
        {"role": "assistant", "content": "Hm."},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]},
        {"role": "user", "content": "And?"},
    ],
}
JOINED: dict[str, list[tuple[str, Any]]] = {
    "responses": [
        ("user", "Look."),
        ("assistant", "Hm.\n\nI do."),
        ("tool", ""),
        (
            "user",
            [
                {"type": "text", "text": "The images that the tools returned:"},
                {"type": "image_url", "image_url": {"url": PICTURE}},
                {"type": "text", "text": "And?"},
            ],
        ),
    ],
    "messages": [
        ("user", "Look\n\nhere."),
        ("assistant", "Hm."),
        ("tool", "x"),
        ("user", "And?"),
    ],
}


@EACH
def test_messages_in_a_row_of_one_role_are_joined_for_a_template_that_refuses_them(
    http: httpx.Client, fake: FakeEngine, engine: str
) -> None:
    for number, api in enumerate(APIS.values()):
        request = body(api, engine, TURNS[api.name])
        fake.set(alternating=True)
        if not number:
            assert http.post(api.path, json=request, headers=STRICT).status_code == 400
            fake.set(alternating=True)
        answers = [http.post(api.path, json=request | {"stream": stream}) for stream in (False, True)]
        assert [it.status_code for it in answers] == [200, 200], answers[0].text
        assert len(asked(fake)) == (2 if number else 3)  # it is remembered
        sent = asked(fake)[-1]
        assert [(it["role"], it["content"]) for it in sent] == JOINED[api.name]
        assert [it["id"] for it in sent[1]["tool_calls"]] == ["c"]
        thought = sent[1].get("reasoning" if engine == "ollama" else "reasoning_content")
        assert thought == ("So." if api is RESPONSES else None)


GREP = {
    "type": "object",
    "properties": {
        "pattern": {"type": "string", "pattern": "\\S"},
        "id": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "paths": {"type": "array", "items": {"type": "string", "pattern": "^/"}},
    },
    "required": ["pattern"],
}
BARE = {
    "type": "object",
    "properties": {
        "pattern": {"type": "string"},
        "id": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "paths": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["pattern"],
}
TOOLS: dict[str, dict[str, Any]] = {
    "responses": {"type": "function", "name": "grep", "parameters": GREP},
    "messages": {"name": "grep", "input_schema": GREP},
}
DROPPED = {"responses": "tools.parameters.pattern", "messages": "tools.input_schema.pattern"}


@EACH
def test_a_pattern_that_the_engine_cannot_compile_is_left_out_and_named(
    http: httpx.Client, fake: FakeEngine, engine: str
) -> None:
    for number, api in enumerate(APIS.values()):
        request = api.body(model=engine, tools=[TOOLS[api.name]])
        if not number:
            assert IGNORED not in http.post(api.path, json=request).headers
        fake.set(anchored=True)
        assert http.post(api.path, json=request, headers=STRICT).status_code == 400
        answer = http.post(api.path, json=request)
        assert (answer.status_code, answer.headers[IGNORED]) == (200, DROPPED[api.name])
        schemas = [it["body"]["tools"][0]["function"]["parameters"] for it in fake.asked(CHAT)]
        assert schemas == ([GREP, GREP, BARE] if not number else [GREP, BARE])  # it is remembered


@EACH
def test_a_demanded_call_is_constrained_without_such_a_pattern_and_checked_with_it(
    http: httpx.Client, fake: FakeEngine, engine: str
) -> None:
    fake.set(anchored=True)
    good, wrong = ({"pattern": "x", "paths": [it]} for it in ("/tmp", "tmp"))
    choice = {"type": "any"}
    for call, status in ((good, 200), (wrong, 502)):
        text = script(["says", {"good": [["grep", call]]}])
        request = MESSAGES_API.body(text, model=engine, tools=[TOOLS["messages"]], tool_choice=choice)
        answer = http.post(MESSAGES_API.path, json=request)
        assert answer.status_code == status, answer.text
        if status == 200:
            assert answer.json()["content"][0]["input"] == call
            assert answer.headers.get(FORCED) == (None if engine == "vllm" else "schema,no-pattern")
            assert (answer.headers.get(IGNORED) is None) == (engine != "vllm")


def test_claude_codes_discovery_finds_the_aliases_that_it_keeps(before_all: GatewayProcess) -> None:
    """It keeps the ids that contain "claude" or "anthropic", shows `display_name`, and follows no redirect."""
    both = {"authorization": f"Bearer {KEY}", "x-api-key": "another"}
    for key in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, both):
        headers = {"anthropic-version": "2023-06-01", **key}
        url = before_all.url + "/v1/models?limit=1000"
        answer = httpx.get(url, headers=headers, follow_redirects=False, verify=NO_TLS)
        listed = answer.json()
        assert (answer.status_code, listed["has_more"]) == (200, False)
        kept = [it for it in listed["data"] if "claude" in it["id"] or "anthropic" in it["id"]]
        assert [(it["type"], it["id"], it["display_name"]) for it in kept] == [
            ("model", "claude-local", "claude-local")
        ]
        assert kept[0]["created_at"].endswith("Z")
        assert listed["data"][0]["id"] == listed["first_id"]
    refused = httpx.get(before_all.url + "/v1/models?limit=1001", headers=headers, verify=NO_TLS)
    assert refused.status_code == 400
