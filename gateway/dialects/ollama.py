"""Ollama, 0.32.6 and 0.32.15, where the uses of OpenAI's parameters were seen (tests/recordings/ollama). Versions
before 0.12.6 are not supported, because they ignore `truncate: false`, by which a prompt that is too long is found.

This file is long because it holds all that differs at this engine.
"""

import datetime as dt
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import orjson

from gateway.dialects import llamacpp
from gateway.dialects.asking import Engine, Facts, Prompt, Told, Window, as_count, as_list, as_object, uncounted
from gateway.dialects.dialect import Dialect, Loader, Use, Ways, Word, uses
from gateway.dialects.ollama_raw import RESUMES, UNREADABLE, effort_of, raw_way, thinks_of
from gateway.dialects.sounds import fit_transcription
from gateway.endpoints import Kind
from gateway.errors import (
    BadRequest,
    ContextExceeded,
    EngineDied,
    EngineError,
    EngineRefused,
    EngineUnauthorized,
    unloadable,
)

EMBEDDED_AT_ONCE = 2048  # tokens: its batch, which cuts an input whatever the context is

_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
# Of its own API. A transcription becomes a chat there.
_PATHS = {"chat": "/api/chat", "completion": "/api/generate", "embedding": "/api/embed", "transcription": "/api/chat"}
_OWN_FIELDS = "raw format think template context system suffix options keep_alive truncate shift draft"
_WORDS = (
    Word("maximum pending requests exceeded", "full"),
    Word("error was encountered while running the model", "died"),
    Word("runner process has terminated", "died"),
    Word("model runner has unexpectedly stopped", "died"),
    Word("invalid format:", "caller", "response_format", "The JSON schema must be an object."),
    Word("field 'json_schema'", "caller", "response_format"),  # which it gives its own llama.cpp under this name
    # Said of an empty text: one that is too long is cut in silence.
    Word("cannot be truncated further", "caller", "input", "An input has no text that the model can read."),
    Word("does not support thinking", "unable", "reasoning_effort"),
    Word("invalid reasoning value", "caller", "reasoning_effort"),
    Word("does not support tools", "unable", "tools"),
    Word("invalid tool call arguments", "caller", "messages"),
    Word("does not support insert", "unable", "suffix"),
    Word("does not support chat", "unsupported", says="The model behind this name does not support chat."),
    Word("does not support generate", "unsupported", says="The model behind this name does not generate text."),
    Word("invalid message", "caller", "messages"),
    Word("invalid image input", "caller", "messages"),
    Word("invalid input", "caller", "input"),
    Word("'encoding_format'", "caller", "encoding_format"),
    Word("'stop' field", "caller", "stop"),
    Word("top_logprobs must be", "caller", "top_logprobs"),
    Word("ollama cloud is disabled", "missing"),  # with a 403
    Word("404 page not found", "unsupported"),
    *llamacpp.WORDS,
)


def _spelling(name: str) -> str:
    """Return the one spelling of all that mean this model: `Qwen3` is `registry.ollama.ai/library/qwen3:latest`."""
    path = name.lower().rpartition("://")[2]
    before, colon, tag = path.rpartition(":")
    if not colon or "/" in tag:
        before, tag = path, _TAG
    parts = before.split("/")
    defaults = (_HOST, _NAMESPACE)[: max(0, 3 - len(parts))]
    return "/".join((*defaults, *parts)) + f":{tag}"


async def _ask(engine: Engine, path: str, body: dict[str, Any] | None = None, *, patient: bool = False) -> Told:
    """Ask, and return the answer. One that refuses the question means that the engine is not asked for this, and that
    the request itself will show why. Raises EngineError if the engine cannot answer now."""
    told = await engine.ask(path, body, patient=patient)
    if told.status != HTTPStatus.OK:
        error = engine.refusal(told)
        if isinstance(error, EngineError) and not isinstance(error, EngineRefused | EngineUnauthorized):
            raise error
    return told


