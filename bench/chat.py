"""The one exchange that is measured, byte for byte: the request, and the mock engine's answer."""

import json
from typing import Any

# VLLM's default in this project, because the length of a real name counts too
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
TOKENS = [f" token{number:02d}" for number in range(64)]  # numbered, so that a lost or swapped token is noticed
USAGE = {"prompt_tokens": 27, "total_tokens": 91, "completion_tokens": 64, "prompt_tokens_details": None}


def _dump(**fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _ask(**more: Any) -> bytes:
    system = {"role": "system", "content": "You are a helpful assistant."}
    user = {"role": "user", "content": "Count the tokens of this answer, please."}
    return _dump(model=MODEL, messages=[system, user], max_tokens=64, temperature=0.7, **more)


def _ask_response() -> bytes:
    system, user = "You are a helpful assistant.", "Count the tokens of this answer, please."
    return _dump(model=MODEL, instructions=system, input=user, max_output_tokens=64, temperature=0.7, stream=True)


def _ask_message() -> bytes:
    system, user = "You are a helpful assistant.", "Count the tokens of this answer, please."
    messages = [{"role": "user", "content": user}]
    return _dump(model=MODEL, system=system, messages=messages, max_tokens=64, temperature=0.7, stream=True)


BLOCKING = _ask()
STREAM = _ask(stream=True, stream_options={"include_usage": True})
# The same stream through the translated APIs: path, body, and the type of the last event.
TRANSLATED: dict[str, tuple[str, bytes, bytes]] = {
    "responses": ("/v1/responses", _ask_response(), b"response.completed"),
    "messages": ("/v1/messages", _ask_message(), b"message_stop"),
}
PACED = _ask(stream=True, stream_options={"include_usage": True}, user="paced")  # this user gets a token every 10 ms


def _answer(kind: str, choices: list[dict[str, Any]], **more: Any) -> bytes:
    identity = "chatcmpl-5d1f0b8e4a7c4c0f9b6a2e3d8c7f1a90"
    return _dump(id=identity, object=kind, created=1764000000, model=MODEL, choices=choices, **more)


def _blocking_reply() -> bytes:
    message = {"role": "assistant", "content": "".join(TOKENS), "refusal": None, "annotations": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    return _answer("chat.completion", [choice], usage=USAGE, prompt_logprobs=None)


def stream_events(*, usage: bool) -> list[bytes]:
    """Return the events of a stream: the role, 64 tokens, the finish_reason, the usage if asked for, and [DONE]."""

    def event(*choices: dict[str, Any], **more: Any) -> bytes:
        return b"data: " + _answer("chat.completion.chunk", list(choices), **more) + b"\n\n"

    def delta(finish: str | None = None, **fields: str) -> bytes:
        return event({"index": 0, "delta": fields, "logprobs": None, "finish_reason": finish, "token_ids": None})

    tokens = [delta(content=token) for token in TOKENS]
    last = [event(usage=USAGE)] if usage else []
    return [delta(role="assistant", content=""), *tokens, delta("stop", content=""), *last, b"data: [DONE]\n\n"]


BLOCKING_REPLY = _blocking_reply()
STREAM_REPLY = b"".join(stream_events(usage=True))
