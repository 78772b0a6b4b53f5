"""Answers: all that are kept or made on one host, and which of them a request gets."""

import asyncio
import hashlib
import logging
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
from starlette.types import Receive, Send

from gateway import logs
from gateway.api.idempotency.file import FAILED, RUNNING, WHOLE, Entry, Kind, framed, whose
from gateway.api.idempotency.form import Form
from gateway.api.idempotency.maker import Maker, look_back
from gateway.api.idempotency.making import Making, too_large
from gateway.api.idempotency.reader import Reader
from gateway.api.idempotency.space import Space
from gateway.errors import (
    BUG,
    BadRequest,
    EngineUnavailable,
    IdempotencyConflict,
    InternalError,
    InvalidKey,
)
from gateway.relay.answer import way as how
from gateway.relay.client import Client
from gateway.relay.trail import Past, lost
from gateway.settings import Settings

MAX_NAME = 255  # characters of an Idempotency-Key
SWEEP = 1.0  # seconds
log = logging.getLogger("stack")


class Answers:
    """The answers of one host's gateway to requests with an Idempotency-Key, in `directory`. Use it with `async with`.

    A complete answer is kept for `stack_idempotency_ttl` seconds after it was last read. All answers together take at
    most `stack_idempotency_bytes`. A single answer, and all answers of one key, take at most half of that. A key
    without space loses its own oldest answers. When all space is used, the keys with more than an equal share lose
    their oldest answers, and no other key loses any.
    """

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._directory = directory
        self._linger = settings.stack_idempotency_linger
        self._bytes = settings.stack_idempotency_bytes
        self._making: dict[Path, Making] = {}
        self._space = Space(directory, self._bytes, settings.stack_idempotency_ttl, self._making)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sweeper.cancel()
        for making in self._making.values():
            making.abandon()
        await asyncio.gather(self._sweeper, *self._tasks, return_exceptions=True)

    async def answer(
        self,
        name: bytes,
        account: str,
        digest: bytes,
        request_id: str,
        maker: Maker,
        client: Client,
        receive: Receive,
        send: Send,
        form: Form,
    ) -> None:
        """Send the answer that is kept under this `name`, or have `maker` make one. `account` is whose it is
        (keys.known.Key). `digest` is that of the request's path and body, which must be the same as before. `form`
        writes the errors that occur here.

        Raises BadRequest for an invalid name, IdempotencyConflict if the name belongs to another request,
        EngineUnavailable if there is no space, and ClientLeft. After ClientLeft the maker continues for
        `stack_idempotency_linger` seconds.
        """
        if not 0 < len(name) <= MAX_NAME or not name.isascii() or not name.decode("ascii").isprintable():
            raise BadRequest(
                f"Idempotency-Key must be 1 to {MAX_NAME} printable ASCII characters.", param="Idempotency-Key"
            )
        path = self._path(name, account)
        first = False
        while True:
            entry = Entry.open(path)
            if entry is None:
                first = self._begin(path, digest, maker, form)
                continue
            try:
                state = _state(entry, path, digest)
                if state == FAILED:
                    continue  # its maker takes it away
                if not first:
                    told = {"request_id": request_id, "key": account.partition("/")[0], "whole": state == WHOLE}
                    logs.event("idempotent_replay", told)
                reader = Reader(entry, self._making.get(path), client, form, maker.refused, again=not first)
                if await self._read(reader, entry, path, maker, form, receive, send, request_id):
                    return
                if first:  # not even an error could be written, and another attempt would ask the engine again
                    raise too_large()
            finally:
                entry.close()

    async def _read(
        self,
        reader: Reader,
        entry: Entry,
        path: Path,
        maker: Maker,
        form: Form,
        receive: Receive,
        send: Send,
        request_id: str,
    ) -> bool:
        """Send a client the answer, whoever makes it, and have another one go on with it if that one dies. Returns
        whether it was sent. Raises ClientLeft."""
        try:
            while not await reader.run(receive, send):
                if not await self._goes_on(entry, path, maker, form, request_id, reader.position):
                    if reader.started:
                        await reader.lose(send, lost(), form)
                    return reader.started
                reader.making = self._making.get(path)
        except InvalidKey as exc:
            if not reader.started:
                raise
            await reader.lose(send, exc, await maker.form())
        return True

    def has(self, name: bytes | None, account: str) -> bool:
        """Return whether this account has an answer with this name, complete or running."""
        return name is not None and self._path(name, account).exists()

    def _path(self, name: bytes, account: str) -> Path:
        # By the account as well: nobody sees what is somebody else's, even by guessing its name. The space is a key's.
        whose = hashlib.sha256(account.partition("/")[0].encode()).hexdigest()[:32]
        of_both = hashlib.sha256(account.encode() + b"\0" + name).hexdigest()
        return self._directory / f"{whose}-{of_both}"

    def _begin(self, path: Path, digest: bytes, maker: Maker, form: Form, past: Past | None = None) -> bool:
        """Have the answer made, unless somebody else just began. `past` is what there was of another one, whose place
        it takes because nothing of it can be used. Raises EngineUnavailable when there is no room."""
        try:
            self._space.make_room(whose(path))
            notes: dict[str, Any] = {"setting": maker.setting} | ({} if past is None else past.inheritance)
            entry = Entry.create(path, digest, framed(Kind.NOTE, orjson.dumps(notes)), instead=past is not None)
        except OSError as exc:
            raise _no_space() from exc
        if entry is None:
            return False
        self._have_made(Making(entry, path, self._bytes // 2, self._space, form, past), maker)
        return True

    async def _goes_on(
        self, entry: Entry, path: Path, maker: Maker, form: Form, request_id: str, position: int
    ) -> bool:
        """The maker of an answer died, or had to give it up. Have this worker go on with it, if nobody else does.
        Returns whether the file has, or will have, the rest of the answer behind `position`."""
        if not entry.stands_at(path):
            return False
        mine = Entry.open(path)
        if mine is None:
            return False
        if not mine.lock():
            mine.close()
            return True  # somebody else goes on with it, or is about to
        try:
            found = mine.head() if mine.stands_at(path) else None
            if found is None or found.state != RUNNING:
                rest = found is not None and found.state == WHOLE and mine.reaches_end(position)
                if not rest:
                    mine.drop(path)
                mine.close()
                return rest
            past, size, whole = await look_back(mine, maker)
            way = "whole" if whole else how(past)
            told = {"request_id": request_id, "after": past.row.get("request_id"), "way": way}
            logs.event("answer_taken_over", told, "warning")
            if way == "whole":
                mine.make_whole(size)
                mine.close()
                return True
            if way == "elsewhere":
                past.started = False
                self._begin(path, found.digest, maker, form, past)  # in its place
                mine.close()
                return False
            mine.cut(size)
            if missing := past.missing:
                mine.write(framed(Kind.BODY, missing))
            mine.seen()
            self._space.make_room()
        except BaseException:
            mine.close()
            raise
        self._have_made(Making(mine, path, self._bytes // 2, self._space, form, past, size), maker)
        return True

    def _have_made(self, making: Making, maker: Maker) -> None:
        self._making[making.path] = making
        maker.begins()
        task = asyncio.create_task(self._make(making, maker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make(self, making: Making, maker: Maker) -> None:
        whole = False
        try:
            whole = await maker.run(making, making.send, making.trail) and not making.full
        except Exception:
            log.exception("a bug in the gateway")
            making.fail(InternalError(BUG))
        finally:
            # Only a whole answer is worth repeating. Those who read along get what there is of this one.
            with suppress(OSError):
                if not whole:
                    making.path.unlink(missing_ok=True)
                making.entry.write_state(WHOLE if whole else FAILED)
            del self._making[making.path]
            making.entry.close()
            making.tell()

    async def _sweep(self) -> None:
        """Keep house, and stop making what nobody has read for a while."""
        while True:
            await asyncio.sleep(SWEEP)
            for making in list(self._making.values()):
                if not making.readers and time.monotonic() - making.entry.last_seen() > self._linger:
                    making.abandon()
            with suppress(OSError):
                self._space.make_room()


def _no_space() -> EngineUnavailable:
    return EngineUnavailable(
        "The gateway has no space now to keep the answer for this Idempotency-Key. Try again shortly, or send the "
        "request without the key.",
        code="idempotency_full",
    )


def _state(entry: Entry, path: Path, digest: bytes) -> int:
    """How the answer there stands; FAILED for a file that is none, or lacks its end, which is removed. Raises
    IdempotencyConflict."""
    head = entry.head()
    if head is None and entry.remove(path):
        return FAILED
    if head is None or head.digest != digest:
        raise IdempotencyConflict(
            "This Idempotency-Key was used for another request. Use a new key for each request.",
            param="Idempotency-Key",
        )
    if head.state == WHOLE and not entry.ended():
        entry.remove(path)
        return FAILED
    return head.state
