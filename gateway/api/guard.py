"""Guard: refuse what a request's body may not contain. All functions are pure, and raise a BadRequest that names the
field.

The gateway stands between several callers and one engine. A field that affects all of them (whose cache is used, who
goes first, what the engine fetches or loads) belongs to the operator. Everything else is passed on unchanged.
"""

from typing import Any

from gateway.api.field_names import refuse_other_spellings
from gateway.dialects import DIALECTS
from gateway.endpoints import ENDPOINTS, Kind
from gateway.errors import BadRequest

MAX_CHOICES = 16  # answers to one prompt; vLLM alone would take 16,384
MAX_PROMPTS = 2048  # prompts or inputs in one request: OpenAI's own limit for embeddings

# Refused with any engine, because a request means the same wherever it is routed. Beside each field are the values at
# which it steers nothing, as null does for all. With such a value the field is left out.
CONTROL_FIELDS = {it.name: it.control for it in DIALECTS.values()}
_CONTROL = {name: values for fields in CONTROL_FIELDS.values() for name, values in fields.items()}
_CONTROLS = frozenset(_CONTROL)
# Fields that hold several prompts or inputs, in a request of any kind, because a field means the same in all of them.
_LISTS = tuple(it.content for it in ENDPOINTS.values() if not it.chats)

# Whole numbers, as every engine understands them. Ollama refuses 8.0, and vLLM takes "8" for 8.
_WHOLE = frozenset(
    {"max_tokens", "max_completion_tokens", "n_predict", "min_tokens", "n", "best_of", "seed", "top_logprobs"}
    | {"dimensions", "top_k", "n_probs"}
)
_LEAST = {
    "max_tokens": 1,
    "max_completion_tokens": 1,
    "n_predict": 1,
    "dimensions": 1,
}  # Ollama reads a smaller number as no limit, or as no answer

# Where a part of a message's content names media: engines fetch http and read files on the caller's behalf.
_URLS = ("image_url", "video_url", "audio_url", "file_url")
_INLINE = {"input_audio": "data", "file": "file_data"}  # base64, or the same as a URL
_PART_CONTROL = ("uuid", "image_embeds", "audio_embeds", "prompt_embeds")  # another caller's media, and pickled tensors


def refuse_control(kind: Kind, body: dict[str, Any]) -> None:
    """Refuse fields that steer the engine, more answers than MAX_CHOICES, more prompts than MAX_PROMPTS, limits that
    are not whole numbers, and media that is not in the request itself.

    A field at a default that steers nothing is removed from `body`. A whole number that is written as a float becomes
    an integer.
    """
    refuse_other_spellings(body)
    for name in _CONTROLS.intersection(body):
        if not _is_one_of(body[name], _CONTROL[name]):
            raise BadRequest(f"'{name}' steers the engine and cannot be set by a request. Leave it out.", param=name)
        del body[name]
    if body.get("grammar") == "":  # llama.cpp's default, which is no grammar
        del body["grammar"]
    # A completion may be its prompt alone. In any other place, engines take 0 for no limit, or refuse it.
    zero = "max_tokens" if kind == "completion" and body.get("echo") is True else None
    for name in _WHOLE.intersection(body):
        body[name] = _whole(name, body[name], least=0 if name == zero else _LEAST.get(name))
    for name in ("n", "best_of"):
        count = body.get(name)
        if count is not None and not 1 <= count <= MAX_CHOICES:
            raise BadRequest(f"'{name}' must be a whole number from 1 to {MAX_CHOICES}.", param=name)
    for name in _LISTS:
        prompts = body.get(name)
        if type(prompts) is list and len(prompts) > MAX_PROMPTS and any(type(it) is not int for it in prompts):
            raise BadRequest(f"'{name}' has more than {MAX_PROMPTS} entries.", param=name)
    messages = body.get("messages")  # of any kind of request: vLLM embeds messages too
    if type(messages) is list:
        for index, message in enumerate(messages):
            if type(message) is dict and type(content := message.get("content")) is list:
                _refuse_media(content, f"messages[{index}].content")


def _is_one_of(value: Any, defaults: tuple[Any, ...]) -> bool:
    """Return whether the value is null or one of these. 0.0 equals 0, but True does not equal 1 here."""
    return value is None or any(value == it and (type(value) is bool) == (type(it) is bool) for it in defaults)


def _whole(name: str, value: Any, *, least: int | None) -> int | None:
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if value is None or (type(value) is int and (least is None or value >= least)):
        return value
    if type(value) is int:
        raise BadRequest(f"'{name}' must be at least {least}. Leave it out if you want no limit.", param=name)
    raise BadRequest(f"'{name}' must be a whole number.", param=name)


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
                    raise BadRequest(f"'{param}' must be a data: URL; the gateway fetches nothing.", param=param)
        for name, field in _INLINE.items():
            value = part.get(name)
            data = value.get(field) if type(value) is dict else value
            # base64 has no colon, so a value with one is a URL.
            if type(data) is str and ":" in data[:64] and not data.startswith("data:"):
                param = f"{where}[{index}].{name}"
                raise BadRequest(f"'{param}' must be base64 or a data: URL; the gateway fetches nothing.", param=param)
        for name in _PART_CONTROL:
            if name in part:
                param = f"{where}[{index}].{name}"
                raise BadRequest(f"'{param}' cannot be set by a request. Leave it out.", param=param)
