"""Idempotency: a POST that is repeated with the same `Idempotency-Key` gets the one answer, made once.

The answer is written to a file as it is made, and everybody who asks for it, the first caller included, reads from
there: from its beginning, at his own pace, on any worker, while it runs and for a stated time after. So a client whose
connection is cut comes back and has the whole of it; the engine worked once, and the key is billed once.

Whoever makes an answer holds a lock on its file. One whose maker was killed is seen by the lock's being free.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson
from starlette.types import Message, Receive, Send

from gateway import logs
from gateway.errors import BadRequest, ClientLeft, EngineUnavailable, IdempotencyConflict
from gateway.response import Client
from gateway.settings import Settings
from gateway.sse import DONE, EVENT_STREAM

MAX_NAME = 255  # characters of an Idempotency-Key
MAX_ENTRIES = 1024  # answers kept or in the making
SWEEP = 1.0  # seconds
POLL = 0.02  # seconds between two looks at an answer that another worker makes
CHUNK = 64 * 1024  # bytes read at once

# What a file begins with: the digest of the request, how it stands, how long the response's start is, and when somebody
# last read (time.monotonic(), one clock for all processes). After it the start as JSON, then the body's bytes.
_HEAD = struct.Struct("<32sBxxxId")
_RUNNING, _WHOLE, _FAILED = range(3)
_STATE, _START, _SEEN = 32, 36, 40  # offsets

_FULL = EngineUnavailable(
    "This answer is too large to be kept for its Idempotency-Key: ask without one.", code="idempotency_full"
)

Run = Callable[[Client, Send], Awaitable[bool]]  # makes the answer; whether it came out whole


class _Entry:
    """One answer's file, open. Its maker writes; anybody reads."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    @classmethod
    def create(cls, path: Path, digest: bytes) -> "Self | None":
        """Begin an answer, locked; None if there is one already. Raises OSError."""
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix="new-")
        entry = cls(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, _HEAD.pack(digest, _RUNNING, 0, time.monotonic()))
            os.link(name, path)  # whole and locked at once, and only one can
        except FileExistsError:
            entry.close()
            return None
        except BaseException:
            entry.close()
            raise
        finally:
            Path(name).unlink()
        return entry

    @classmethod
    def open(cls, path: Path) -> "Self | None":
        try:
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            return None

    def close(self) -> None:
        os.close(self._fd)

    def head(self) -> tuple[bytes, int, int, float]:
        """Digest, state, length of the start, when somebody last read."""
        digest, state, start, seen = _HEAD.unpack(os.pread(self._fd, _HEAD.size, 0))
        return digest, state, start, seen

    def deserted(self) -> bool:
        """Whether nobody makes it (any more). Only for one who doesn't."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    def remove(self, path: Path) -> bool:
        """Take it away from `path`, unless somebody makes it; whether it is gone. Another one that has come to stand
        there meanwhile is left alone."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(self._fd).st_ino:
                path.unlink()
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    def seen(self) -> None:
        """Somebody reads it."""
        os.pwrite(self._fd, struct.pack("<d", time.monotonic()), _SEEN)

    def read(self, offset: int) -> bytes:
        return os.pread(self._fd, CHUNK, offset)

    # What its maker writes, the start before the body and the state last.

    def write_start(self, start: bytes) -> None:
        self.write_body(start)
        os.pwrite(self._fd, struct.pack("<I", len(start)), _START)

    def write_body(self, data: bytes) -> None:
        os.lseek(self._fd, 0, os.SEEK_END)
        while data:
            data = data[os.write(self._fd, data) :]

    def write_state(self, state: int) -> None:
        os.pwrite(self._fd, bytes((state,)), _STATE)


class _Room:
    """Bytes that answers may still take, as far as this worker knows: looked up once a second."""

    left = 0

    def take(self, size: int) -> bool:
        self.left -= size
        return self.left >= 0


