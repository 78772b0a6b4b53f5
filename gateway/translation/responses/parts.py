"""Parts: translate the content of messages and tool outputs into chat's form.

A content with only text becomes one string, whether the client sent a string or a list, so both give the same bytes.
All three engines put a line break between several texts by themselves.
"""

from typing import Any

from gateway.errors import BadRequest
from gateway.translation.responses.fields import Ignored, mapping, name, string

_TEXT = frozenset({"type", "text", "annotations", "logprobs", "prompt_cache_breakpoint"})
_IMAGE = frozenset({"type", "image_url", "detail", "file_id", "prompt_cache_breakpoint"})
_TEXTS = ("input_text", "output_text", "text")


def content(value: Any, where: str, ignored: Ignored, joint: str = "\n") -> str | list[dict[str, Any]]:
    """Return a message's content: one string with its texts joined by `joint`, or a list of chat's parts if it holds
    more than text. Raises BadRequest that names the mistake."""
    if type(value) is str:
        return value
    parts = [_part(it, f"{where}[{index}]", ignored) for index, it in enumerate(_list(value, where))]
    if all(part["type"] == "text" for part in parts):
        return joint.join(part["text"] for part in parts)
    return parts


def result(value: Any, where: str, ignored: Ignored) -> tuple[str, list[dict[str, Any]]]:
    """Return a tool's output: its text, and its images as chat's parts."""
    if type(value) is str:
        return value, []
    if value is None:
        return "", []
    parts = [_part(it, f"{where}[{index}]", ignored) for index, it in enumerate(_list(value, where))]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    others = [part for part in parts if part["type"] != "text"]
    return "\n".join(texts), others


def _list(value: Any, where: str) -> list[Any]:
    if type(value) is list:
        return value
    raise BadRequest(f"'{where}' must be a string or a list of parts.", param=where)


def _part(value: Any, where: str, ignored: Ignored) -> dict[str, Any]:
    kind = name(mapping(value, where).get("type"), f"{where}.type")
    if kind in _TEXTS:
        ignored.unknown(value, _TEXT, "input[].content[]")
        return {"type": "text", "text": string(value.get("text"), f"{where}.text")}
    if kind == "refusal":
        return {"type": "refusal", "refusal": string(value.get("refusal"), f"{where}.refusal")}
    if kind == "input_image":
        ignored.unknown(value, _IMAGE, "input[].content[]")
        return _image(value, where)
    if kind == "input_audio":
        audio = mapping(value.get("input_audio"), f"{where}.input_audio")
        return {"type": "input_audio", "input_audio": _audio(audio, f"{where}.input_audio")}
    if kind == "input_file":
        raise BadRequest(f"'{where}' is a file, which no engine reads. Send its text or an image.", param=where)
    param = f"{where}.type"
    raise BadRequest(
        f"'{param}' is {kind[:64]!r}. Engines take only these parts: input_text, input_image, input_audio, "
        "output_text, refusal.",
        param=param,
    )


def _image(part: dict[str, Any], where: str) -> dict[str, Any]:
    if part.get("file_id") is not None:
        param = f"{where}.file_id"
        raise BadRequest(f"'{param}' names a file, but this gateway stores no files. Send 'image_url'.", param=param)
    param = f"{where}.image_url"
    url = string(part.get("image_url"), param)
    if not url.startswith("data:"):
        raise BadRequest(f"'{param}' must be a data: URL; the gateway fetches nothing.", param=param)
    image = {"url": url}
    if (detail := part.get("detail")) is not None and detail != "auto":
        image["detail"] = string(detail, f"{where}.detail")
    return {"type": "image_url", "image_url": image}


def _audio(audio: dict[str, Any], where: str) -> dict[str, str]:
    data = string(audio.get("data"), f"{where}.data")
    if ":" in data[:64] and not data.startswith("data:"):  # base64 has no colon
        raise BadRequest(f"'{where}.data' must be base64; nothing is fetched.", param=f"{where}.data")
    return {"data": data, "format": string(audio.get("format"), f"{where}.format")}
