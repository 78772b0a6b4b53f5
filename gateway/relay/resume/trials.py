"""Continuation trials: the way in which a model on an engine goes on with an answer, found out by trying.

Ollama leaves that to the model's chat template. Three kinds were seen (0.32.6 and 0.32.15). One leaves a last message
of the assistant's open: the answer goes on. One closes it and opens a new turn: another answer begins. One goes on, and
the engine repeats the text that it was given. The raw way is right with all three, if the engine shows the prompt that
it makes, and the model's text needs no parsing. Otherwise the same request may give the same answer again.
"""

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from gateway.dialects.asking import Prompt, as_count
from gateway.dialects.dialect import Way
from gateway.dialects.ollama_raw import thinks_of
from gateway.dialects.thoughts import Tags
from gateway.endpoints import ENDPOINTS, Kind
from gateway.errors import EngineError, EngineRefused
from gateway.exchange import Exchange
from gateway.upstream import parameters
from gateway.upstream.client import Upstream

FRESH = 600.0  # seconds for which a result is used; after that, the name may mean another template
MOST = 1000  # results that are kept
MARKER = "Tangerine lanterns drift slowly over the old"  # words that no template or model adds by itself
_QUESTION = "Write one sentence."
_TRIAL = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": MARKER}]
_TOKENS = 4  # tokens of a trial's answer, enough to see a repetition of the marker
_RAW_TOKENS = 8  # tokens of the answer with which the raw way is tried
_THOUGHT = (
    "I am asked for one sentence. I know which one I write, so I answer now."  # after it a model ends its reasoning
)
_ENDING_TOKENS = 24  # tokens in which it has to do so

_Key = tuple[str, str, str, bool, str]


