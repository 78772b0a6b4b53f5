"""Scripts: what the fake engine does for one request (tests/support/fakes/engine.py lists the verbs)."""

import json
from typing import Any

Script = list[list[Any]]
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Grüße"}, "finish_reason": "stop"}
ANSWER = json.dumps({"choices": [CHOICE], "usage": USAGE}, ensure_ascii=False)
START: Script = [["role"], ["token", "one"], ["token", " two"]]
FINISH: Script = [["finish", "stop"], ["usage"], ["done"]]
EMPTY: list[Any] = ["head", [200, {}]]
HALF: Script = [EMPTY, ["text", ANSWER[:50]]]  # of a blocking answer
VOID: list[Any] = ["event", {"choices": [{"index": 0, "delta": {}}]}]
PARTS: list[Any] = ["event", {"choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "hi"}]}}]}]
SECOND: list[Any] = ["event", {"choices": [{"index": 1, "delta": {}}]}]
ENDLESS: Script = [*START, ["text", 'data: {"x": "'], ["flood", 100_000_000], ["hang"]]


def http(body: str, headers: str = "content-type: application/json\r\n", length: int | None = None) -> list[str]:
    length = len(body.encode()) if length is None else length
    return ["raw", f"HTTP/1.1 200 OK\r\n{headers}content-length: {length}\r\n\r\n{body}"]


def says(status: int, body: Any) -> Script:
    return [["json", [status, body]]]


def fault(value: Any) -> list[Any]:
    return ["event", {"error": value}]


def pieces(text: str, size: int) -> Script:
    data = text.encode()
    return [*(["hex", data[start : start + size].hex()] for start in range(0, len(data), size)), ["end"]]


LAST = '{"choices":[{"index":0,"delta":{"content":"ä🙂"},"finish_reason":"stop"}]}'
ODD = {
    "CRLF": f"data: {LAST}\r\n\r\ndata: [DONE]\r\n\r\n",
    "CR": f"data: {LAST}\r\rdata: [DONE]\r\r",
    "no space after the colon": f"data:{LAST}\n\ndata:[DONE]\n\n",
    "a byte order mark": f"\ufeffdata: {LAST}\n\ndata: [DONE]\n\n",
    "events without data": f"data:\n\nid: 1\n\nretry: 5\n\ndata: null\n\ndata: {LAST}\n\ndata\n\ndata: [DONE]\n\n",
    "a comment, a type and an id in an event": f": hi\nevent: x\ndata: {LAST}\nid: 1\n\ndata: [DONE]\n\n",
}
LOADING = says(503, {"error": {"message": "Loading model"}})
