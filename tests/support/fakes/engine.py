"""A fake engine: a real program on a real socket that does what a request's `script` field says.

    python -m tests.support.fakes.engine [HOST:]PORT [DIALECT [GPU]]

A script is a list of [verb, argument] steps; without one the engine answers "one two three", blocking or
streaming as asked. `script_for` is {model: script}. A last message may be a script, too: `script:` and its JSON.
A message may have fields of its request in it: tests/support/fakes/told.py.
Verbs:
    head [status, headers]   start the response (chunked unless a content-length is given)
    json [status, object]    a whole JSON response
    raw STRING               bytes as they are, head and framing included
    text STRING / hex STRING one chunk of the body
    event OBJECT             one `data:` event
    role | token STRING | finish REASON | usage | done     the usual events of a chat stream
    tokens [COUNT, SIZE]     as many token events, as fast as they are taken
    stale                    drop the connection, unless this is its first request
    slots N                  refuse (503) while N such requests are being answered
    answer {...}             one recorded answer in an engine's dialect, or the rest of it: tests/support/fakes/model.py
    write {...}              an answer of any kind, or the rest of it: tests/support/fakes/writes.py
    says {...}               an answer in this engine's own dialect: tests/support/fakes/says.py
    generate {...}           as many tokens as the request's limits let a dialect make: tests/support/fakes/generator.py
    made N                   count so many tokens as made; /_seen tells them
    gate NAME                wait until POST /_release/NAME
    pause SECONDS            wait
    flood N                  N bytes without a newline
    end | end_and_close      end the body properly and keep or close the connection
    close | reset            drop the connection now
    die                      end this process now, as a crash does
    hang                     say nothing more
With `pace` in a request or in its `answer`, it pauses for so many seconds before each event.
A request with `tries`, a list of answers, gets the first one when it comes for the first time, and so on; see
tests/support/fakes/unruly.py. The field `mark` says which requests are the same.
GET /_seen lists the requests so far (the last 20,000): path, headers, body, state (running, done, hung_up) and
connection number. GET /_seen/USER lists those of one `user`.
With a DIALECT it has that engine's own endpoints, and its refusals (dialects.py). With a GPU, which is the path of a
file, it can sleep (gpu.py).
GET /_running says how many are being answered, and how many were at most since it was last asked.
"""

import asyncio
import json
import sys
from collections import Counter, deque
from typing import Any
from urllib.parse import unquote

from tests.support.fakes.connection import USAGE, Connection
from tests.support.fakes.dialects import DIALECTS, GENERATING
from tests.support.fakes.forms import as_json
from tests.support.fakes.generator import generate
from tests.support.fakes.gpu import Gpu
from tests.support.fakes.model import TURN, answer, raw, raw_script, render, stream, template_of
from tests.support.fakes.obedient import obey
from tests.support.fakes.says import says
from tests.support.fakes.thinker import THINKERS, applied, unasked
from tests.support.fakes.told import messages_of, with_told
from tests.support.fakes.unruly import tried
from tests.support.fakes.writes import write, write_raw

TOKENS = ["one", " two", " three"]
TOO_LARGE = {"error": "model requires more system memory (9.0 GiB) than is available (2.0 GiB)"}