async def _window(engine: Engine, prompt: Prompt) -> Window:
    (listed, limit), loads = await _loaded(engine, prompt.model), False
    if not listed:  # the size is decided when the model is loaded, which the request needs anyway
        loads = await _load(engine, prompt.kind, prompt.model, None)
        listed, limit = await _loaded(engine, prompt.model)
    shown = as_object(await _ask(engine, "/api/show", {"model": prompt.model}))
    if prompt.endpoint.counted == "inputs" and limit is not None:
        limit = min(limit, EMBEDDED_AT_ONCE)
    own = sum(len(orjson.dumps(shown.get(name) or "")) for name in ("system", "messages"))
    elsewhere = bool(shown.get("remote_host"))  # a model of Ollama's cloud, which is never listed (read in its source)
    return Window(limit, own, unloaded=loads and not listed and not elsewhere)


async def _loaded(engine: Engine, model: str) -> tuple[bool, int | None]:
    """Whether the model is in memory, and its context window, as far as it is told."""
    wanted = _spelling(model)
    for entry in as_list(await _ask(engine, "/api/ps"), "models"):
        if _spelling(str(entry.get("model") or entry.get("name"))) == wanted:
            return True, as_count(entry.get("context_length"))
    return False, None


async def _in_memory(engine: Engine) -> Mapping[str, float]:
    now, found = dt.datetime.now(dt.UTC), {}
    for it in as_list(await _ask(engine, "/api/ps"), "models"):
        left = 0.0
        with suppress(TypeError, ValueError):
            left = (dt.datetime.fromisoformat(str(it.get("expires_at"))) - now).total_seconds()
        found[_spelling(str(it.get("model") or it.get("name")))] = left
    return found


async def _load(engine: Engine, kind: Kind, model: str, keep: int | None) -> bool:
    """Have a model loaded. A request without a prompt does that. Its `keep_alive` is in force until the model is
    unloaded, because OpenAI's endpoints set none (read in its source)."""
    asked = {"model": model, "stream": False} | ({} if keep is None else {"keep_alive": keep})
    try:
        return (await _ask(engine, _PATHS[kind], asked, patient=True)).status == HTTPStatus.OK
    except EngineError as exc:
        if type(exc) in (EngineError, EngineDied):  # not if it is full, or is not there
            raise unloadable() from exc
        raise


# Ollama's words for what a model can do, and ours.
_CAN = {
    "completion": "chat",
    "embedding": "embeddings",
    "tools": "tools",
    "vision": "vision",
    "audio": "audio",
    "thinking": "thinking",
}


async def _models(engine: Engine) -> Mapping[str, Facts]:
    """Return what /api/tags tells of all models at once. The window is decided when a model is loaded."""
    windows = {
        _spelling(str(it.get("model") or it.get("name"))): as_count(it.get("context_length"))
        for it in as_list(await engine.ask("/api/ps"), "models")
    }
    found = {}
    for it in as_list(await engine.ask("/api/tags"), "models"):
        name, can, details = _spelling(str(it.get("name"))), it.get("capabilities"), it.get("details")
        found[name] = Facts(
            context=windows.get(name),
            trained=as_count(details.get("context_length")) if isinstance(details, dict) else None,
            capabilities=frozenset(_CAN[word] for word in can if word in _CAN) if isinstance(can, list) else None,
            loaded=name in windows,
        )
    return found


async def _count_messages(engine: Engine, prompt: Prompt) -> int | None:
    fields = prompt.fields
    try:
        messages = _native(fields["messages"])
    except UNREADABLE:
        raise BadRequest(_UNREADABLE, param="messages") from None
    told = {"messages": messages, "tools": fields.get("tools") or []}
    return await _count(engine, prompt, _ONE_TOKEN | told | thinks_of(effort_of(fields)))


async def _count_prompt(engine: Engine, prompt: Prompt) -> int | None:
    told = {"prompt": prompt.fields["prompt"], "suffix": prompt.fields.get("suffix") or ""}
    return await _count(engine, prompt, _ONE_TOKEN | told)


