"""What real clients sent (tests/recordings/clients), on each engine's dialect: each request is answered as its client
needs it, and a conversation that grows reaches the engine with the same bytes.

The engines do as they are asked (tests/support/fakes/obedient.py), so that each answer has all that its API has a form
for: reasoning, text, calls.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection
from itertools import takewhile
from typing import Any

import httpx
import orjson
import pytest
from anthropic.types import MessageTokensCount
from openai.types import CreateEmbeddingResponse

from gateway.translation.messages.conversation import BILLING
from tests.support import judges
from tests.support.faces import events as typed_events
from tests.support.fakes.dialects import ENGINES
from tests.support.fakes.obedient import TEXT, THOUGHTS, fitting, said_to
from tests.support.judges import Said
from tests.support.processes import FakeEngine, GatewayProcess, events
from tests.support.recorded import CLIENTS, REQUESTS, Recorded

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES, COUNTS = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
MODELS, MODEL = "/v1/models", "/v1/models/mock-model"
TALKS = {CHAT, RESPONSES, MESSAGES}
APART = {"continue-cli-1.5.47", "qwen-code-0.24.4"}
ENDS = {CHAT: ("stop", "tool_calls"), RESPONSES: ("completed",) * 2, MESSAGES: ("end_turn", "tool_use")}


@pytest.fixture(scope="module")
def connection(before_all: GatewayProcess) -> Iterator[HTTPConnection]:
    """A connection without headers of its own."""
    with closing(HTTPConnection("127.0.0.1", before_all.port, timeout=30)) as connection:
        yield connection


def send(connection: HTTPConnection, it: Recorded, engine: str) -> httpx.Response:
    """Send a request as its client did, to a model of that engine. Fails if the answer is cut."""
    path = it.path.replace("mock-model", engine) + f"?{it.query}" * bool(it.query)
    body = it.body | {"model": engine} if it.path.startswith("/v1/") and it.body else it.body
    content = b"" if body is None else orjson.dumps(body)
    connection.putrequest(it.method, path, skip_accept_encoding=True)
    for name, value in it.authorized().items():
        connection.putheader(name, value)
    if content:
        connection.putheader("content-length", str(len(content)))
    connection.endheaders(content)
    answer = connection.getresponse()
    return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


# -- what is answered -------------------------------------------------------------------------------------------------


def judged(it: Recorded, answer: httpx.Response) -> list[Said]:
    """What an answer says, which must be valid and whole in every way that its client needs."""
    assert answer.status_code == 200, answer.text
    stream = bool(it.body.get("stream"))
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind == ("text/event-stream" if stream else "application/json")
    if it.path in (RESPONSES, MESSAGES):
        one, many = {
            RESPONSES: (judges.response, judges.response_stream),
            MESSAGES: (judges.message, judges.message_stream),
        }[it.path]
        return [many(typed_events(answer.text)) if stream else one(answer.json())]
    if it.path == CHAT:
        usage = bool((it.body.get("stream_options") or {}).get("include_usage"))
        return judges.chat_stream(events(answer.text), usage=usage) if stream else judges.chat(answer.json())
    usage = bool((it.body.get("stream_options") or {}).get("include_usage"))
    return judges.completion_stream(events(answer.text), usage=usage) if stream else judges.completion(answer.json())


def offered(body: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of a request's tools by their names; of one in a namespace, behind the namespace's."""
    found = {}
    for tool in body.get("tools", ()):
        if tool.get("type") == "namespace":
            found |= {f"{tool['name']}.{it['name']}": it["parameters"] for it in tool["tools"]}
        elif tool.get("type", "function") == "function":
            its = tool.get("function", tool)
            found[its["name"]] = its.get("parameters", its.get("input_schema"))
    return found


