"""Attackers: a program that attacks a gateway's memory in several ways at once, for some seconds.

    python -m tests.support.attackers PORT SECONDS KEY

It prints how often each attack was completed.
"""

import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

CHAT = "/v1/chat/completions"
MB = 1_000_000
CROWD = 400  # connections of each of the three attacks that open 1,200 together
PAUSE = 0.05  # seconds between two requests, so that the other attacks get CPU time


class Attackers:
    """All attacks together."""

    def __init__(self, port: int, seconds: float, key: str) -> None:
        self._port = port
        self._ends = time.monotonic() + seconds
        self._key = f"authorization: Bearer {key}\r\n"
        self.done: Counter[str] = Counter()

    def run(self) -> None:
        """Attack until the time is over."""
        ways = [self.crowd, self.crowd, self.crowd, self.bomb, self.half_send, self.fill_the_queue, self.be_refused]
        threads = [threading.Thread(target=self._repeat, args=[way], daemon=True) for way in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self._ends + 5 - time.monotonic()))

    def _repeat(self, way: Callable[[], None]) -> None:
        while time.monotonic() < self._ends:
            with suppress(OSError):
                way()
            self.done[way.__name__] += 1
            time.sleep(PAUSE)

    # -- the attacks --------------------------------------------------------------------------------------------------

    def crowd(self) -> None:
        """Without a key: connections that ask for something large, send further requests ahead, and read nothing."""
        head = self._head("GET", "/openapi.json", "", 63_000)
        with ExitStack() as stack:
            for _ in range(CROWD):
                if time.monotonic() > self._ends:
                    break
                raw = stack.enter_context(self._connected())
                raw.setblocking(False)
                with suppress(OSError):
                    raw.send((head + b"x" * 63_000) * 8)
            time.sleep(1)

    def bomb(self) -> None:
        """With a key: small bodies that become large when they are decompressed or parsed."""
        for values in (b"[] ,", b"{},", b"1,", b'{"a":1},', b'"ab",'):
            self._post(
                b'{"messages":[{"role":"user","content":"x"}],"x":[' + values * (18 * MB // len(values)) + b"1]}"
            )

    def half_send(self) -> None:
        """With a key: bodies of 19 MB of which the last byte never comes."""
        with ExitStack() as stack:
            for _ in range(55):
                raw = stack.enter_context(self._connected())
                with suppress(OSError):
                    raw.sendall(self._head("POST", CHAT, self._key, 19 * MB) + b'{"x":"' + b"y" * MB)
            time.sleep(2)

    def fill_the_queue(self) -> None:
        """With a key: bodies of 10 MB that wait."""
        body = b'{"model":"slow","messages":[{"role":"user","content":"' + b"x" * 10 * MB + b'"}]}'
        with ExitStack() as stack:
            for _ in range(20):
                raw = stack.enter_context(self._connected())
                with suppress(OSError):
                    raw.sendall(self._head("POST", CHAT, self._key, len(body)) + body)
            time.sleep(2)

    def be_refused(self) -> None:
        """With a key and without: unknown models, no time to wait, no key."""
        large = b'{"model":"none","messages":[{"role":"user","content":"' + b"x" * 5 * MB + b'"}]}'
        self._post(large)
        self._post(b'{"messages":[{"role":"user","content":"x"}]}', "x-stack-queue-timeout: 0\r\n")
        with self._connected() as raw, suppress(OSError):
            raw.sendall(self._head("POST", CHAT, "", len(large)) + large)
            raw.recv(65536)

    # -- how they speak -----------------------------------------------------------------------------------------------

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self._port), timeout=5) as raw:
            yield raw

    def _head(self, method: str, path: str, more: str, length: int) -> bytes:
        return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{more}content-length: {length}\r\n\r\n".encode()

    def _post(self, body: bytes, more: str = "") -> None:
        with self._connected() as raw, suppress(OSError):
            raw.sendall(self._head("POST", CHAT, self._key + more, len(body)) + body)
            raw.recv(65536)


if __name__ == "__main__":
    attackers = Attackers(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
    attackers.run()
    print(dict(attackers.done))
