"""The kinds of requests that are sent while engines and workers are killed (tests/support/deaths.py): a table, to which
a kind is added as a row."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.support import faces, soak
from tests.support.fakes.thinker import THINKERS
from tests.support.processes import MESSAGES, events
from tests.support.soak import CUT_OFF

PATHS = soak.PATHS | {name: api.path for name, api in faces.APIS.items()}
PACE = 0.01  # seconds between two events of an engine
PIECES = ["Well", ",", " then", ":\n", " one", " two", " three", " 🚀", " four", "."]
THINKS = ["Let", " me", " see", "."]
OBJECT = ['{"', "city", '":', ' "', "Par", "is", '",', ' "n', '": ', "12", "}"]
CALL = [
    ["event", {"choices": [{"index": 0, "delta": {"role": "assistant", "tool_calls": [it]}, "finish_reason": None}]}]
    for it in (
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}},
        *({"index": 0, "function": {"arguments": piece}} for piece in OBJECT),
    )
]
TWO = [
    ["event", {"choices": [{"index": number, "delta": {"content": piece}, "finish_reason": None}]}]
    for piece in PIECES
    for number in (0, 1)
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
USUAL_END = [["usage"], ["done"], ["end"]]


@dataclass(frozen=True)
class Kind:
    """A kind of request. `answer` is what the fake model knows (tests/support/fakes/model.py), or else `script` what
    its engine does; `whole` is the answer, as `_said` puts it together. `on`: engines go on with it. `marks`: the
    tokens of its tags, which an engine counts if it goes on with a raw answer."""

    weight: float
    model: str
    whole: Any
    fields: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] | None = None
    script: list[Any] | None = None
    path: str = "chat"
    stream: bool = True
    on: bool = True
    marks: int = 0

    @property
    def tokens(self) -> int:
        """How many the whole has, as its engine counts them."""
        if self.script is not None and self.script[0][0] == "write":
            return sum(len(it["pieces"]) + len(it.get("thinks", ())) for it in self.script[0][1]["choices"])
        if self.script is not None:
            return len([it for it in self.script if it[0] == "event" and it[1]["choices"][0]["delta"]])
        answer = {"pieces": PIECES, "thinks": []} | (self.answer or {})
        return len(answer["pieces"]) + len(answer["thinks"])

    def body(self, name: str) -> bytes:
        """The request that has this name."""
        if self.path in faces.APIS:
            said = {"dialect": self.model, "pieces": PIECES, "pace": PACE, "name": name}
            asked = faces.APIS[self.path].body(faces.script(["answer", said]), model=self.model, temperature=0)
            return json.dumps(asked | {"stream": self.stream}).encode()
        script = self.script or [["answer", {"dialect": self.model, "pieces": PIECES} | (self.answer or {})]]
        known = {"user": name, "script": script, "pace": PACE}
        # A raw request to Ollama has no field for a script, so the message holds it, too.
        raw = [{"role": "user", "content": f"Say it. #{json.dumps(known)}"}]
        messages = raw if self.model.startswith("ollama") else MESSAGES
        asked = {"prompt": ""} if self.path == "completion" else {"messages": messages}
        return json.dumps(
            {"model": self.model, "stream": self.stream, "temperature": 0} | asked | known | self.fields
        ).encode()


TEXT = {0: "".join(PIECES)}
KINDS = {
    **{f"a stream of {it}": Kind(6, it, TEXT) for it in ("vllm", "llamacpp", "ollama")},
    **{f"a blocking answer of {it}": Kind(3, it, TEXT, stream=False) for it in ("vllm", "llamacpp", "ollama")},
    "a completion": Kind(3, "vllm", TEXT, path="completion"),
    **{
        f"a schema at {it}": Kind(3, it, {0: "".join(OBJECT)}, {"response_format": FORMAT}, {"pieces": OBJECT})
        for it in ("vllm", "llamacpp")
    },
    **{
        f"reasoning of {it}": Kind(3, it, {0: "".join([*THINKS, *PIECES])}, {}, {"thinks": THINKS})
        for it in ("vllm", "llamacpp", "ollama")
    },
    **{
        f"reasoning that {it} goes on with": Kind(
            3,
            f"{it}-thinker",
            {0: "".join([*THINKS, *PIECES])},
            script=[["write", {"dialect": it, "choices": [{"thinks": THINKS, "pieces": PIECES}]}]],
            marks=marks,
        )
        for it, marks in (("llamacpp", 0), ("ollama", len(THINKERS["thinker"].closes)))
    },
    "a tool call": Kind(
        2,
        "vllm",
        {0: "weather" + "".join(OBJECT)},
        {"tools": [TOOL]},
        script=[*CALL, ["finish", "tool_calls"], *USUAL_END],
    ),
    "two choices that are not continued": Kind(
        2,
        "vllm",
        {0: TEXT[0], 1: TEXT[0]},
        {"n": 2},
        script=[
            *TWO,
            *(["event", {"choices": [{"index": it, "delta": {}, "finish_reason": "stop"}]}] for it in (0, 1)),
            *USUAL_END,
        ],
        on=False,
    ),
    **{
        f"two choices of {it}": Kind(
            2,
            it,
            {0: TEXT[0], 1: "".join(THINKS)},
            {"n": 2, "seed": 5},
            script=[["write", {"dialect": it, "choices": [{"pieces": PIECES}, {"pieces": THINKS}], "seed": 5}]],
        )
        for it in ("vllm", "llamacpp", "ollama")
    },
    **{
        f"a stream of {path} on {it}": Kind(2, it, TEXT, path=path)
        for path in faces.APIS
        for it in ("vllm", "llamacpp")
    },
}


def _said(kind: Kind, body: bytes) -> dict[int, str]:
    """All that an answer's choices say, one thing after another."""
    chunks = events(body.decode())[:-1] if kind.stream else [json.loads(body)]
    said: defaultdict[int, str] = defaultdict(str)
    for choice in (it for chunk in chunks for it in chunk["choices"]):
        part = choice.get("delta") or choice.get("message") or choice
        calls = [it["function"] for it in part.get("tool_calls") or ()]
        texts = (part.get(name) for name in ("reasoning", "reasoning_content", "content", "text"))
        said[choice["index"]] += "".join(filter(None, texts))
        said[choice["index"]] += "".join((it.get("name") or "") + it["arguments"] for it in calls)
    return dict(said)


