"""Control tokens: find text of a caller that an engine would read as control tokens, such as those that name the
speaker.

A chat template writes the messages between control tokens, and the tokenizer sees no difference between the template's
and a caller's. They are therefore searched for in the text that the template will see: the parts of a message are
joined, and JSON inside texts is decoded.
"""

import re
from collections.abc import Iterator
from typing import Any

# The control tokens of models' own chat templates, whichever engine is asked: ChatML, Llama 3, GLM, gpt-oss <|…|>,
# DeepSeek the same with wide bars, Gemma 4 <|turn> and <turn|>, EXAONE [|…|], Llama 2 and Mistral [INST], <<SYS>>,
# Gemma 3 <start_of_turn>, Ling <role>, MiniMax ]~b] and [e~[, Seed <seed:bos>, LongCat <longcat_user>, Nemotron
# <extra_id_0>, InternLM <eoh>. A NUL separates the texts that are searched. They are grouped by their first characters,
# because a caller may send 20 MB of these: one takes 0.2 µs at most.
_FLOOR = re.compile(
    r"<(?:[|\uff5c](?:[^|\uff5c<>\0]{1,64}[|\uff5c]|[\w:./-]{1,64})>"
    r"|(?=[\w:./-])(?:[\w:./-]{1,64}[|\uff5c]"
    r"|/?role|(?:start|end)_of_turn|bos|eos|sop|eop|eoh|eoa|eosys"
    r"|/?(?:seed|minimax):\w{1,40}|/?longcat_\w{1,40}"
    r"|(?:extra_id_|SPECIAL_|reserved_|unused|TOKENS_UNUSED_)\d{1,6})>"
    r"|</?SYS>>)"
    r"|\[(?:\|[^|\[\]\0]{1,64}\|\]"
    r"|/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|CALL_ID|ARGS|THINK|gMASK|sMASK)\]"
    r"|e~\[)"
    r"|\]~!?b[\]\[]"
)
_LONGEST = 80  # characters of a token
_SLICE = 1 << 16  # characters that are searched at a time: a search lets no other thread run
_SEEN = ("messages", "prompt", "suffix", "tools", "functions", "tool_choice", "function_call", "response_format")
_SAID = frozenset({"text", "refusal", "thinking"})  # the fields of a part that hold text
_MEDIA = frozenset({"image_url", "input_audio", "video_url", "audio_url", "file_url", "file"})  # the fields with media
_DATA = frozenset({"url", "data", "file_data"})  # the fields of media that no template writes into a prompt
_ESCAPE = re.compile(r"\\(?<!\\\\)\\*(?:u([0-9a-fA-F]{4})|/)")  # backslashes are counted once
_ROUNDS = 8  # rounds of decoding; JSON in JSON in JSON needs three
_THINK = re.compile(r"</?think(?:ing)?>")  # templates remove these tags, and join the text around them


def find_control_token(body: dict[str, Any]) -> tuple[str, str] | None:
    """Return the first field whose text has a control token, and the token; None if there is none."""
    for name in _SEEN:
        if name in body:
            value = body[name]
            for text in _forms(_without_media(value) if name == "messages" else value):
                if found := _search(text):
                    return name, found[0]
    return None


def _search(text: str) -> re.Match[str] | None:
    starts = range(0, len(text), _SLICE)
    return next(filter(None, (_FLOOR.search(text, it, it + _SLICE + _LONGEST) for it in starts)), None)


def _forms(value: Any) -> Iterator[str]:
    """Yield a field's texts as they came. If they change when JSON escapes are decoded or tags for thinking are
    removed, yield those forms too."""
    text = "\0".join(_texts(value))
    yield text
    decoded = text
    for _ in range(_ROUNDS):
        before, decoded = decoded, _ESCAPE.sub(_letter, decoded)
        if decoded == before:
            break
    if decoded != text:
        yield decoded
    thoughtless = _THINK.sub("", decoded)
    if thoughtless != decoded:
        yield thoughtless


def _letter(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16)) if escape[1] else "/"


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in a value, names included. For a list of parts, yield also the joined text."""
    left = [value]  # a recursion would take time for each string at each level
    while left:
        it = left.pop()
        if isinstance(it, str):
            yield it
        elif isinstance(it, dict):
            yield from it
            left += reversed(it.values())
        elif isinstance(it, list):
            parts = [part[name] for part in it if isinstance(part, dict) for name in _SAID & part.keys()]
            if len(parts) > 1 and all(isinstance(part, str) for part in parts):
                yield "".join(parts)
            left += reversed(it)


def _without_media(messages: Any) -> list[Any]:
    """Return messages without the data of their images, sounds and files. A name such as `file` means media only in a
    part of a message: elsewhere it may be the name of a tool's parameter."""
    return [
        it | {"content": [_without_data(part) if isinstance(part, dict) else part for part in parts]}
        if isinstance(parts := it.get("content"), list)
        else it
        for it in messages or ()
    ]


def _without_data(part: dict[str, Any]) -> dict[str, Any]:
    bare = dict(part)
    for name in _MEDIA & part.keys():
        media = part[name]
        if isinstance(media, dict):
            bare[name] = {inner: it for inner, it in media.items() if inner not in _DATA or not isinstance(it, str)}
        elif isinstance(media, str):
            bare[name] = None
    return bare
