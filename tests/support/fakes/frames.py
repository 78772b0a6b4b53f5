"""Frames: what each engine writes around the text of an answer, as it was recorded (tests/recordings).

The stand-ins in tests/bundle carry this file in their images, so it imports nothing but Python's own library.
"""

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
NOTHING: Json = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
FINGERPRINTS = {"ollama": "fp_ollama", "vllm": "vllm-0.32.0-0123abcd"}
MODELS_DETAILS: Json = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "134.52M",
    "quantization_level": "Q4_1",
}
MOMENT = "2026-11-28T16:15:44.822025521Z"


def _nulls(names: str) -> Json:
    return dict.fromkeys(names.split())


_DETAILS = _nulls("prompt_tokens_details completion_tokens_details")
_TRANSFERS = _nulls("kv_transfer_params ec_transfer_params metrics")


@dataclass(frozen=True)
class Frame:
    """Of one answer: the engine's dialect, whether the endpoint is chat's, the model's name, a number of its own."""

    dialect: str
    chat: bool
    model: str
    unique: int = 1

    def whole(self, texts: list[str], reason: str, usage: Any) -> Json:
        """Make a blocking answer with a choice for each text. `usage` None leaves the usage out."""
        choices = [self._choice(index, text, reason) for index, text in enumerate(texts)]
        kind = "chat.completion" if self.chat else "text_completion"
        answer = self._head(kind) | {"choices": choices}
        if usage is not None:
            answer["usage"] = usage | _DETAILS if self.dialect == "vllm" and isinstance(usage, dict) else usage
        if self.dialect == "vllm":
            answer |= {"service_tier": None, "system_fingerprint": FINGERPRINTS["vllm"]} | _TRANSFERS
            if self.chat:
                answer |= _nulls("prompt_logprobs prompt_token_ids prompt_text")
        return answer

    def opening(self, index: int = 0) -> list[Json]:
        """Make the events before the first text of a stream."""
        if not self.chat or self.dialect == "ollama":
            return []
        content = None if self.dialect == "llamacpp" else ""
        event = self._event(index, {"role": "assistant", "content": content}, None)
        if self.dialect == "vllm":
            del event["choices"][0]["token_ids"]
            event |= _nulls("prompt_token_ids prompt_text")
        return [event]

    def text(self, text: str, index: int = 0, *, first: bool = False) -> Json:
        """Make the event with a piece of text. `first`: nothing was said before in this choice."""
        role = {"role": "assistant"} if first and self.dialect == "ollama" else {}
        return self._event(index, (role if self.chat else {}) | {"content": text}, None)

    def thought(self, text: str, index: int = 0, *, first: bool = False) -> Json:
        """Make the event with a piece of reasoning. `first`: nothing was said before."""
        if self.dialect == "ollama":
            role = {"role": "assistant"} if first else {}
            return self._event(index, role | {"content": "", "reasoning": text}, None)
        return self._event(index, {"reasoning" if self.dialect == "vllm" else "reasoning_content": text}, None)

    def call(self, number: int, name: str | None, arguments: str, index: int = 0, *, first: bool = False) -> Json:
        """Make the event with a piece of a tool call, or with the beginning of one, which has a `name`. `first`:
        nothing was said before."""
        function: Json = {"arguments": arguments}
        piece: Json = {"index": number, "function": function}
        if name is not None:
            identity = f"call_{self.unique}_{number}"
            piece |= {"id": identity, "type": "function", "function": {"name": name} | function}
        role: Json = {"role": "assistant"} if first and self.dialect == "ollama" else {}
        empty: Json = {"content": ""} if self.dialect == "ollama" else {}
        return self._event(index, role | empty | {"tool_calls": [piece]}, None)

    def finish(self, reason: str, index: int = 0) -> Json:
        """Make the event that says why the answer ends."""
        empty = self.chat and self.dialect != "vllm"
        event = self._event(index, {} if empty else {"content": ""}, reason)
        if self.dialect == "vllm":
            event["choices"][0]["stop_reason"] = None
        return event

    def usage(self, usage: Any) -> Json:
        """Make the event after the last choice's, with the usage."""
        return self._head(self._kind) | {"choices": [], "usage": usage}

    def sealed(self, events: list[Json], *, usage: bool) -> list[Json]:
        """Say in a stream what its place decides. `usage`: the caller asked for it."""
        if self.dialect == "vllm":
            events[-1]["system_fingerprint"] = FINGERPRINTS["vllm"]
        if self.dialect == "ollama" and not self.chat and usage:
            return [{"usage": NOTHING} | event for event in events]
        return events

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> Json:
        name = "chatcmpl" if self.chat else "cmpl"
        head = {"id": f"{name}-{self.unique}", "object": kind, "created": self.unique, "model": self.model}
        if self.dialect == "vllm":
            return head
        return head | {"system_fingerprint": FINGERPRINTS.get(self.dialect, f"fp-{self.unique}")}

    def _choice(self, index: int, text: str, reason: str) -> Json:
        message = {"role": "assistant", "content": text}
        if self.dialect != "vllm":
            said = {"message": message} if self.chat else {"text": text}
            return {"index": index, **said, "finish_reason": reason}
        more = _nulls("logprobs stop_reason token_ids routed_experts")
        if self.chat:
            message |= _nulls("refusal annotations audio function_call reasoning")
            return {"index": index, "message": message, "finish_reason": reason} | more
        return (
            {"index": index, "text": text, "finish_reason": reason} | more | _nulls("prompt_logprobs prompt_token_ids")
        )

    def _event(self, index: int, delta: Json, reason: str | None) -> Json:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice: Json = {"index": index, **said, "finish_reason": reason}
        if self.dialect == "vllm":
            choice |= _nulls("logprobs token_ids" if self.chat else "logprobs stop_reason prompt_token_ids token_ids")
        return self._head(self._kind) | {"choices": [choice]}