async def _count_inputs(engine: Engine, prompt: Prompt) -> int | None:
    return await _count(engine, prompt, {"input": prompt.fields["input"]})


_UNREADABLE = (
    "The engine behind this model cannot read these messages. Check the parts of their contents and their tool calls."
)
# Any other option, or `shift`, would have it load the model anew.
_ONE_TOKEN: dict[str, Any] = {"options": {"num_predict": 1}}


async def _count(engine: Engine, prompt: Prompt, body: dict[str, Any]) -> int | None:
    """Have it read a prompt with cutting forbidden. Raises ContextExceeded if the prompt does not fit, and EngineError
    if it cannot be read now."""
    asked = {"model": prompt.model, "stream": False, "truncate": False} | body
    told = await _ask(engine, _PATHS[prompt.kind], asked, patient=True)
    if told.status != HTTPStatus.OK and isinstance(error := engine.refusal(told), ContextExceeded):
        raise error
    return as_count(as_object(told).get("prompt_eval_count"))


def _native(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return OpenAI's messages as Ollama makes its own of them (openai/openai.go, FromChatRequest)."""
    native: list[dict[str, Any]] = []
    called: dict[str, str] = {}  # the tools' names by the calls' ids
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        made = [{"role": message["role"], **_native_part(it)} for it in parts]
        calls = message.get("tool_calls") or ()
        functions = [call["function"] for call in calls]
        called |= {call.get("id") or "": it.get("name") for call, it in zip(calls, functions, strict=True)}
        if made:
            made[-1] |= {
                "tool_calls": [{"function": it | {"arguments": orjson.loads(it["arguments"])}} for it in functions],
                "tool_name": message.get("name") or called.get(message.get("tool_call_id") or "", ""),
                "thinking": message.get("reasoning") or "",
            }
        native += made
    return native


def _native_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"content": part["text"]}
    if part["type"] == "input_audio":  # it has no other place for sounds
        return {"content": "", "images": [part["input_audio"]["data"]]}
    image = part["image_url"]
    url = image["url"] if isinstance(image, dict) else image
    return {"content": "", "images": [url.partition(";base64,")[2]]}


def _fit_prompt(fields: dict[str, Any]) -> dict[str, Any]:
    """It takes one text as a prompt."""
    texts = _texts("prompt", fields["prompt"])
    if len(texts) != 1:
        raise BadRequest(
            "'prompt' must be one text: the engine behind this model accepts no list of them.", param="prompt"
        )
    if fields.get("max_tokens") == 0:
        raise BadRequest("'max_tokens' must be at least 1 for the engine behind this model.", param="max_tokens")
    return fields | {"prompt": texts[0]}


def _fit_inputs(fields: dict[str, Any]) -> dict[str, Any]:
    """It takes texts as inputs."""
    if not _texts("input", fields["input"]):
        raise BadRequest("'input' is empty.", param="input")
    return fields


def _texts(field: str, content: Any) -> list[str]:
    """Return a request's texts. Of an empty one it makes nothing, or a wrong error: then this raises BadRequest."""
    texts = content if isinstance(content, list) else [content]
    for index, text in enumerate(texts):
        param = f"{field}[{index}]" if isinstance(content, list) else field
        if not isinstance(text, str):
            raise BadRequest(f"'{param}' must be text: the engine behind this model accepts no tokens.", param=param)
        if not text:
            raise BadRequest(f"'{param}' is empty. The engine behind this model needs text.", param=param)
    return texts


_LIMITS: dict[str, Use] = {"max_completion_tokens": "as max_tokens"}
_BY_GATEWAY: dict[str, Use] = {"n": "by the gateway"}  # it makes one answer to a request
_NATIVE = uses(ignored="format num_ctx num_predict raw think")  # of its own API, where people know them from

