"""A fake engine: a real program on a real socket that does what a request's `script` field says.

    python -m tests.fakes.engine [HOST:]PORT [DIALECT]

A script is a list of [verb, argument] steps; without one the engine answers "one two three", blocking or
streaming as asked. `script_for` is {model: script}. Verbs:
    head [status, headers]   start the response (chunked unless a content-length is given)
    json [status, object]    a whole JSON response
    raw STRING               bytes as they are, head and framing included
    text STRING / hex STRING one chunk of the body
    event OBJECT             one `data:` event
    role | token STRING | finish REASON | usage | done     the usual events of a chat stream
    tokens [COUNT, SIZE]     as many token events, as fast as they are taken
    stale                    drop the connection, unless this is its first request
    slots N                  refuse (503) while N such requests are being answered
    answer {...}             one recorded answer in an engine's dialect, or the rest of it: tests/fakes/model.py
    gate NAME                wait until POST /_release/NAME
    pause SECONDS            wait
    flood N                  N bytes without a newline
    end | end_and_close      end the body properly and keep or close the connection
    close | reset            drop the connection now
    hang                     say nothing more
GET /_seen lists the requests so far (the last 20,000): path, headers, body, state (running, done, hung_up) and
connection number. With a DIALECT it has that engine's own endpoints, and its refusals (tests/fakes/dialects.py).
GET /_running says how many are being answered, and how many were at most since it was last asked.
"""

import asyncio
import json
import socket
import struct
import sys
from collections import deque
from typing import Any

from tests.fakes.dialects import DIALECTS
from tests.fakes.model import answer

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
TOKENS = ["one", " two", " three"]