class _Making:
    """An answer that this worker makes: the relay's Client, and the other end of its `send`."""

    takes = True

    def __init__(self, entry: _Entry, path: Path, most: int, room: _Room) -> None:
        self.entry = entry
        self.path = path
        self.readers = 0
        self.grown = asyncio.Event()  # set, and replaced, whenever there is more
        self._most = most  # bytes of this one
        self._room = room
        self._abandoned = False
        self._hung_up: Callable[[], None] | None = None
        self._start = b""  # the response's, as it is kept, until the first of its body is here
        self._stream = False
        self._full = False

    def abandon(self) -> None:
        """Nobody wants it any more: its relay is told that the client left."""
        self._abandoned = True
        self.watch(self._hung_up)

    def watch(self, hung_up: Callable[[], None] | None) -> None:
        """See Client.watch."""
        self._hung_up = hung_up
        if self._abandoned and hung_up is not None:
            hung_up()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in message["headers"]]
            self._start = orjson.dumps([message["status"], headers])
            self._stream = EVENT_STREAM in message["headers"]
            self.tell()
        else:
            self.push(message.get("body", b""))

    def push(self, data: bytes) -> None:
        """See Client.push."""
        try:
            self._write(data)
        except OSError:  # no room
            self._give_up()
        self.tell()

    def _write(self, body: bytes) -> None:
        self._most -= len(body)
        if self._most < 0 or not self._room.take(len(body)):
            self._give_up()
        elif not self._full:
            if self._start:  # only now: an answer that doesn't fit at all gets an error of its own
                self.entry.write_start(self._start)
                self._start = b""
            self.entry.write_body(body)

    def _give_up(self) -> None:
        """Say that there is no room for the rest, which does need a little."""
        if self._full:
            return
        self._full = True
        self.abandon()
        with suppress(OSError):
            if not self._start:
                if self._stream:
                    self.entry.write_body(b"data: " + _FULL.envelope() + b"\n\n" + DONE)
                return
            headers = [["content-type", "application/json"], ["content-length", str(len(_FULL.envelope()))]]
            self.entry.write_start(orjson.dumps([_FULL.status, headers]))
            self.entry.write_body(_FULL.envelope())

    def tell(self) -> None:
        self.grown.set()
        self.grown = asyncio.Event()