class Continuations:
    """Remember how the models of all engines continue an answer. One per worker."""

    def __init__(self) -> None:
        self._found: dict[_Key, tuple[float, bool | Tags]] = {}
        self._locks: defaultdict[_Key, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def way(self, upstream: Upstream, model: str, exchange: Exchange, *, same: bool) -> Way:
        """Return the way in which this model continues an answer to a request like this. `same`: the model itself began
        the answer, and would begin it in the same way again.

        Raises EngineRefused if there is no way, and EngineError if the engine cannot be asked.
        """
        fields, raw = _fields(upstream, exchange), upstream.dialect.raw
        tools, effort = fields.get("tools"), upstream.dialect.effort(fields)
        # Tools and effort change what a template writes.
        key = upstream.name, model, bool(tools), _known(effort)
        if raw is not None and raw.fits(fields):
            kind: Kind = exchange.kind
            if await self._finds((f"raw {kind}", *key), lambda: _goes_on_raw(upstream, model, kind, effort)):
                return "raw"
        if exchange.endpoint.chats and await self._finds(
            ("message", *key), lambda: _continues(upstream, model, tools, effort)
        ):
            return "message"
        if same:
            return "anew"
        raise EngineRefused("This model does not continue an answer that another engine began.", status=400)

    async def tags(self, upstream: Upstream, model: str, exchange: Exchange) -> Tags:
        """Return the tags between which this model continues reasoning that it is given.


        Raises EngineRefused if it does not go on, and EngineError if the engine cannot be asked.
        """
        dialect = upstream.dialect
        effort = dialect.effort(_fields(upstream, exchange))
        look = _takes_up_raw if dialect.raw is not None else _takes_up_field if dialect.thinks_in else _takes_up
        key = "thought", upstream.name, model, False, _known(effort)
        found = await self._finds(key, lambda: look(upstream, model, effort))
        if not isinstance(found, Tags):
            raise EngineRefused("This model does not continue reasoning that it is given.", status=400)
        return found

    async def _finds(self, key: _Key, look: Callable[[], Awaitable[bool | Tags]]) -> bool | Tags:
        async with self._locks[key]:
            found = self._found.get(key)
            if found is None or time.monotonic() - found[0] > FRESH:
                if len(self._found) >= MOST:
                    self._found.clear()
                found = self._found[key] = time.monotonic(), await look()
        return found[1]


async def _goes_on_raw(upstream: Upstream, model: str, kind: Kind, effort: Any) -> bool:
    """Return whether the raw way gives the rest of an answer: a short answer is made, and then its second half again.
    Raises EngineError."""
    raw, endpoint = upstream.dialect.raw, ENDPOINTS[kind]
    asked: dict[str, Any] = {"messages": _TRIAL[:1]} if endpoint.chats else {"prompt": _QUESTION}
    asked |= {"temperature": 0, "max_tokens": _RAW_TOKENS} | ({} if effort is None else {"reasoning_effort": effort})
    prompt = Prompt(kind, model, asked, 0)
    rendered = await raw.render(upstream, prompt) if raw else None
    if raw is None or rendered is None:
        return False
    answer = await _ask(upstream, endpoint.asks, asked | {"model": model, "stream": False})
    try:
        choice = answer["choices"][0]
        message = choice["message"] if endpoint.chats else {"content": choice["text"]}
        text = message["content"]
    except (LookupError, TypeError):
        return False
    if not isinstance(text, str) or not text.strip() or message.get("reasoning") or message.get("tool_calls"):
        return False
    half = max(0, text.rfind(" ", 0, len(text) // 2 + 1))  # an end of a token
    rest = await _ask(upstream, raw.path, raw.body(prompt, rendered + text[:half]) | {"stream": False})
    return isinstance(rest.get("response"), str) and (text[:half] + rest["response"]).startswith(text)


async def _takes_up_raw(upstream: Upstream, model: str, effort: Any) -> bool | Tags:
    """Return the tags if raw requests give the second half of a short piece of reasoning, and show where reasoning
    ends: a tag that the model's vocabulary marks as control is missing in their answers. Raises EngineError."""
    raw, (begins, ends) = upstream.dialect.raw, upstream.dialect.think_tags
    asked: dict[str, Any] = {"messages": _TRIAL[:1], "temperature": 0, "max_tokens": _RAW_TOKENS}
    asked |= {} if effort is None else {"reasoning_effort": effort}
    prompt = Prompt("chat", model, asked, 0)
    rendered = await raw.render(upstream, prompt) if raw else None
    if raw is None or rendered is None:
        return False
    path, body, before = raw.path, raw.body, rendered
    answer = await _ask(upstream, "chat/completions", asked | {"model": model, "stream": False})
    try:
        thought = answer["choices"][0]["message"].get("reasoning")
    except (LookupError, TypeError, AttributeError):
        return False
    if not isinstance(thought, str) or not thought.strip():
        return False

    async def rest(text: str, tokens: int = _RAW_TOKENS) -> str:
        longer = replace(prompt, fields=asked | {"max_tokens": tokens})
        told = (await _ask(upstream, path, body(longer, before + text) | {"stream": False})).get("response")
        return told if isinstance(told, str) else ""

    opens = ""
    if not rendered.rstrip().endswith(begins):
        opened = re.match(rf"\s*{re.escape(begins)}\s*", await rest(""))
        if opened is None:
            return False
        opens = opened[0]
    half = max(0, thought.rfind(" ", 0, len(thought) // 2 + 1))  # an end of a token
    if not (thought[:half] + await rest(opens + thought[:half])).startswith(thought):
        return False
    closed = re.search(rf"\s*{re.escape(ends)}\s*(?=\S)", await rest(opens + _THOUGHT, _ENDING_TOKENS))
    return Tags(opens, closed[0]) if closed else False


async def _takes_up_field(upstream: Upstream, model: str, effort: Any) -> bool | Tags:
    """Find out whether the prompt ends with reasoning that is handed over in a field of its own, and whether more of it
    comes then. A blocking answer repeats what was handed over. Raises EngineError."""
    name = upstream.dialect.thinks_in
    asked: dict[str, Any] = {
        "model": model,
        "messages": [_TRIAL[0], {"role": "assistant", "content": "", name: MARKER}],
    }
    asked |= {} if effort is None else {"reasoning_effort": effort}
    prompt = (await _ask(upstream, "/apply-template", asked)).get("prompt")
    if not isinstance(prompt, str) or not prompt.endswith(MARKER) or prompt.count(MARKER) != 1:
        return False
    answer = await _ask(upstream, "chat/completions", asked | {"max_tokens": _TOKENS, "temperature": 0})
    try:
        message = answer["choices"][0]["message"]
        thought, said = message[name].removeprefix(MARKER), message.get("content")
    except (LookupError, TypeError, AttributeError):
        return False
    more = bool(thought.strip()) and not said and MARKER.split(maxsplit=1)[0] not in thought
    return Tags("", "") if more else False


async def _takes_up(upstream: Upstream, model: str, _effort: Any) -> bool | Tags:
    """By what the chat template leaves of reasoning that is handed over, and by what then comes. Raises EngineError."""
    dialect = upstream.dialect
    begins = dialect.think_tags[0]
    asked = {"model": model, **dialect.continues}

    def begun(text: str) -> dict[str, Any]:
        return asked | {"messages": [_TRIAL[0], {"role": "assistant", "content": begins + text}]}

    counts = [
        as_count((await _ask(upstream, "/tokenize", it)).get("count"))
        for it in (begun(MARKER), begun("Hm"), {"model": model, "prompt": MARKER, "add_special_tokens": False})
    ]
    whole, short, alone = (it or 0 for it in counts)
    if not alone or whole - short < alone // 2:
        return False  # the template leaves it out
    answer = await _ask(upstream, "chat/completions", begun(MARKER) | {"max_tokens": _TOKENS, "temperature": 0})
    try:
        message = answer["choices"][0]["message"]
    except (LookupError, TypeError):
        return False
    thought = message.get("reasoning") or message.get("reasoning_content")
    if not isinstance(thought, str) or not thought.strip() or message.get("content"):
        return False
    return MARKER.split(maxsplit=1)[0] not in thought and Tags(*dialect.think_tags)


async def _continues(upstream: Upstream, model: str, tools: Any, effort: Any) -> bool:
    """Return whether the model continues a last assistant message, by the prompt that the engine builds and by what it
    then generates. Raises EngineError."""
    asked: dict[str, Any] = {"model": model, "messages": _TRIAL, "stream": False}
    if tools:
        asked["tools"] = tools
    # A version that does not know the field answers the trial. Any option except num_predict would load the model
    # again.
    rendering = {"_debug_render_only": True, "options": {"num_predict": 1}}
    rendered = await _ask(upstream, "/api/chat", asked | thinks_of(effort) | rendering)
    told = rendered.get("_debug_info")
    prompt = told.get("rendered_template") if isinstance(told, dict) else None
    if not isinstance(prompt, str) or not prompt.endswith(MARKER) or prompt.count(MARKER) != 1:
        return False
    effort_asked = {} if effort is None else {"reasoning_effort": effort}
    answer = await _ask(upstream, "chat/completions", asked | effort_asked | {"max_tokens": _TOKENS, "temperature": 0})
    try:
        message = answer["choices"][0]["message"]
        text = message["content"]
    except (LookupError, TypeError):
        return False
    said = isinstance(text, str) and bool(text.strip()) and not message.get("reasoning")
    return said and not text.lstrip().startswith(MARKER.split(maxsplit=1)[0])


def _fields(upstream: Upstream, exchange: Exchange) -> dict[str, Any]:
    """Return what the engine is sent of a request's fields."""
    return parameters.read(upstream.dialect.name, exchange.kind, exchange.fields).fields


def _known(effort: Any) -> str:
    return effort if effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra") else ""


async def _ask(upstream: Upstream, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the engine's answer; empty if it refuses. Raises EngineError if it cannot answer now."""
    response = await upstream.ask(path, body, patient=True)
    if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise EngineError("The gateway could not find out whether this engine would continue an answer.")
    try:
        answer = response.json() if response.status == HTTPStatus.OK else None
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {}
