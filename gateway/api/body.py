"""Body: parse the JSON of a request, with bounds on time and memory.

A parser holds the interpreter from its first byte to its last, so the event loop stands still, even if the parser runs
in another thread. Bytes of text are cheap (1 ns each). Values are not: each takes 50 to 150 ns, and 9 bytes of JSON can
take 200 bytes of memory. Values are therefore counted before they are made. The work after the parsing of a large body
runs in a thread, in many short steps.
"""

import functools
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import orjson

from gateway.api.field_names import refuse_long_numbers
from gateway.api.turns import Turns
from gateway.errors import BadRequest
from gateway.relay.client import Client
from gateway.values import MAX_CONTAINERS, MAX_VALUES, weigh

LARGE = 1 << 20  # bytes of memory beyond which a body is weighed exactly, in a thread

_HEAVIEST = 100  # bytes of memory for each structural character, at most
_WIDEST = 5  # bytes of memory for each byte of text: four for each character, and one for its UTF-8


P = ParamSpec("P")
T = TypeVar("T")


class Workshop:
    """Threads of one worker, in which bodies are parsed and checked: one for large bodies, and one for what takes long
    for a body of any size. The Workshop's creator closes it."""

    def __init__(self) -> None:
        self._bodies = Turns("bodies")
        self._searches = Turns("searches")

    def close(self) -> None:
        self._bodies.close()
        self._searches.close()

    def bench(self, account: str, client: Client | None) -> "Bench":
        """Return what works for one request. `account` is that of its key or user. If `client` disconnects, the request
        waits no more."""
        return Bench(account, client, self._bodies, self._searches)


@dataclass(frozen=True, slots=True)
class Bench:
    """Parse and check the body of one request. Each method raises what Turns.run raises."""

    account: str
    client: Client | None
    bodies: Turns
    searches: Turns

    async def parse(self, raw: bytes) -> tuple[dict[str, Any], int]:
        """Parse a body as `parse` does. Returns the object, and how many bytes of memory it takes at most."""
        if (most := _estimate(raw)) <= LARGE:
            return parse(raw), most
        return await self.bodies.run(self.account, self.client, functools.partial(_parse_and_weigh, raw))

    async def work(self, weight: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return `call(*args)`. It runs in the thread if the body takes much memory (`weight`, in bytes)."""
        if weight <= LARGE:
            return call(*args, **kwargs)
        return await self.bodies.run(self.account, self.client, functools.partial(call, *args, **kwargs))

    async def search(self, call: Callable[[], T]) -> T:
        """Return `call()`, which may take a second."""
        return await self.searches.run(self.account, self.client, call)


def parse(raw: bytes) -> dict[str, Any]:
    """Return a request's body as an object. Raises BadRequest, also for too many values.

    orjson is strict where engines differ: NaN, infinities, lone surrogates, a BOM and UTF-16 are refused. A name that
    appears twice in one object is refused too, and so are a whole number beyond 64 bits in a field of the request, and
    nesting that orjson cannot write for the engine.
    """
    _refuse_too_many(raw)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise BadRequest(f"The body is not valid JSON: {exc}.") from None
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    return _read_exactly(raw, body)


def _parse_and_weigh(raw: bytes) -> tuple[dict[str, Any], int]:
    gc.disable()  # the collector would scan the new objects again and again: half of the time for 100,000 lists
    try:
        body = parse(raw)
    finally:
        gc.enable()
    return body, weigh(body).size


def _estimate(raw: bytes) -> int:
    """Return how many bytes of memory the parsed body takes at most, by its characters."""
    plain = raw.isascii() and b"\\u" not in raw
    return _HEAVIEST * _count(raw) + len(raw) * (1 if plain else _WIDEST)


def _count(text: bytes) -> int:
    """Return the number of structural characters, including those in strings."""
    return len(text) - len(text.translate(None, b",:[{"))


def _skeleton(raw: bytes) -> bytes:
    """Return the JSON without its strings. Raises BadRequest if it has too many of them."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') > 4 * MAX_VALUES:
        raise _too_many()
    return b"".join(bare.split(b'"')[::2])


def _refuse_too_many(raw: bytes) -> None:
    """Raise BadRequest for more lists and objects than MAX_CONTAINERS, or more values than MAX_VALUES."""
    if _count(raw) <= MAX_CONTAINERS:
        return
    skeleton = _skeleton(raw)
    containers = skeleton.count(b"[") + skeleton.count(b"{")
    if containers > MAX_CONTAINERS or _count(skeleton) - containers > MAX_VALUES:
        raise _too_many()


def _too_many() -> BadRequest:
    return BadRequest(
        f"The body has more than {MAX_CONTAINERS} lists and objects, or more than {MAX_VALUES} values. "
        "Send less in one request.",
        code="too_many_values",
    )


def _read_exactly(raw: bytes, body: dict[str, Any]) -> dict[str, Any]:
    """Return the body without anything that parsers read differently. `body` is `raw`, parsed by orjson.

    An object that has a name twice is refused. A whole number beyond 64 bits, which orjson would turn into a float, is
    kept as it was written, as an orjson.Fragment. A body that orjson writes exactly as it came has neither. The compact
    JSON of OpenAI's clients is like that, and this comparison costs 0.2 µs for a short question. Otherwise colons are
    counted: the JSON has one for each name, and the parsed body has each name once, so the two numbers must be equal.
    Raises BadRequest that names the field.
    """
    try:
        if orjson.dumps(body) == raw:
            return body
    except TypeError:
        raise BadRequest("The body is nested too deeply.") from None  # deeper than orjson writes: about 250 levels
    if _skeleton(raw).count(b":") != weigh(body).names:
        name = _repeated_name(raw) if len(raw) <= LARGE else None
        which = f"The name '{name}'" if name is not None else "A name"
        raise BadRequest(f"{which} appears twice in one object.", param=name)
    if _LONG in raw.translate(_DIGITS):
        body = json.loads(raw.decode(), parse_int=_number)
        refuse_long_numbers(body)
    return body


_DIGITS = bytes(b"0"[0] if b in b"0123456789" else b for b in range(256))
_LONG = b"0" * 19  # a number with this many digits may have more than 64 bits


def _number(digits: str) -> Any:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        return orjson.Fragment(digits.encode())
    return int(digits)


class _RepeatedError(Exception):
    pass


def _repeated_name(raw: bytes) -> str | None:
    try:
        json.loads(raw.decode(), object_pairs_hook=_pairs, parse_int=float)
    except _RepeatedError as exc:
        return str(exc.args[0])[:64]
    return None


def _pairs(pairs: list[tuple[str, Any]]) -> None:
    names = set()
    for name, _ in pairs:
        if name in names:
            raise _RepeatedError(name)
        names.add(name)
