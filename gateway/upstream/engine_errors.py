"""Engine errors: what an error of an engine means: whose fault it is, in words for the caller."""

import re
from contextlib import suppress
from typing import Any

import orjson

from gateway.dialects import DIALECTS
from gateway.dialects.dialect import Dialect, Word
from gateway.errors import (
    ContextExceeded,
    EngineDied,
    EngineError,
    EngineFull,
    EngineOverloaded,
    EngineRefused,
    EngineTimeout,
    EngineUnauthorized,
    EngineUnsupported,
    ModelLoading,
    ModelNotFound,
    StackError,
)

# Phrases by which engines say that a prompt does not fit. Each engine's phrases count for all engines, because one
# engine may run on another.
_TOO_LONG = (
    *dict.fromkeys(phrase for it in DIALECTS.values() for phrase in it.too_long),
    "context_length_exceeded",  # OpenAI's own
)
# "request (9031 tokens) exceeds the available context size (4096 tokens)", and others of llama.cpp's and Ollama's.
_BOTH_NUMBERS = re.compile(r"\((\d+) tokens\).*\((?:current batch size: )?(\d+)")
_LIMIT = re.compile(r"context length is (?:only )?(\d+) tokens")  # vLLM; it says "at least" about the prompt's
_LOADING = ("loading model", "model is loading")
_REFUSED = ("invalid_request_error", "BadRequestError", "Bad Request")  # types of errors that come without a status

# The forms in which engines name the wrong field.
_PYDANTIC = re.compile(r"""'loc': 'body\.([^']*)', 'msg': (?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")""")  # vLLM
_PARAMETER = re.compile(r"\(parameter=([\w.\[\]]+)(?:, value=|\)\Z)")  # vLLM, of a message that ends with ')'
_MUST = re.compile(r"^'?(\w+)'? must be ")
_FIELD = re.compile(r"^Field '([\w.]+)': ")  # llama.cpp
_GO = re.compile(
    r"^json: cannot unmarshal (\w++)[^ ]*+(?: (\S++))? into Go (?:struct field \w+\.([\w.]+)|value) of type (\S+)"
)
_GO_TYPES = {"int": "a whole number", "bool": "true or false", "string": "a string"}
_JSON_EXCEPTION = re.compile(r"\[json\.exception\.[\w.]+\] ")  # llama.cpp
_JINJA = re.compile(r"(?:Jinja Exception|While executing .*\nError): (.*)", re.DOTALL)
_NO_PARSER = re.compile(r"^Unable to generate parser for this template\. Automatic parser generation failed:\s*")
_BELONGINGS = re.compile(r"; tools = .*| - hint: .*| Valid aliases: .*| Start it with .*", re.DOTALL)
_UNABLE = " does not support"  # Ollama, after the name of a model with its registry
# Characters of a message. It may have the request's text in it, and the patterns here need the square of their text's
# length in the worst case, which is then a few milliseconds.
MOST = 2000


