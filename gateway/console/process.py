"""Process: have pages made in one process beside the workers, and own what both ends say to each other.

A worker opens a connection to a Unix socket for each page, and sends the name of the page and an Ask. The process
answers with the status, the headers, the body and the processor time that the page took. Both messages begin with the
lengths of their two parts, so an end that dies is not taken for the end of a message.

gunicorn's master listens on the socket before it forks the process, and keeps it when the process dies. Pages that are
asked for meanwhile wait in the kernel's queue.
"""

import asyncio
import logging
import os
import select
import signal
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore, get_ident

import orjson
from starlette.responses import Response

from gateway import logs
from gateway.console.ask import Ask
from gateway.console.views import Views
from gateway.errors import GatewayBusy
from gateway.shared_memory import Flag

log = logging.getLogger("stack")

THREADS = 4  # pages that are made at a time: some may wait for the store
QUEUE = 32  # pages that wait for one of these threads
PATIENCE = 30.0  # seconds that a worker waits for a page
LONGEST = 60.0  # seconds for a page, after which the process is taken to hang, and ends
TICK = 0.25  # seconds between two looks whether the process has to end
TRANSFER = 10.0  # seconds for a message
LARGEST = 2 * 1024 * 1024  # bytes of what is asked; a form has at most a quarter of it
BUSY = "The console is busy, or it is starting. Try again shortly."
UNSURE = "The console did not answer. Look whether your change was made before you send the form again."
_NAME = "console"
_HEAD = struct.Struct("<II")


def listen(directory: Path) -> socket.socket:
    """Return the socket of the process in that directory. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{directory}/{_NAME}")
    listener.listen(QUEUE)
    return listener


class Client:
    """Have pages made, in a worker."""

    def __init__(self, directory: Path) -> None:
        self._path = f"{directory}/{_NAME}"

    async def page(self, name: str, ask: Ask) -> tuple[Response, float]:
        """Return a page, and the seconds of processor time that it took. Raises GatewayBusy if too many pages are being
        made, or if the process dies or does not answer in time."""
        try:
            async with asyncio.timeout(PATIENCE):
                head, body = await self._exchange(name.encode(), ask.dump())
        except (OSError, EOFError) as exc:  # among them a full queue, and a TimeoutError
            raise GatewayBusy(UNSURE if ask.form else BUSY) from exc
        told = orjson.loads(head)
        return Response(body, told["status"], told["headers"]), told["seconds"]

    async def _exchange(self, *parts: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(_message(*parts))
            first, second = _HEAD.unpack(await reader.readexactly(_HEAD.size))
            return await reader.readexactly(first), await reader.readexactly(second)
        finally:
            writer.close()


class Server:
    """Make pages, in the process."""

    def __init__(
        self, listener: socket.socket, retired: Flag, views: Views, parent: int, longest: float = LONGEST
    ) -> None:
        """`parent` is the process that forked this one. It may be dead already."""
        self._listener = listener
        self._retired = retired
        self._views = views
        self._parent = parent
        self._longest = longest
        self._free = Semaphore(THREADS)
        self._begun: dict[int, float] = {}  # by thread, when its page began

    def run(self) -> None:
        """Make pages until this process is retired, or its parent ends. Pages that have begun are finished."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # see _check
        self._listener.settimeout(TICK)
        with ThreadPoolExecutor(THREADS, "console") as threads:
            while not self._retired and os.getppid() == self._parent:
                self._check()
                if not self._free.acquire(timeout=TICK):
                    continue
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # nobody asks, or no file descriptor is left
                    self._free.release()
                else:
                    threads.submit(self._serve, connection)

    def _check(self) -> None:
        """End the process if a page takes too long. The kernel does so if this thread does not run any more."""
        signal.alarm(round(2 * self._longest))
        if any(time.monotonic() - began > self._longest for began in list(self._begun.values())):
            log.error("a page of the console took longer than %g seconds", self._longest)
            logs.flush()
            os._exit(1)

    def _serve(self, connection: socket.socket) -> None:
        self._begun[get_ident()] = time.monotonic()
        try:
            with connection:
                connection.settimeout(TRANSFER)
                self._answer(connection)
        except (OSError, struct.error):
            pass  # the worker gave up, or died
        except Exception:
            log.exception("a bug in the console's process")
        finally:
            del self._begun[get_ident()]
            self._free.release()

    def _answer(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as asked:
            first, second = _HEAD.unpack(asked.read(_HEAD.size))
            if first + second > LARGEST:
                return
            name, ask = asked.read(first), asked.read(second)
        if len(ask) < second or _gone(connection):
            return
        began = time.thread_time()
        page = self._views.make(name.decode(), Ask.load(ask))
        told = {"status": page.status_code, "headers": dict(page.headers), "seconds": time.thread_time() - began}
        connection.sendall(_message(orjson.dumps(told), bytes(page.body)))


def _message(first: bytes, second: bytes) -> bytes:
    return b"".join((_HEAD.pack(len(first), len(second)), first, second))


def _gone(connection: socket.socket) -> bool:
    """Return whether the worker waits no more. Its visitor sends the form again, so it must not be used now."""
    return bool(select.select([connection], [], [], 0)[0])  # it sends nothing more, so this is the end