def verdict(kind: Kind, status: int, body: bytes) -> str:
    """`whole`, or the code of the error that an answer honestly ends with; anything else is said in a sentence."""
    if kind.path in faces.APIS:
        return _of_face(kind, faces.APIS[kind.path], status, body)
    if status == 200 and body.endswith(CUT_OFF):
        last = [{}, *events(body.removesuffix(CUT_OFF).decode())][-1] if kind.stream else {}
        error = last.get("error") if isinstance(last, dict) else None
        return str(error["code"]) if error else "cut off"
    if status != 200:
        return str(json.loads(body)["error"]["code"])
    if kind.stream and not body.rstrip().endswith(b"data: [DONE]"):
        return f"a clean end without [DONE]: {body[-200:]!r}"
    said = _said(kind, body)
    return "whole" if said == kind.whole else f"another answer: {said}"


def _of_face(kind: Kind, api: faces.Api, status: int, body: bytes) -> str:
    """The same of another API, whose streams do not tell the gateway's codes."""
    if status != 200:
        error = json.loads(body)
        return str(error["error"].get("code") or _code(api.error(error)[1]))
    told = faces.events(body.removesuffix(CUT_OFF).decode())
    last = told[-1] if told else {"type": ""}
    if body.endswith(CUT_OFF):
        return _code(str(last)) if last["type"] == api.failed else "cut off"
    if last["type"] != api.last:
        return f"a clean end without {api.last}: {body[-200:]!r}"
    said = {0: faces.text_of(told)}
    return "whole" if said == kind.whole else f"another answer: {said}"


def _code(message: str) -> str:
    return "engine_failed" if "The request may be the reason" in message else "engine_error"