_CHAT = Ways(
    parameters=uses(
        taken="""messages model stream stream_options max_tokens temperature top_p stop seed frequency_penalty
            presence_penalty logprobs top_logprobs response_format tools reasoning_effort""",
        ignored="""logit_bias verbosity modalities audio prediction web_search_options functions
            function_call user safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options
            service_tier store metadata moderation""",
    )
    | _LIMITS
    | _BY_GATEWAY
    | {"tool_choice": "by the gateway", "parallel_tool_calls": "by the gateway"},
    extras=_NATIVE | uses(taken="reasoning"),
    count=_count_messages,
)
_COMPLETION = Ways(
    parameters=uses(
        taken="""prompt model stream stream_options max_tokens temperature top_p stop seed frequency_penalty
            presence_penalty suffix""",
        ignored="logit_bias logprobs echo best_of user",
    )
    | _BY_GATEWAY,
    extras=_NATIVE | _LIMITS,
    count=_count_prompt,
    fit=_fit_prompt,
)
_EMBEDDING = Ways(
    parameters=uses(taken="input model encoding_format dimensions", ignored="user"),
    extras=uses(ignored="truncate"),
    count=_count_inputs,
    fit=_fit_inputs,
)

_TRANSCRIPTION = Ways(  # read in its source: it shows the sound to a model that hears, and tells no seconds
    parameters=uses(
        taken="file model language prompt response_format",
        ignored="""temperature timestamp_granularities[] chunking_strategy include[] known_speaker_names[]
            known_speaker_references[] keywords[] languages[]""",
    ),
    count=uncounted,
    fit=fit_transcription("json"),
)

OLLAMA = Dialect(
    name="ollama",
    url="http://127.0.0.1:11434/v1",
    model="llama3.1:8b",
    health="/api/version",
    endpoints={
        "chat": _CHAT,
        "completion": _COMPLETION,
        "embedding": _EMBEDDING,
        "rerank": None,
        "transcription": _TRANSCRIPTION,
        "speech": None,
    },
    sampling={"n_predict": "as max_tokens"},
    roles={
        "system": "taken",
        "developer": "as system",  # its templates know no such role, and leave its messages out
        "user": "taken",
        "assistant": "taken",
        "tool": "taken",
        "function": "taken",
    },
    parts={
        "text": "taken",
        "image_url": "taken",
        "input_audio": "taken",
        "refusal": "as text",
        "file": "refused",  # by the gateway: it would say something else
        "any other": "refused",
    },
    # Seen with a last message of the assistant's. That it reads no `reasoning_content` stands in its source.
    reasoning={"reasoning": "taken", "reasoning_content": "as reasoning"},
    control={
        "keep_alive": (),  # how long a model stays in memory
        "options": ({},),  # context length, threads, layers on the GPU: reloads the model for everyone
    },
    native=frozenset(_OWN_FIELDS.split()),
    picky_contents=True,
    most_repeats=llamacpp.MOST_REPEATS,
    follows_each_way=True,
    words=_WORDS,
    too_long=(
        "exceeds the context length",  # before 0.30
        "longer than the context length",  # from 0.30 on, where it may not cut
        "maximum context length",  # its runner for Apple's chips
        *llamacpp.LLAMACPP.too_long,
    ),
    # On loopback it answers a Host header with another name than its own so.
    bare_refusal="The engine does not accept the host name that the gateway uses for it. The operator must let it"
    " listen on all addresses (OLLAMA_HOST=0.0.0.0), or put its address into the base URL.",
    window=_window,
    models=_models,  # OLLAMA_NUM_PARALLEL is told to nobody
    loader=Loader(loaded=_in_memory, load=_load),
    spelling=_spelling,
    hides_calls=True,  # recorded; with a model's own template, until the end of the answer
    cuts=True,
    dies_apart=True,
    whole_streams=True,  # recorded: it makes its blocking answers of the same stream
    counts_by_reading=True,
    long_limits="cut",  # otherwise it shifts the context and goes on
    doubtful=True,
    raw=raw_way(_native),
    effort=effort_of,
    seeds=True,
    resumes=RESUMES,
    think_tags=("<think>", "</think>"),  # the usual ones; a trial shows the white space around them
)