def embeddings(dialect: str, model: str, count: int, tokens: int) -> Json:
    """Make an answer with `count` vectors."""
    data = [{"object": "embedding", "index": index, "embedding": [0.5, -0.25]} for index in range(count)]
    usage: Json = {"prompt_tokens": tokens, "total_tokens": tokens}
    if dialect != "vllm":
        return {"object": "list", "data": data, "model": model, "usage": usage}
    head = {"id": "embd-1", "object": "list", "created": 1, "model": model}
    return head | {"data": data, "usage": usage | {"completion_tokens": 0} | _DETAILS}


def listed(dialect: str, model: str, context: int = 0) -> Json:
    """Make a model's entry in /v1/models."""
    entry: Json = {
        "id": model,
        "object": "model",
        "created": 1,
        "owned_by": "library" if dialect == "ollama" else dialect,
    }
    if dialect != "vllm":
        return entry
    names = "create_engine sampling logprobs search_indices view fine_tuning"
    allowed = {f"allow_{name}": name in ("sampling", "logprobs", "view") for name in names.split()}
    permission = {"id": "modelperm-1", "object": "model_permission", "created": 1} | allowed
    permission |= {"organization": "*", "group": None, "is_blocking": False}
    return entry | {"root": model, "parent": None, "max_model_len": context, "permission": [permission]}


def loaded(model: str, context: int) -> Json:
    """Make a model's entry in Ollama's /api/ps."""
    said = {"name": model, "model": model, "size": 511568772, "digest": "0" * 64, "details": MODELS_DETAILS}
    return said | {"expires_at": MOMENT, "size_vram": 0, "context_length": context}


def tag(model: str) -> Json:
    """Make a model's entry in Ollama's /api/tags."""
    details = MODELS_DETAILS | {"context_length": 8192, "embedding_length": 576}
    said = {"name": model, "model": model, "modified_at": MOMENT, "size": 511568772, "digest": "0" * 64}
    return said | {"details": details, "capabilities": ["completion"]}


def shown(system: str, context: int) -> Json:
    """Make what Ollama's /api/show says. Like Ollama, leave out what is empty."""
    info = {"general.architecture": "llama", "llama.context_length": context}
    said = {"parameters": 'stop                           "<|im_end|>"', "system": system, "details": MODELS_DETAILS}
    said |= {"model_info": info, "capabilities": ["completion"], "modified_at": MOMENT}
    return {name: value for name, value in said.items() if value}


def unknown(dialect: str, model: str) -> Json:
    """Make the error of a model that is not there; its status is 404."""
    if dialect == "ollama":
        error: Json = {"message": f"model '{model}' not found", "type": "not_found_error", "param": None, "code": None}
    else:
        message = f"The model `{model}` does not exist."
        error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
    return {"error": error}


def busy() -> Json:
    """Make vLLM's error when its queue is full; its status is 503, or it is the first event of a stream."""
    said = "The engine is currently busy and cannot accept new requests."
    message = f"{said} Please try again later or on a different instance."
    return {"error": {"message": message, "type": "Service Unavailable", "param": None, "code": 503}}