class Engine:
    def __init__(self, dialect: str = "", gpu: str = "") -> None:
        self.dialect = DIALECTS[dialect]() if dialect else None
        if self.dialect and gpu:
            self.dialect.gpu = Gpu(gpu)
        self.seen: deque[dict[str, Any]] = deque(maxlen=20_000)
        self.users: Counter[str] = Counter()  # requests so far, by their `user`
        self.running = self.peak = 0
        self.taken = 0  # slots
        self.tried: Counter[str] = Counter()  # requests with `tries`, by their `mark`
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

    async def exchange(self, connection: Connection) -> bool:
        method, path, headers, body = await connection.read_request()
        if headers.get("content-type", "").startswith("multipart/"):
            body = as_json(headers["content-type"], body)
        if self.dialect is None:
            return await self.answer(connection, method, path, headers, body)
        if self.dialect.gpu and (told := await self.dialect.gpu.answer(path)):
            return await connection.json(*told)
        with self.dialect.admitted(path, body) as refused:
            if refused and refused[0] == 200:
                return await connection.play(self, [["event", refused[1]], ["done"], ["end"]], {}, {})
            if refused:
                return await connection.json(*refused)
            try:
                async with self.dialect.having(path, body, connection.reader.at_eof):
                    return await self.answer(connection, method, path, headers, body)
            except MemoryError:
                return await connection.json(500, TOO_LARGE)

    async def answer(
        self, connection: Connection, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> bool:
        if self.dialect is not None and (told := self.dialect.answer(method, path, body)):
            if not path.startswith(("/_", "/v1/")):
                await asyncio.sleep(self.dialect.slow)
            elif path in self.dialect.knows:
                await asyncio.sleep(self.dialect.works)
            return await connection.json(*told)
        if told := self.told(path, body):
            return await connection.json(*told)
        request = with_told(json.loads(body))
        if path == "/api/generate" and request.get("raw"):
            request |= raw_script(request)
        record = {
            "path": path,
            "method": method,
            "headers": headers,
            "body": request,
            "state": "running",
            "connection": connection.number,
            "made": 0,
        }
        self.seen.append(record)
        self.users[str(request.get("user"))] += 1
        script = paced(self.script(path, request), request.get("pace") or said_pace(request))
        play = asyncio.create_task(connection.play(self, script, request, record))
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

    def told(self, path: str, body: bytes) -> tuple[int, Any] | None:
        """What it says at an endpoint that is the tests' own, or tells of the engine itself; None at any other."""
        verb, _, name = path.removeprefix("/_").partition("/")
        match verb if path.startswith("/_") else path:
            case "seen" if name:
                return 200, [it for it in self.seen if it["body"].get("user") == unquote(name)]
            case "seen":
                return 200, {"seen": list(self.seen), "connections": self.connections}
            case "running":
                peak, self.peak = self.peak, self.running
                return 200, {"running": self.running, "peak": peak}
            case "release":
                self.gate(unquote(name)).set()
                return 200, {}
            case "health":
                self.health = int(name)
                return 200, {}
            case "/tokenize":
                asked = json.loads(body)
                text = asked["prompt"] if "prompt" in asked else " ".join(it["content"] for it in asked["messages"])
                return 200, {"count": len(text.split())}
            case "/apply-template":
                return 200, applied(json.loads(body))
            case "/health" | "/api/version":
                return self.health, {}
            case "/v1/models":
                data = [{"id": name, "object": "model", "created": 1, "owned_by": "fake"} for name in self.models]
                return 200, {"object": "list", "data": data}
            case "/api/chat" | "/api/generate" if json.loads(body).get("_debug_render_only"):
                return 200, render(json.loads(body))
            case "/api/generate" if json.loads(body).get("raw"):
                return None
        return None if path.startswith("/v1/") else (404, {})

    def script(self, path: str, request: dict[str, Any]) -> list[list[Any]]:
        """The steps for a request that was seen."""
        if path.startswith("/v1/") and "chat" not in path:
            request = {name: it for name, it in request.items() if name != "messages"}  # only a chat has any
        if "tries" in request:
            self.tried[request["mark"]] += 1
            return tried(request, self.tried[request["mark"]])
        script = (request.get("script_for") or {}).get(request.get("model")) or request.get("script")
        script = script or said_script(request)
        number = self.users[str(request.get("user"))] - 1
        if path == "/api/generate" and request.get("raw"):
            if script and script[0][0] == "write":
                return write_raw(script[0][1], request, number=number)
            if not script and request["model"] in THINKERS:
                given = request["prompt"].rpartition(TURN)[2]
                return raw({"pieces": unasked(request["model"], given)}, request, number=0)
            return raw(script[0][1], request, number=number) if script else raw({"pieces": TOKENS}, request, number=0)
        if not script and self.dialect and self.dialect.obeys and path in GENERATING:
            return obey(self.dialect.name, request, len(self.seen))
        if not script and self.dialect and request.get("stream"):
            return stream(self.dialect.name, TOKENS, request, len(self.seen))
        script = script or default_script(path, request)
        if script[0][0] == "says" and self.dialect:
            return says(script[0][1], self.dialect.name, request, unique=len(self.seen))
        if script[0][0] == "write":
            return write(script[0][1], request, number=number, unique=len(self.seen))
        if script[0][0] == "answer":
            return answer(script[0][1], request, number=number, unique=len(self.seen))
        return generate(script[0][1], request) if script[0][0] == "generate" else script


def paced(script: list[list[Any]], pace: float | None) -> list[list[Any]]:
    """The steps, with a pause before each."""
    return [it for step in script for it in (["pause", pace], step)] if pace else script


def said_script(request: dict[str, Any]) -> list[list[Any]]:
    """The script in the last message, for APIs whose requests have no other place for it; or in the one before, if that
    is a model's answer and the last message is what there is of it."""
    scripts = [_script_in(it) for it in messages_of(request)[-2:]] or [_script_in(request)]
    return scripts[-1] or (scripts[0] if scripts[0] and scripts[0][0][0] == "answer" else [])


def said_pace(request: dict[str, Any]) -> float | None:
    """The pace that stands in a script of `said_script`."""
    script = said_script(request)
    return script[0][1].get("pace") if script and script[0][0] == "answer" else None


def _script_in(message: dict[str, Any]) -> list[list[Any]]:
    match message:
        case {"content": str(text)} | {"prompt": str(text)} | {"input": str(text)} if text.startswith("script:"):
            return list(json.JSONDecoder().raw_decode(text, len("script:"))[0])  # the gateway may add words behind it
    return []


def default_script(path: str, request: dict[str, Any]) -> list[list[Any]]:
    if path == "/v1/embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}]
        return [["json", [200, {"object": "list", "model": request["model"], "data": data, "usage": USAGE}]]]
    if path == "/v1/audio/transcriptions":
        return [["json", [200, {"text": "".join(TOKENS), "usage": {"type": "duration", "seconds": 3}}]]]
    if path == "/v1/audio/speech":
        return [["head", [200, {"content-type": "audio/mpeg"}]], *(["text", token] for token in TOKENS), ["end"]]
    if request.get("stream"):
        return [["role"], *(["token", token] for token in TOKENS), ["finish", "stop"], ["usage"], ["done"], ["end"]]
    begun = request["messages"][-1] if "messages" in request else {}
    repeats = begun.get("role") == "assistant" and template_of(request["model"]) == "own"
    text = (begun["content"] if repeats else "") + "".join(TOKENS)
    chat = "prompt" not in request
    handed = str(begun.get("content")).startswith("<think>") and request["model"] == "thinker"
    if request["model"] == "thinker" and "reasoning_content" in begun:
        message = {"role": "assistant", "content": "", "reasoning_content": begun["reasoning_content"] + text}
        return [["json", [200, {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]}]]]
    if handed or (begun.get("role") == "user" and request["model"] in THINKERS):
        message = {"role": "assistant", "content": None, "reasoning": text}
        return [["json", [200, {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]}]]]
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choice = {"index": 0, **said, "finish_reason": "stop"}
    answer = {
        "id": "chatcmpl-fake",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": request["model"],
        "choices": [choice],
        "usage": USAGE,
        "x_engine_extra": {"kept": True},
    }
    return [["json", [200, answer]]]


async def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    server = await asyncio.start_server(Engine(*sys.argv[2:]).serve, host or "127.0.0.1", int(port))
    async with server:
        print("ready", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
