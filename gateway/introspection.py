"""Introspection: how an engine is asked what a model can read, how long a prompt is, how much it does at a time."""

from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import httpx
import orjson

from gateway.dialects import refusal
from gateway.errors import ContextExceeded
from gateway.exchange import CONTENT, Kind
from gateway.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Window:
    """What a model on an engine can read: `limit` tokens, None if nobody says. Of them, `own` bytes at most are what
    the model's configuration puts before every prompt."""

    limit: int | None
    own: int = 0
    asked_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request on its way to an engine: its fields, and its size in bytes of JSON."""

    kind: Kind
    model: str
    fields: dict[str, Any]
    size: int


class Asking(Protocol):
    """How an engine is asked."""

    async def window(self, upstream: Upstream, prompt: Prompt) -> Window: ...

    async def count(self, upstream: Upstream, prompt: Prompt) -> int | None:
        """The prompt's tokens; None if nobody counts them. Raises ContextExceeded where the engine tells it so."""

    async def slots(self, upstream: Upstream) -> int | None:
        """How many requests it works on at a time; None if it doesn't say. Raises EngineError."""


class _Vllm:
    async def window(self, upstream: Upstream, prompt: Prompt) -> Window:
        for entry in _list(await upstream.ask("models"), "data"):
            if entry.get("id") == prompt.model:
                return Window(_whole(entry.get("max_model_len")))
        return Window(None)

    async def count(self, upstream: Upstream, prompt: Prompt) -> int | None:
        content = prompt.fields[CONTENT[prompt.kind]]
        if prompt.kind == "chat":
            names = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
            body = {name: prompt.fields[name] for name in names if name in prompt.fields}
        elif isinstance(content, str):
            body = {"prompt": content}
        else:
            return None
        response = await upstream.ask("/tokenize", body | {"model": prompt.model})
        return _whole(_object(response).get("count"))

    async def slots(self, upstream: Upstream) -> int | None:  # noqa: ARG002
        return None  # nowhere: what it runs at a time it decides by its memory


class _LlamaCpp:
    async def window(self, upstream: Upstream, prompt: Prompt) -> Window:  # noqa: ARG002
        settings = _object(await upstream.ask("/props")).get("default_generation_settings")
        return Window(_whole(settings.get("n_ctx")) if isinstance(settings, dict) else None)

    async def count(self, upstream: Upstream, prompt: Prompt) -> int | None:
        content = prompt.fields[CONTENT[prompt.kind]]
        if prompt.kind == "chat":
            response = await upstream.ask("chat/completions/input_tokens", prompt.fields)
            return _whole(_object(response).get("input_tokens"))
        if isinstance(content, str):
            response = await upstream.ask("/tokenize", {"content": content, "add_special": True})
            return len(_object(response).get("tokens") or ()) or None
        return None

    async def slots(self, upstream: Upstream) -> int | None:
        return _whole(_object(await upstream.ask("/props")).get("total_slots"))


class _Ollama:
    """0.12.6 or newer: `truncate: false` is ignored by what is older."""

    async def window(self, upstream: Upstream, prompt: Prompt) -> Window:
        limit = await self._loaded(upstream, prompt.model)
        if limit is None:  # the size is decided when the model is loaded, which the request needs anyway
            await upstream.ask(_PATHS[prompt.kind], {"model": prompt.model, "stream": False}, patient=True)
            limit = await self._loaded(upstream, prompt.model)
        shown = _object(await upstream.ask("/api/show", {"model": prompt.model}))
        return Window(limit, sum(len(orjson.dumps(shown.get(name) or "")) for name in ("system", "messages")))

    async def _loaded(self, upstream: Upstream, model: str) -> int | None:
        names = (model.lower(), f"{model.lower()}:latest")
        for entry in _list(await upstream.ask("/api/ps"), "models"):
            if str(entry.get("model") or entry.get("name")).lower() in names:
                return _whole(entry.get("context_length"))
        return None

    async def count(self, upstream: Upstream, prompt: Prompt) -> int | None:
        fields = prompt.fields
        body: dict[str, Any] = {"model": prompt.model, "stream": False, "truncate": False}
        if prompt.kind == "embedding":
            body |= {"input": fields["input"]}
        else:
            # Any other option, or `shift`, would have it load the model anew.
            body |= {"options": {"num_predict": 1}}
            if prompt.kind == "completion":
                body |= {"prompt": fields["prompt"], "suffix": fields.get("suffix") or ""}
            else:
                try:
                    body |= {"messages": _native(fields["messages"]), "tools": fields.get("tools") or []}
                except (KeyError, TypeError, ValueError, AttributeError):
                    return None  # nor will the real request be understood
                if effort := fields.get("reasoning_effort"):
                    body |= {"think": effort if effort != "none" else False}
        response = await upstream.ask(_PATHS[prompt.kind], body, patient=True)
        if response.status_code != HTTPStatus.OK:
            error = refusal(response.status_code, response.content)
            if isinstance(error, ContextExceeded):
                raise error
        return _whole(_object(response).get("prompt_eval_count"))

    async def slots(self, upstream: Upstream) -> int | None:  # noqa: ARG002
        return None  # OLLAMA_NUM_PARALLEL is told to nobody


_PATHS: dict[Kind, str] = {"chat": "/api/chat", "completion": "/api/generate", "embedding": "/api/embed"}
ASK: dict[str, Asking] = {"ollama": _Ollama(), "vllm": _Vllm(), "llamacpp": _LlamaCpp()}


def _native(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages as Ollama makes its own of them (openai/openai.go, FromChatRequest)."""
    native: list[dict[str, Any]] = []
    called: dict[str, str] = {}  # the tools' names by the calls' ids
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content or ""}]:
            if part["type"] == "text":
                native.append({"role": message["role"], "content": part["text"]})
            else:
                image = part["image_url"]
                url = image["url"] if isinstance(image, dict) else image
                native.append({"role": message["role"], "content": "", "images": [url.partition(";base64,")[2]]})
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        called |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls") or ()}
        native[-1] |= {
            "tool_calls": [{"function": it | {"arguments": orjson.loads(it["arguments"])}} for it in calls],
            "tool_name": message.get("name") or called.get(message.get("tool_call_id", ""), ""),
            "thinking": message.get("reasoning") or "",
        }
    return native


def _object(response: httpx.Response) -> dict[str, Any]:
    """A response's JSON object; empty where there is none."""
    with suppress(ValueError):
        if response.status_code == HTTPStatus.OK and isinstance(value := response.json(), dict):
            return value
    return {}


def _list(response: httpx.Response, name: str) -> list[dict[str, Any]]:
    entries = _object(response).get(name)
    return [it for it in entries if isinstance(it, dict)] if isinstance(entries, list) else []


def _whole(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
