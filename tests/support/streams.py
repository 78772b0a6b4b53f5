"""Streams: streaming requests to a gateway in the background, and their events."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from openai._streaming import SSEDecoder

from tests.support.processes import MESSAGES, GatewayProcess, events, wait_for

CHAT = "/v1/chat/completions"


class Stream(threading.Thread):
    """A streaming request in a thread: what has come so far, and how it ended."""

    def __init__(self, gateway: GatewayProcess, script: list[Any], mark: str) -> None:
        super().__init__(daemon=True)
        self.body = {"messages": MESSAGES, "stream": True, "user": mark, "script": script}
        self.gateway = gateway
        self.text = ""
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.gateway.client() as client, client.stream("POST", CHAT, json=self.body) as answer:
                for piece in answer.iter_text():
                    self.text += piece
        except httpx.HTTPError as exc:
            self.error = exc

    def chunks(self) -> list[Any]:
        self.join(60)
        assert not self.is_alive()
        assert self.error is None, self.error
        return events(self.text)


def gated(mark: str) -> list[Any]:
    return [["role"], ["token", "before "], ["gate", mark], ["token", "after"], ["finish", "stop"], ["done"], ["end"]]


@contextmanager
def streams_under_way(gateway: GatewayProcess, mark: str, count: int = 10) -> Iterator[list[Stream]]:
    streams = [Stream(gateway, gated(mark), mark) for _ in range(count)]
    wait_for(lambda: all("before" in stream.text for stream in streams))
    yield streams


def sse(text: str) -> list[Any]:
    """Return a stream's data as the official client reads it; '[DONE]' as it is."""
    found = [it.data for it in SSEDecoder().iter_bytes(iter([text.encode()]))]
    return [it if it == "[DONE]" else json.loads(it) for it in found]