def form_of(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the form of text that a request prescribes."""
    form = body.get("response_format") or (body.get("text") or {}).get("format")
    return None if form is None else {"schema": None} | form.get("json_schema", form)


def demands_a_call(body: dict[str, Any]) -> bool:
    choice = body.get("tool_choice") or "auto"
    return (choice.get("type") if isinstance(choice, dict) else choice) not in ("auto", "none")


def assert_complete(it: Recorded, said: Said, seen: dict[str, Any]) -> None:
    """The client has all that the engine said, and what it demanded. `seen` is what the engine was asked."""
    if it.path == COMPLETIONS:
        assert said == Said("".join(TEXT), "", (), "stop")
        return
    tools, spoken = offered(it.body), said_to(seen)
    assert said.thoughts == "".join(THOUGHTS)
    for name, arguments in said.calls:
        assert arguments == fitting(tools[name]), name
    assert said.finish == ENDS[it.path][bool(said.calls)]
    if demands_a_call(it.body):
        assert (said.text, len(said.calls)) == ("", 1)
        return
    assert (said.text, len(said.calls)) == ("".join(spoken["pieces"]), len(spoken.get("calls", ())))
    if form := form_of(it.body):
        assert json.loads(said.text) == (fitting(form["schema"]) if form["schema"] else {"a": 1})
    known = {tool["function"]["name"] for tool in seen.get("tools", ())}
    lost = {name for name in tools if name.replace(".", "__") not in known}
    assert lost == {tool["name"] for tool in it.body.get("tools", ()) if tool.get("defer_loading")} - known


# -- what the engine gets ---------------------------------------------------------------------------------------------


def fields_of(raw: str) -> dict[str, str]:
    """Return the text of each field of a JSON object."""
    found, at, decoder = {}, 1, json.JSONDecoder()
    while raw[at - 1] != "}":
        name, at = decoder.raw_decode(raw, at)
        _, end = decoder.raw_decode(raw, at + 1)
        found[name], at = raw[at + 1 : end], end + 1
    return found


def plain(value: Any) -> Any:
    """Return a conversation without what changes from turn to turn at its client: `cache_control`, and whether a text
    is a block or a string."""
    if isinstance(value, dict):
        if value.keys() - {"cache_control"} == {"type", "text"} and value["type"] == "text":
            return value["text"]
        return {name: plain(it) for name, it in value.items() if name != "cache_control"}
    if isinstance(value, list):
        made = [plain(it) for it in value]
        return made[0] if len(made) == 1 and isinstance(made[0], str) else made
    return value


def conversation(it: Recorded) -> tuple[Any, list[Any]]:
    """Return what stands before a conversation, and its items. Claude Code's first block differs in each."""
    system = it.body.get("system") or it.body.get("instructions")
    if isinstance(system, list):
        system = [block for block in system if BILLING not in block["text"]]
    items = it.body.get("messages", it.body.get("input"))
    whole = plain([items] if isinstance(items, str) else items) if it.path == MESSAGES else items
    return (it.path, plain(system), it.body.get("tool_choice")), whole if isinstance(whole, list) else [whole]


def grown(sent: list[Recorded]) -> list[tuple[int, int]]:
    """Return the pairs of requests of which the second continues the first one's conversation."""
    told = [conversation(it) for it in sent]
    return [
        (number, other)
        for number, (before, items) in enumerate(told)
        for other, (again, longer) in enumerate(told)
        if before == again and len(items) < len(longer) and items == longer[: len(items)]
    ]


def opening(items: list[Any]) -> list[Any]:
    """Return what stands before the first answer in a conversation."""
    asked = ("system", "developer", "user")
    return list(takewhile(lambda it: isinstance(it, str) or it.get("role") in asked, items))


def alike(sent: list[Recorded]) -> list[tuple[int, int]]:
    """Return the pairs of requests that have the same opening, of which one goes on behind it."""
    told = [(before, items, opening(items)) for before, items in map(conversation, sent)]
    return [
        (number, other)
        for number, (before, items, opened) in enumerate(told)
        for other, (again, _, begun) in enumerate(told)
        if before == again and opened == begun and number != other and len(items) > len(opened)
    ]


def assert_prefixes(sent: list[Recorded], got: list[dict[str, str]]) -> None:
    """A conversation reaches the engine, byte for byte, as the beginning of each one that continues it. Equal openings
    reach it as equal ones."""
    for first, second in alike(sent):
        made = [opening(json.loads(got[it]["messages"])) for it in (first, second)]
        assert json.dumps(made[0]) == json.dumps(made[1]), (sent[first], sent[second])
    for first, second in grown(sent):
        assert got[second]["messages"].startswith(got[first]["messages"].removesuffix("]")), (sent[first], sent[second])
        if plain(sent[first].body.get("tools")) == plain(sent[second].body.get("tools")):
            assert got[first].get("tools") == got[second].get("tools")


# -- the replay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("client", CLIENTS)
def test_every_recorded_request_is_answered_as_its_client_needs_it(
    connection: HTTPConnection, fakes: dict[str, FakeEngine], client: str, engine: str
) -> None:
    fake = fakes[engine]
    fake.set(context=200_000, obeys=True)
    sent, got = [], []
    for it in turns(client):
        answer = send(connection, it, engine)
        if not other(it, answer, engine):
            *_, last = fake.taken(COMPLETIONS if it.path == COMPLETIONS else CHAT)
            for said in judged(it, answer):
                assert_complete(it, said, last["body"])
            if it.path != COMPLETIONS:
                sent.append(it)
                got.append(fields_of(last["raw"]))
    assert_prefixes(sent, got)


def turns(client: str) -> list[Recorded]:
    """Return a client's requests. Of two, no two recorded requests belong to one conversation: each that goes on
    with one is then followed by the one that must have begun it."""
    found = []
    for it in (it for it in REQUESTS if it.client == client):
        found.append(it)
        if client in APART and it.path == CHAT:
            begun = opening(it.body["messages"])
            found += [replace(it, body=it.body | {"messages": begun})] * (begun != it.body["messages"])
    return found


def other(it: Recorded, answer: httpx.Response, engine: str) -> bool:
    """Whether a request is not for an answer, or for one that it does not get. Checks what it gets instead."""
    if it.method == "GET" and it.path == RESPONSES:  # Codex tries a WebSocket seven times, unless it is told not to
        assert (answer.status_code, answer.headers["allow"]) == (426, "POST")
    elif it.path.startswith("/api/"):
        assert answer.status_code == 404
        assert "use an OpenAI client, with a base URL that ends in /v1" in answer.json()["error"]["message"]
    elif it.authorized() == it.headers and it.path == MODELS:  # codex --oss has no key
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    elif it.method == "GET":
        told = answer.json()
        found = [told] if it.path == MODEL else told["data"]
        assert engine in [model["id"] for model in found]
        for model in found:
            judges.model(model)
    elif it.path == COUNTS:
        judges.strictly(MessageTokensCount, answer.json())
        assert answer.json()["input_tokens"] > 0
    elif it.path == EMBEDDINGS:
        inputs = it.body["input"] if isinstance(it.body["input"], list) else [it.body["input"]]
        judges.strictly(CreateEmbeddingResponse, answer.json(), more=True)
        assert [vector["index"] for vector in answer.json()["data"]] == list(range(len(inputs)))
    elif "previous_response_id" in it.body:  # what the gateway keeps is somebody else's
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "previous_response_id")
    elif engine == "ollama" and isinstance(it.body.get("prompt"), list):  # it takes one, and the answer says so
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    else:
        return False
    return True


def test_the_replay_has_every_recorded_request() -> None:
    """And of each client but one, which never went on with a conversation, pairs whose bytes are compared."""
    assert len(REQUESTS) == 195
    talks = {client: [it for it in turns(client) if it.method == "POST" and it.path in TALKS] for client in CLIENTS}
    assert {client for client, sent in talks.items() if not grown(sent)} == {"llamaindex-js-0.12.1"}
    assert sum(len(grown(sent)) + len(alike(sent)) for sent in talks.values()) > 100