class Engine:
    def __init__(self, dialect: str = "") -> None:
        self.dialect = DIALECTS[dialect]() if dialect else None
        self.seen: deque[dict[str, Any]] = deque(maxlen=20_000)
        self.running = self.peak = 0
        self.taken = 0  # slots
        self.gates: dict[str, asyncio.Event] = {}
        self.connections = 0
        self.health = 200
        self.models = ["fake-model", "other/model:1b"]

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number, used = self.connections, False
        try:
            while await self.exchange(Connection(reader, writer, number, used=used)):
                used = True
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def exchange(self, connection: "Connection") -> bool:
        method, path, headers, body = await connection.read_request()
        if self.dialect is not None and (told := self.dialect.answer(method, path, body)):
            if not path.startswith(("/_", "/v1/")):
                await asyncio.sleep(self.dialect.slow)
            return await connection.json(*told)
        if path == "/_seen":
            return await connection.json(200, {"seen": list(self.seen), "connections": self.connections})
        if path == "/_running":
            peak, self.peak = self.peak, self.running
            return await connection.json(200, {"running": self.running, "peak": peak})
        if path.startswith("/_release/"):
            self.gate(path.removeprefix("/_release/")).set()
            return await connection.json(200, {})
        if path.startswith("/_health/"):
            self.health = int(path.removeprefix("/_health/"))
            return await connection.json(200, {})
        if path in ("/health", "/api/version"):
            return await connection.json(self.health, {})
        if path == "/v1/models":
            data = [{"id": name, "object": "model", "created": 1, "owned_by": "fake"} for name in self.models]
            return await connection.json(200, {"object": "list", "data": data})
        if not path.startswith("/v1/"):  # what it tells of itself, as an engine with a DIALECT does
            return await connection.json(404, {})
        request = json.loads(body)
        record = {
            "path": path,
            "method": method,
            "headers": headers,
            "body": request,
            "state": "running",
            "connection": connection.number,
        }
        self.seen.append(record)
        script = (request.get("script_for") or {}).get(request.get("model")) or request.get("script")
        script = script or default_script(path, request)
        if script[0][0] == "answer":
            same = [it for it in self.seen if it["body"].get("user") == request.get("user")]
            script = answer(script[0][1], request, number=len(same) - 1, unique=len(self.seen))
        play = asyncio.create_task(connection.play(self, script, request))
        listen = asyncio.create_task(connection.reader.read(1))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.wait({play, listen}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.running -= 1
            self.taken -= connection.holds
        if not play.done() or isinstance(play.exception(), ConnectionError):  # hung up (the gateway never pipelines)
            play.cancel()
            listen.cancel()
            record["state"] = "hung_up"
            await asyncio.gather(play, listen, return_exceptions=True)
            return False
        record["state"] = "done"
        listen.cancel()
        await asyncio.wait({listen})
        if not listen.cancelled():
            connection.ahead = listen.result()  # the next request's first byte, or the end
        return bool(play.result())


def default_script(path: str, request: dict[str, Any]) -> list[list[Any]]:
    if path == "/v1/embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}]
        return [["json", [200, {"object": "list", "model": request["model"], "data": data, "usage": USAGE}]]]
    if request.get("stream"):
        return [["role"], *(["token", token] for token in TOKENS), ["finish", "stop"], ["usage"], ["done"], ["end"]]
    choice = {"index": 0, "message": {"role": "assistant", "content": "".join(TOKENS)}, "finish_reason": "stop"}
    answer = {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 1,
        "model": request["model"],
        "choices": [choice],
        "usage": USAGE,
        "x_engine_extra": {"kept": True},
    }
    return [["json", [200, answer]]]


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, *, used: bool) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number
        self.used = used
        self.holds = 0  # slots
        self.ahead = b""

    async def read_request(self) -> tuple[str, str, dict[str, str], bytes]:
        head = (self.ahead + await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.ahead = b""
        first, *lines = head.rstrip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return method, path, headers, body

    async def json(self, status: int, value: object) -> bool:
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        await self.writer.drain()
        return True

    async def play(self, engine: Engine, script: list[list[Any]], request: dict[str, Any]) -> bool:
        """Run the steps; returns whether the connection can be used again."""
        headed = False
        for verb, *arguments in script:
            argument = arguments[0] if arguments else None
            if verb == "json":
                await self.json(*argument)
                return True
            if verb == "raw":
                self.writer.write(argument.encode())
                await self.writer.drain()
                headed = True
                continue
            if verb == "slots":
                if engine.taken >= argument:
                    return await self.json(503, {"error": "server busy"})
                engine.taken += 1
                self.holds = 1
                continue
            if verb == "gate":
                await engine.gate(argument).wait()
                continue
            if verb == "pause":
                await asyncio.sleep(argument)
                continue
            if verb == "hang":
                await asyncio.Event().wait()
            if verb == "close" or (verb == "stale" and self.used):
                return False
            if verb == "stale":
                continue
            if verb == "reset":
                raw = self.writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.writer.transport.abort()
                return False
            if not headed:
                status, headers = argument if verb == "head" else (200, {"content-type": "text/event-stream"})
                self.chunked = "content-length" not in headers
                if self.chunked:
                    headers = headers | {"transfer-encoding": "chunked"}
                lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                self.writer.write(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode())
                headed = True
            if verb in ("end", "end_and_close"):
                self.writer.write(b"0\r\n\r\n")
                await self.writer.drain()
                return bool(verb == "end")
            if verb == "tokens":
                for _ in range(argument[0]):
                    self.send(body_of("token", "x" * argument[1], request))
                    await self.writer.drain()
            elif verb != "head":
                self.send(body_of(verb, argument, request))
            await self.writer.drain()
        return False

    def send(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data)


def body_of(verb: str, argument: Any, request: dict[str, Any]) -> bytes:
    if verb == "text":
        return argument.encode()
    if verb == "flood":
        return b"y" * int(argument)
    if verb == "hex":
        return bytes.fromhex(argument)
    if verb == "done":
        return b"data: [DONE]\n\n"
    if verb == "event":
        return b"data: " + json.dumps(argument).encode() + b"\n\n"
    choice: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": None}
    chunk = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": request["model"]}
    if verb == "usage":
        if not (request.get("stream_options") or {}).get("include_usage"):
            return b": no usage asked for\n\n"
        return body_of("event", chunk | {"choices": [], "usage": USAGE}, request)
    if verb == "role":
        choice["delta"] = {"role": "assistant", "content": ""}
    elif verb == "token":
        choice["delta"] = {"content": argument}
    elif verb == "finish":
        choice["finish_reason"] = argument
    else:
        raise ValueError(verb)
    return body_of("event", chunk | {"choices": [choice]}, request)


async def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    server = await asyncio.start_server(Engine(*sys.argv[2:]).serve, host or "127.0.0.1", int(port))
    async with server:
        print("ready", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
