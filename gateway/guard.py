"""Guard: what a request's body may not say. Pure functions; each raises a BadRequest that names the field.

The gateway stands between several callers and one engine. A field that decides something for all of them (whose cache
is used, who goes first, what the engine fetches or loads) is the operator's. Everything else passes untouched.
"""

import json
from typing import Any

import orjson

from gateway.errors import BadRequest

MAX_CHOICES = 16  # answers to one prompt; vLLM alone would take 16,384
MAX_PROMPTS = 2048  # prompts or inputs in one request: OpenAI's own limit for embeddings

# Refused whichever engine is configured: a request means the same wherever it goes, and may go to another one.
CONTROL_FIELDS = {
    "vllm": {
        "cache_salt",  # whose prefix cache is shared: the operator's to say
        "priority",
        "request_id",  # collides with another caller's, who then gets its tokens or its abort
        "kv_transfer_params",  # which host to fetch a cache from
        "ec_transfer_params",
        "vllm_xargs",  # anything at all, for plugins
        "logits_processors",  # names Python code
        "prompt_embeds",  # a pickled tensor (CVE-2025-62164)
        "chat_template",  # a program that runs in the engine's front end (CVE-2025-61620)
        "mm_processor_kwargs",  # arguments for the loading code: sizes without bounds
        "media_io_kwargs",
    },
    "llamacpp": {
        "id_slot",  # somebody else's slot, and what is cached in it
        "slot_id",
        "cache_prompt",
        "n_keep",
        "n_discard",  # negative: writes out of bounds (CVE-2026-21869)
        "n_cache_reuse",
        "n_cmpl",  # another name for n
        "lora",
        "chat_parser",  # what the server works out itself, and believes
        "chat_format",
        "speculative.type",
        "speculative.n_min",
        "speculative.n_max",
        "speculative.p_min",
        "speculative.ngram_size_n",
        "speculative.ngram_size_m",
        "speculative.ngram_m_hits",
    },
    "ollama": {
        "keep_alive",  # how long a model stays in memory
        "options",  # context length, threads, layers on the GPU: reloads the model for everyone
    },
}
_CONTROL = frozenset().union(*CONTROL_FIELDS.values())

# Where a part of a message's content names media: engines fetch http and read files on the caller's behalf.
_URLS = ("image_url", "video_url", "audio_url", "file_url")
_INLINE = {"input_audio": "data", "file": "file_data"}  # base64, or the same as a URL
_PART_CONTROL = ("uuid", "image_embeds", "audio_embeds", "prompt_embeds")  # another caller's media; pickled tensors


def refuse_repeated_names(raw: bytes, body: Any) -> None:
    """Refuse an object that has a name twice, which parsers read differently. `body` is `raw`, parsed.

    What orjson writes exactly as it came had no name twice: so it is with the compact JSON of OpenAI's clients, and
    costs 0.2 µs for a short question. Anything else is read again by a parser that shows every pair (8 µs).
    """
    try:
        if orjson.dumps(body) == raw:
            return
    except TypeError:  # nested deeper than orjson writes; refused later on
        return
    try:
        json.loads(raw.decode(), object_pairs_hook=_pairs, parse_int=float)
    except _RepeatedError as exc:
        name = exc.args[0][:64]
        raise BadRequest(f"The name '{name}' stands twice in one object.", param=name) from None


class _RepeatedError(Exception):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> None:
    names = set()
    for name, _ in pairs:
        if name in names:
            raise _RepeatedError(name)
        names.add(name)


def refuse_control(body: dict[str, Any]) -> None:
    """Refuse fields that steer the engine, more answers than MAX_CHOICES, more prompts than MAX_PROMPTS, and media
    that isn't in the request itself."""
    if not _CONTROL.isdisjoint(body):
        name = min(_CONTROL & body.keys())
        raise BadRequest(f"'{name}' steers the engine and can't be set by a request.", param=name)
    for name in ("n", "best_of"):
        count = body.get(name)
        if count is not None and (type(count) is not int or not 1 <= count <= MAX_CHOICES):
            raise BadRequest(f"'{name}' must be a whole number from 1 to {MAX_CHOICES}.", param=name)
    for name in ("prompt", "input"):
        prompts = body.get(name)
        if type(prompts) is list and len(prompts) > MAX_PROMPTS and any(type(it) is not int for it in prompts):
            raise BadRequest(f"'{name}' holds more than {MAX_PROMPTS} entries.", param=name)
    messages = body.get("messages")  # of any kind of request: vLLM embeds messages too
    if type(messages) is list:
        for index, message in enumerate(messages):
            if type(message) is dict and type(content := message.get("content")) is list:
                _refuse_media(content, f"messages[{index}].content")


def _refuse_media(parts: list[Any], where: str) -> None:
    for index, part in enumerate(parts):
        if type(part) is not dict:
            continue
        for name in _URLS:
            if name in part:
                value = part[name]
                url = value.get("url") if type(value) is dict else value
                if type(url) is not str or not url.startswith("data:"):
                    param = f"{where}[{index}].{name}"
                    raise BadRequest(f"'{param}' must be a data: URL; nothing is fetched.", param=param)
        for name, field in _INLINE.items():
            value = part.get(name)
            data = value.get(field) if type(value) is dict else value
            # A colon is no character of base64: what has one is a URL.
            if type(data) is str and ":" in data[:64] and not data.startswith("data:"):
                param = f"{where}[{index}].{name}"
                raise BadRequest(f"'{param}' must be base64 or a data: URL; nothing is fetched.", param=param)
        for name in _PART_CONTROL:
            if name in part:
                param = f"{where}[{index}].{name}"
                raise BadRequest(f"'{param}' can't be set by a request.", param=param)