def refusal(dialect: Dialect, status: int, body: bytes) -> StackError:
    """Return the gateway's error for an engine's answer with any status but 200. Its text is passed on only if it is
    about the request."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _refusal(dialect, status, {}, seen=body[:200].decode(errors="replace"))
    error = parsed.get("error") if isinstance(parsed, dict) else None
    return _refusal(dialect, status, parsed if error is None and isinstance(parsed, dict) else error, seen="")


def fault(dialect: Dialect, error: Any) -> StackError:
    """Return the gateway's error for an error inside a stream. Its integer `code`, if it has one, is the HTTP status
    that it stands for."""
    detail = error if isinstance(error, dict) else {}
    code = detail.get("code")
    unsaid = 400 if detail.get("type") in _REFUSED else 500
    return _refusal(dialect, code if type(code) is int and 400 <= code <= 599 else unsaid, error, seen="")


def _refusal(dialect: Dialect, status: int, error: Any, *, seen: str) -> StackError:
    """Return the meaning of an error. `seen` is text that is not JSON: it helps to find the meaning, and callers never
    see it."""
    detail = _inner(error if isinstance(error, dict) else {"message": error})
    message = detail.get("message")
    message = message if isinstance(message, str) and message else ""
    told = f"{detail.get('type')} {detail.get('code')} {message or detail} {seen}".lower()
    message, named = _bounded(message)
    word = next((it for it in dialect.words if it.phrase in told), None)
    if word is not None and (meant := _meant(word)):
        return meant
    if status in _REDIRECTS:  # its Location is not passed on, because it is an address inside the operator's network
        return EngineUnauthorized(_REDIRECTED, code="engine_error")  # like a wrong key, it stays so until it is mended
    if status in (401, 403):
        return _unauthorized(dialect, told=bool(message or seen))
    if status == 404:
        return ModelNotFound(_BELONGINGS.sub("", message) or "The engine does not have this model.", param="model")
    if status == 503 and any(phrase in told for phrase in _LOADING):
        return ModelLoading("The engine is still loading its model.")
    if status in (429, 503):
        return EngineOverloaded(_BUSY)
    if status in (408, 504):
        return EngineTimeout("The engine took too long to answer.")
    if status == 501:
        return EngineUnsupported(_BELONGINGS.sub("", message) or _NO_ENDPOINT)
    if word is None and any(phrase in told for phrase in _TOO_LONG):
        tokens, limit = _numbers(detail, message)
        return ContextExceeded(message, param="messages", tokens=tokens, limit=limit)
    if word is None and (status >= 500 or status < 400):
        return EngineError("The engine failed to answer.")
    code = detail.get("code")
    message, param = _plain(message, detail.get("param"), named)
    if word is not None:
        if word.param and param:  # the engine's own name of the caller's field
            message = message.replace(f"'{param}'", f"'{word.param}'")
        message, param = word.says or message, word.param or param
    return EngineRefused(
        message or "The engine refused the request.",
        status=status if 400 <= status < 500 else 400,
        param=param,
        code=code if isinstance(code, str) else None,
        unable=word is not None and word.means == "unable",
    )


_BUSY = "The engine is overloaded. Try again shortly."
_REDIRECTS = (301, 302, 303, 307, 308)
_REDIRECTED = (
    "The engine's address redirects to another address. The operator must set LLM_BASE_URL to the final address."
)
_NO_ENDPOINT = "The engine behind this model does not support this endpoint."


def _meant(word: Word) -> StackError | None:
    """Return the error that this word means, whatever the status; None if it means a mistake of the caller."""
    if word.means == "died":
        return EngineDied("The engine died while it worked on this request.")
    if word.means == "unsupported":
        return EngineUnsupported(word.says or _NO_ENDPOINT, param=word.param)
    if word.means == "full":
        return EngineFull(_BUSY)
    if word.means == "missing":
        return ModelNotFound("The engine does not have this model.", param="model")
    return None


def _unauthorized(dialect: Dialect, *, told: bool) -> EngineUnauthorized:
    if dialect.bare_refusal and not told:
        return EngineUnauthorized(dialect.bare_refusal)
    return EngineUnauthorized("The engine refuses the gateway's own credentials. The operator must set LLM_API_KEY.")


def _inner(detail: dict[str, Any]) -> dict[str, Any]:
    """Return the inner error of Ollama's, which passes on the error of its own llama.cpp as a JSON string in the
    message."""
    message = detail.get("message")
    if isinstance(message, str) and message.startswith('{"error":{'):
        with suppress(orjson.JSONDecodeError, TypeError):
            return dict(orjson.loads(message)["error"])
    return detail


def _bounded(message: str) -> tuple[str, str | None]:
    """Return a message with at most MOST characters, and the field that is named at its end, which is left out."""
    told = _PARAMETER.search(message) if message.endswith(")") else None
    said = message[: told.start()].rstrip() if told else message
    return said if len(said) <= MOST else said[:MOST] + "…", told and told[1]


def _plain(message: str, param: object, named: str | None) -> tuple[str, str | None]:
    """Return an engine's message in plain words, and the request's field that it is about, if it names one. `named` is
    the field at the message's end."""
    name = param if isinstance(param, str) and param else None
    name = _as_ours(name.removeprefix("body.")) if name else None
    if found := list(dict.fromkeys(_PYDANTIC.findall(message))):
        texts = [f"'{_as_ours(where)}': {first or second}." for where, first, second in found[:3]]
        return " ".join(texts), _as_ours(found[0][0])
    if go := _GO.match(message):
        wanted = _GO_TYPES.get(go[4]) or ("a number" if go[4].startswith("float") else "of another type")
        field = go[3]
        if go[4] == "int" and go[1] == "number" and go[2] and go[2].lstrip("-").isdigit():
            return f"'{field}' must be {wanted} of at most 64 bits.", field
        got = {"bool": "true or false", "array": "a list", "object": "an object"}.get(go[1], f"a {go[1]}")
        return (f"'{field}' must be {wanted}, not {got}." if field else f"The body cannot be {got}."), field
    if named is not None:
        return message, name or named
    if template := _JINJA.search(message):
        return f"The model's chat template refuses these messages: {template[1].strip()}", name
    if told := _FIELD.match(message):
        return f"'{told[1]}': {_JSON_EXCEPTION.sub('', message[told.end() :])}", told[1]
    if name is None and (told := _MUST.match(message)):
        name = told[1]
    for pattern in (_NO_PARSER, _BELONGINGS, _JSON_EXCEPTION):
        message = pattern.sub("", message)
    return _without_registry(message), name


def _without_registry(message: str) -> str:
    """Return what Ollama says of a model without the registry before the model's name."""
    before, unable, rest = message.partition(_UNABLE)
    said, space, model = before.rpartition(" ")
    if not unable or model.count("/") < 2:
        return message
    quote = '"' if model.startswith('"') else ""
    return said + space + quote + model.rpartition("/")[2] + unable + rest


def _as_ours(path: str) -> str:
    """Write a field's path as the gateway does: `tools.0.type` becomes `tools[0].type`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path)


def _numbers(detail: dict[str, Any], message: str) -> tuple[int | None, int | None]:
    """Return the prompt's tokens and the model's limit, as far as a refusal has them."""
    tokens, limit = detail.get("n_prompt_tokens"), detail.get("n_ctx")
    if isinstance(tokens, int) and isinstance(limit, int):
        return tokens, limit
    if found := _BOTH_NUMBERS.search(message):
        return int(found[1]), int(found[2])
    found = _LIMIT.search(message)
    return None, int(found[1]) if found else None
