"""Connection: one connection to the fake engine. It plays the steps of a script; engine.py lists the verbs."""

import asyncio
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.fakes.engine import Engine

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, *, used: bool) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number
        self.used = used
        self.holds = 0  # slots
        self.ahead = b""
        self.chunked = False

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

    async def play(
        self, engine: "Engine", script: list[list[Any]], request: dict[str, Any], record: dict[str, Any]
    ) -> bool:
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
                headed, self.chunked = True, False
                continue
            if verb == "slots":
                if engine.taken >= argument:
                    return await self.json(503, {"error": "server busy"})
                engine.taken += 1
                self.holds = 1
                continue
            if verb in ("gate", "pause", "die"):
                await pass_time(engine, verb, argument)
                continue
            if verb == "made":
                record["made"] += argument
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


async def pass_time(engine: "Engine", verb: str, argument: Any) -> None:
    if verb == "gate":
        await engine.gate(argument).wait()
    elif verb == "pause":
        await asyncio.sleep(argument)
    else:
        os._exit(139)


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
    chat = "prompt" not in request
    choice: dict[str, Any] = {"index": 0, **({"delta": {}} if chat else {"text": ""}), "finish_reason": None}
    kind = "chat.completion.chunk" if chat else "text_completion"
    chunk = {"id": "chatcmpl-fake", "object": kind, "created": 1, "model": request["model"]}
    if verb == "usage":
        if not (request.get("stream_options") or {}).get("include_usage"):
            return b": no usage asked for\n\n"
        return body_of("event", chunk | {"choices": [], "usage": USAGE}, request)
    if verb == "role":
        choice |= {"delta": {"role": "assistant", "content": ""}} if chat else {}
    elif verb == "token":
        choice |= {"delta": {"content": argument}} if chat else {"text": argument}
    elif verb == "finish":
        choice["finish_reason"] = argument
    else:
        raise ValueError(verb)
    return body_of("event", chunk | {"choices": [choice]}, request)