class Answers:
    """The answers of one host's gateway to requests with an Idempotency-Key, in `directory`. Use it with `async with`.

    Bounded by settings: whole ones are kept for `stack_idempotency_ttl` seconds, all together take at most
    `stack_idempotency_bytes`, one alone half of that. Where there is no room, the oldest whole ones go first.
    """

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._directory = directory
        self._ttl = settings.stack_idempotency_ttl
        self._linger = settings.stack_idempotency_linger
        self._bytes = settings.stack_idempotency_bytes
        self._room = _Room()
        self._making: dict[Path, _Making] = {}
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
        self, name: bytes, key_id: str, request: bytes, request_id: str, run: Run, receive: Receive, send: Send
    ) -> None:
        """Answer from the one there is, or have `run` make it. `request` is what must be the same: its path and body.

        Raises BadRequest for a name that is none, IdempotencyConflict where the name stands for another request, and
        ClientLeft. `run` goes on for a while without its client.
        """
        if not 0 < len(name) <= MAX_NAME or not name.isascii() or not name.decode("ascii").isprintable():
            raise BadRequest(
                f"Idempotency-Key must be 1 to {MAX_NAME} printable ASCII characters.", param="Idempotency-Key"
            )
        # By the caller's key as well: nobody sees what is somebody else's, even by guessing its name.
        path = self._directory / hashlib.sha256(key_id.encode() + b"\0" + name).hexdigest()
        digest = hashlib.sha256(request).digest()
        first = False
        while True:
            entry = _Entry.open(path)
            if entry is None:
                first = self._begin(path, digest, run)
                continue
            try:
                there, state, _, _ = entry.head()
                if there != digest:
                    raise IdempotencyConflict(
                        "This Idempotency-Key was used for another request; use a new one for each.",
                        param="Idempotency-Key",
                    )
                making = self._making.get(path)
                if state == _FAILED or (state == _RUNNING and making is None and entry.remove(path)):
                    continue  # its maker took it away, or died: it is made anew
                if not first:
                    logs.event("idempotent_replay", {"request_id": request_id, "key": key_id, "whole": state == _WHOLE})
                if await _Reader(entry, making, again=not first).run(receive, send):
                    return
            finally:
                entry.close()

    def _begin(self, path: Path, digest: bytes, run: Run) -> bool:
        """Have the answer made, unless somebody else just began. Raises EngineUnavailable when there is no room."""
        try:
            self._make_room()
            entry = _Entry.create(path, digest)
        except OSError as exc:
            raise EngineUnavailable(
                "No more answers can be kept for an Idempotency-Key now. Try again shortly, or without one.",
                code="idempotency_full",
            ) from exc
        if entry is None:
            return False
        making = self._making[path] = _Making(entry, path, self._bytes // 2, self._room)
        task = asyncio.create_task(self._make(making, run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _make(self, making: _Making, run: Run) -> None:
        whole = False
        try:
            whole = await run(making, making.send)
        finally:
            # Only a whole answer is worth repeating. Those who read along get what there is of this one.
            with suppress(OSError):
                if not whole:
                    making.path.unlink(missing_ok=True)
                making.entry.write_state(_WHOLE if whole else _FAILED)
            del self._making[making.path]
            making.entry.close()
            making.tell()

    def _make_room(self) -> None:
        """Drop what is too old, then the oldest whole ones until half of the room is free. Raises OSError where there
        are still too many."""
        files = []
        for file in os.scandir(self._directory):
            with suppress(FileNotFoundError):
                status = file.stat()
                files.append((status.st_mtime, status.st_size, Path(file.path)))
        files.sort()
        too_old = time.time() - self._ttl
        used, count = sum(size for _, size, _ in files), len(files)
        for last_read, size, path in files:
            if last_read >= too_old and used <= self._bytes // 2 and count < MAX_ENTRIES:
                break
            if path not in self._making and _remove(path):
                used -= size
                count -= 1
        self._room.left = self._bytes - used
        if count >= MAX_ENTRIES or self._room.left <= 0:
            raise OSError(errno.ENOSPC, "no room for another answer")

    async def _sweep(self) -> None:
        """Keep house, and stop making what nobody has read for a while."""
        while True:
            await asyncio.sleep(SWEEP)
            for making in list(self._making.values()):
                if making.readers == 0 and time.monotonic() - making.entry.head()[3] > self._linger:
                    making.abandon()
            with suppress(OSError):
                self._make_room()


class _Reader:
    """One client reading one answer."""

    def __init__(self, entry: _Entry, making: _Making | None, *, again: bool) -> None:
        self._entry = entry
        self._making = making
        self._again = again
        self._started = False
        self._offset = 0

    async def run(self, receive: Receive, send: Send) -> bool:
        """Send it; False if its maker died before it began, so that nothing was sent. Raises ClientLeft."""
        listener = asyncio.create_task(_hang_up(receive))
        if self._making is not None:
            self._making.readers += 1
        try:
            while True:
                grown = self._making.grown if self._making is not None else None
                state = self._entry.head()[1]
                # Looked at before the rest is read: after it nothing more can come.
                deserted = state == _RUNNING and self._making is None and self._entry.deserted()
                if await self._send_rest(send):
                    continue
                if deserted and not self._started:
                    return False
                if state != _RUNNING or deserted:
                    return await self._end(send, state)
                if listener.done():
                    raise ClientLeft("The client closed the connection.")
                await self._wait(grown, listener)
        finally:
            listener.cancel()
            self._entry.seen()
            if self._making is not None:
                self._making.readers -= 1

    async def _send_rest(self, send: Send) -> bool:
        """Send what is there and was not sent yet; whether there was any."""
        if not self._started:
            length = self._entry.head()[2]
            if length == 0:
                return False
            status, pairs = orjson.loads(self._entry.read(_HEAD.size)[:length])
            headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
            self._stream = EVENT_STREAM in headers
            if self._again:  # the key stands otherwise by now
                headers = [it for it in headers if not it[0].startswith(b"x-ratelimit-")]
                headers.append((b"idempotent-replayed", b"true"))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            self._started = True
            self._offset = _HEAD.size + length
            return True
        data = self._entry.read(self._offset)
        if not data:
            return False
        self._offset += len(data)
        await send({"type": "http.response.body", "body": data, "more_body": True})
        return True

    async def _end(self, send: Send, state: int) -> bool:
        """The last byte there will be is sent. An answer cut short by its maker's death must not look like a whole."""
        if not self._started:
            return False
        if state == _RUNNING:
            if not self._stream:
                return True  # short of the length it announced: the server closes the connection
            lost = EngineUnavailable("The worker that made this answer is gone.", code="answer_lost")
            await send(
                {"type": "http.response.body", "body": b"data: " + lost.envelope() + b"\n\n" + DONE, "more_body": True}
            )
        await send({"type": "http.response.body", "body": b""})
        return True

    async def _wait(self, grown: asyncio.Event | None, listener: "asyncio.Task[None]") -> None:
        self._entry.seen()
        if grown is None:
            await asyncio.wait({listener}, timeout=POLL)
            return
        waiter = asyncio.create_task(grown.wait())
        try:
            await asyncio.wait({waiter, listener}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _remove(path: Path) -> bool:
    entry = _Entry.open(path)
    if entry is None:
        return True
    try:
        return entry.remove(path)
    finally:
        entry.close()
