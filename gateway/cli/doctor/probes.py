"""Probes: try through the gateway what its default model's engine can really do.

Each prompt has a mark in it, and the key is a short-lived one. `make doctor` looks for both in the logs.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from gateway.cli.doctor.check import Check
from gateway.headers import REQUEST_ID
from gateway.llm import LLM, LLMConfig, LLMError

SHORT, ROOM = 16, 500  # tokens of an answer; the second for one whose end a grammar decides, reasoning included
UNSUPPORTED = (400, 404, 422, 501)
TOOL = {
    "type": "function",
    "function": {
        "name": "note",
        "description": "Write down a number.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["number"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


class Fault(Exception):
    """Say what is wrong with an answer."""


class Undecided(Exception):
    """Say why an answer shows nothing."""


@dataclass(frozen=True, slots=True)
class Canary:
    """What must reach no log: the mark in each prompt, and the key. `request_id` is that of the last request."""

    mark: str
    key: str
    request_id: str


class Probes:
    """Ask the gateway at `url` as a caller with the canary's key. Close it."""

    def __init__(self, url: str, model: str, canary: Canary, timeout: float) -> None:
        self._canary = canary
        self._llm = LLM(LLMConfig(url, model, timeout, canary.key))
        headers = {"authorization": f"Bearer {canary.key}"}
        self._client = httpx.Client(base_url=url, timeout=timeout, headers=headers, trust_env=False)

    def close(self) -> None:
        self._llm.close()
        self._client.close()

    def all(self) -> Iterator[Check]:
        """Try everything. `chat`, `stream` and `usage` must work. Of the rest, an engine may refuse what it cannot do,
        but it must not answer something else."""
        listed = self._models()
        named = next((it for it in listed if it["id"] == self._llm.config.model), {})
        can = named.get("capabilities")
        if can is None or "chat" in can:
            yield from self._chats()
        else:
            yield Check("skipped", "chat", f"the default model, {self._llm.config.model}, does not chat")
        embedding = [it["id"] for it in listed if "embeddings" in (it.get("capabilities") or ())]
        yield self._tried("embeddings", partial(self._embed, (embedding or [self._llm.config.model])[0]))
        yield self._model()
        self._make_mistakes()

    def _chats(self) -> Iterator[Check]:
        yield self._tried("chat", self._chat, must=True)
        yield self._tried("stream", self._stream, must=True)
        yield self._tried("tools", partial(self._call, "auto"))
        yield self._tried("forced_tool", partial(self._call, {"type": "function", "function": {"name": "note"}}))
        yield self._tried("json_schema", self._json)

    def _tried(self, name: str, attempt: Callable[[], str], *, must: bool = False) -> Check:
        for_operator = "see 'make logs', and the engine's own log"
        try:
            return Check("ok", name, attempt())
        except Undecided as exc:
            return Check("skipped", name, str(exc))
        except Fault as exc:
            return Check("failed", name, str(exc), f"do not rely on it with this engine and model; {for_operator}")
        except LLMError as exc:
            if not must and exc.status in UNSUPPORTED:
                return Check("ok", name, f"not here: {exc}")
            return Check("failed", name, f"{exc} ({exc.status or 'no answer'})", for_operator)

    def _models(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = self._client.get("models").json().get("data") or []
        except httpx.HTTPError:
            return []
        return found

    def _model(self) -> Check:
        """Tell of the default model, which was just asked."""
        name = self._llm.config.model
        it = next((it for it in self._models() if it["id"] == name), None)
        if it is None:
            return Check("failed", "model", f"/v1/models does not list {name}", "correct LLM_MODEL, then run 'make up'")
        if it.get("loaded") is False:
            return Check("failed", "model", f"{name} is not loaded, although it was just asked", "see 'make logs'")
        loaded = "is loaded" if it.get("loaded") else "is served; its engine does not say whether it is loaded"
        window = f", with a context of {it['context_length']} tokens" if it.get("context_length") else ""
        return Check("ok", "model", f"{name} {loaded}{window}")

    def _ask(self, words: str, most: int, **fields: Any) -> dict[str, Any]:
        """Return the only choice. Raises LLMError, Fault, Undecided."""
        messages = [{"role": "user", "content": f"{self._canary.mark} {words}"}]
        began = time.monotonic()
        match self._llm.chat(messages, temperature=0, max_tokens=most, **fields):
            case {"choices": [dict(choice)], "usage": {"prompt_tokens": int(), "completion_tokens": int(made)}} if made:
                return choice | {"seconds": time.monotonic() - began, "made": made}
            case {"choices": [dict()]}:
                raise Fault("the answer does not report the number of tokens")
        raise Fault("the answer has no usable entry in 'choices'")

    def _chat(self) -> str:
        choice = self._ask("Say hello.", SHORT)
        return f"{choice['made']} tokens in {choice['seconds']:.1f} s"

    def _stream(self) -> str:
        return asyncio.run(self._streamed())

    async def _streamed(self) -> str:
        began, first, made = time.monotonic(), 0.0, 0
        messages = [{"role": "user", "content": f"{self._canary.mark} Count from 1 to 5."}]
        options = {"include_usage": True}
        async for chunk in self._llm.astream(messages, temperature=0, max_tokens=SHORT, stream_options=options):
            first = first or time.monotonic() - began
            made = (chunk.get("usage") or {}).get("completion_tokens", made)
        if not made:
            raise Fault("the stream does not report the number of tokens")
        return f"the first token came after {first:.1f} s, and the stream told its usage"

    def _call(self, choice: Any) -> str:
        answer = self._ask("Note the number 7.", ROOM, tools=[TOOL], tool_choice=choice)
        calls = (answer.get("message") or {}).get("tool_calls") or []
        if choice == "auto":
            return f"taken; the model {'called the tool' if calls else 'called none, as it may'}"
        match calls:
            case [{"function": {"name": "note", "arguments": str(text)}}]:
                arguments = None
                with suppress(ValueError):
                    arguments = json.loads(text)
                if isinstance(arguments, dict) and type(arguments.get("number")) is int:
                    return "the model called it, with arguments that fit"
        self._whole(answer)
        raise Fault("a call of the tool was asked for, and the answer has none that fits")

    def _json(self) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
        answer = self._ask("Is water wet? Answer in JSON.", ROOM, response_format=form)
        with suppress(ValueError, TypeError):
            if json.loads(answer["message"]["content"]) in ({"answer": "yes"}, {"answer": "no"}):
                return "the answer keeps to it"
        self._whole(answer)
        raise Fault("the answer does not keep to the schema")

    def _whole(self, answer: dict[str, Any]) -> None:
        if answer.get("finish_reason") == "length":
            raise Undecided(f"the answer was not finished after {ROOM} tokens")

    def _embed(self, model: str) -> str:
        try:
            answer = self._client.post("embeddings", json={"model": model, "input": self._canary.mark})
            body = answer.json()
        except (httpx.HTTPError, ValueError) as exc:
            raise LLMError(f"The answer is not JSON, or did not come: {exc}.") from exc
        if answer.status_code != 200:
            raise LLMError(str(body.get("error", {}).get("message")), status=answer.status_code)
        try:
            return f"{len(body['data'][0]['embedding'])} numbers from {model}"
        except (LookupError, TypeError):
            raise Fault("the answer has no vector") from None

    def _make_mistakes(self) -> None:
        """Send another key, and a body that is not JSON, because a log may tell too much about a mistake."""
        for headers in (
            {"authorization": f"Bearer {self._canary.key}x"},
            {REQUEST_ID.decode(): self._canary.request_id},
        ):
            with suppress(httpx.HTTPError):
                self._client.post("chat/completions", content=f'{{"messages": "{self._canary.mark}', headers=headers)
