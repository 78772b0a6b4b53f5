"""Blocks: translate the texts, images and documents of a message's content into parts of a chat message."""

from typing import Any

from gateway.errors import BadRequest
from gateway.translation.contents import merged
from gateway.translation.messages.fields import Notes, a_list, an_object, name, one_of, text

SEPARATOR = "\n\n"  # between texts that were separate blocks
_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
# The fields of a text block; citations of an earlier answer add nothing to its text
_IN_TEXT = frozenset({"text", "citations"})
_IN_IMAGE = frozenset({"source"})
_IN_DOCUMENT = frozenset({"source", "title", "context", "citations"})
_IN_FOUND = frozenset({"source", "title", "content", "citations"})


def only_text(content: Any, where: str, notes: Notes, first: int = 0) -> str:
    """Join a content that may hold only texts. `first` is the index of its first block in the caller's list. Raises
    BadRequest that names a block that is not text."""
    if type(content) is str:
        return content
    told: list[str] = []
    for index, it in enumerate(a_list(content, where), first):
        path = f"{where}[{index}]"
        block = an_object(it, path)
        if block.get("type") != "text":
            raise BadRequest(f"'{path}.type' must be 'text' here.", param=f"{path}.type")
        told.append(_text(block, path, notes))
    return SEPARATOR.join(it for it in told if it)


def parts(block: dict[str, Any], where: str, notes: Notes) -> list[dict[str, Any]]:
    """Translate one block of a user or a tool into text parts and image parts, none of them empty. Raises BadRequest
    for a block that no engine takes."""
    kind = block.get("type")
    if kind == "text":
        return _texts(_text(block, where, notes))
    if kind == "image":
        notes.unknown(block, _IN_IMAGE, "messages.content", where)
        return [_image(block.get("source"), f"{where}.source")]
    if kind == "document":
        return _document(block, where, notes)
    if kind == "search_result":
        notes.unknown(block, _IN_FOUND, "messages.content", where)
        _note_citations(block, where, notes)
        head = [text(block.get(field), f"{where}.{field}") for field in ("title", "source")]
        found = only_text(block.get("content"), f"{where}.content", notes)
        return _texts(SEPARATOR.join(it for it in (*head, found) if it))
    raise BadRequest(
        f"'{where}.type' must be one of text, image, document, search_result or, in a user's message, tool_result.",
        param=f"{where}.type",
    )


def joined(found: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return parts as a content: a string if all are texts, otherwise a list in which no two texts are neighbours."""
    made = merged(found, SEPARATOR)
    if not made:
        return ""
    return str(made[0]["text"]) if len(made) == 1 and made[0]["type"] == "text" else made


def _text(block: dict[str, Any], where: str, notes: Notes) -> str:
    notes.unknown(block, _IN_TEXT, "messages.content", where)
    return text(block.get("text"), f"{where}.text")


def _texts(told: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": told}] if told else []


def _image(value: Any, where: str) -> dict[str, Any]:
    """Translate an image that is in the request itself. Nothing is fetched, because a URL could point into the
    operator's network."""
    source = an_object(value, where)
    kind = one_of(source.get("type"), ("base64", "url"), f"{where}.type")
    if kind == "url":
        url = text(source.get("url"), f"{where}.url")
        if not url.startswith("data:"):
            raise BadRequest(f"'{where}.url' is not fetched. Send the image as base64.", param=f"{where}.url")
        return {"type": "image_url", "image_url": {"url": url}}
    media = one_of(source.get("media_type"), _IMAGES, f"{where}.media_type")
    data = name(source.get("data"), f"{where}.data")
    if not _is_base64(data):
        raise BadRequest(f"'{where}.data' is not base64.", param=f"{where}.data")
    return {"type": "image_url", "image_url": {"url": f"data:{media};base64,{data}"}}


def _is_base64(data: str) -> bool:
    """Return whether a text is base64. Decoding images of several megabytes would take several times as long."""
    bare = data.rstrip("=")
    padded = len(data) - len(bare) <= 2 and len(data) % 4 == 0
    return padded and bare != "" and not bare.encode("ascii", "replace").translate(None, _BASE64)


def _document(block: dict[str, Any], where: str, notes: Notes) -> list[dict[str, Any]]:
    """Translate a document into its title, its context and its text. Raises BadRequest for a PDF, which no engine
    reads."""
    notes.unknown(block, _IN_DOCUMENT, "messages.content", where)
    _note_citations(block, where, notes)
    head = [text(block[it], f"{where}.{it}") for it in ("title", "context") if block.get(it) is not None]
    source = an_object(block.get("source"), f"{where}.source")
    kind = source.get("type")
    if kind == "text":
        told = text(source.get("data"), f"{where}.source.data")
        return _texts(SEPARATOR.join(it for it in (*head, told) if it))
    if kind == "content":
        path = f"{where}.source.content"
        content = source.get("content")
        if type(content) is str:
            return _texts(SEPARATOR.join(it for it in (*head, content) if it))
        found = _texts(SEPARATOR.join(it for it in head if it))
        for index, it in enumerate(a_list(content, path)):
            inner = an_object(it, f"{path}[{index}]")
            one_of(inner.get("type"), ("text", "image"), f"{path}[{index}].type")
            found += parts(inner, f"{path}[{index}]", notes)
        return found
    raise BadRequest(
        f"'{where}.source' must be of type text or content: no engine here reads other documents. Send their text.",
        param=f"{where}.source",
    )


def _note_citations(block: dict[str, Any], where: str, notes: Notes) -> None:
    """Note that the answer will have no citations, if the request asks for some."""
    if block.get("citations") is not None and an_object(block["citations"], f"{where}.citations").get("enabled"):
        notes.ignore("messages.content.citations", f"{where}.citations")
