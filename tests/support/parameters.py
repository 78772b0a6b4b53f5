"""Parameters: the smallest request of each endpoint, a value for each parameter, and how a request with one is sent."""

from typing import Any

import httpx

from gateway.endpoints import Kind
from tests.support.fakes.forms import described
from tests.support.processes import MESSAGES

STRICT = {"x-stack-strict": "true"}
PATHS: dict[Kind, str] = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
    "rerank": "/v1/rerank",
    "transcription": "/v1/audio/transcriptions",
    "speech": "/v1/audio/speech",
}
LEAST: dict[Kind, dict[str, Any]] = {
    "chat": {"messages": MESSAGES},
    "completion": {"prompt": "One, two,"},
    "embedding": {"input": "one"},
    "rerank": {"query": "one", "documents": ["one", "two"]},
    "transcription": {},  # and a file
    "speech": {"input": "one", "voice": "alloy"},
}
SOUND = ("a.wav", b"RIFF....", "audio/wav")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
# A value for each parameter that is not its default.
SAMPLES: dict[str, Any] = {
    "messages": MESSAGES,
    "prompt": "One, two,",
    "input": "one",
    "query": "one",
    "documents": ["one", "two"],
    "return_documents": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "temperature": 0.3,
    "top_p": 0.5,
    "n": 2,
    "best_of": 2,
    "stop": ["x"],
    "seed": 7,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "json_object"},
    "tools": [TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "verbosity": "low",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "one"},
    "web_search_options": {},
    "functions": [TOOL["function"]],
    "function_call": {"name": "weather"},
    "user": "someone",
    "safety_identifier": "someone",
    "prompt_cache_key": "key",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit"},
    "service_tier": "flex",
    "store": True,
    "metadata": {"a": "b"},
    "moderation": {"model": "omni-moderation-latest"},
    "suffix": "four",
    "echo": True,
    "encoding_format": "base64",
    "dimensions": 8,
    "reasoning": {"effort": "low"},
    "language": "en",
    "voice": "alloy",
    "instructions": "Speak slowly.",
    "stream_format": "audio",
}
# At the endpoints whose parameter of that name is another one.
OTHER_SAMPLES: dict[Kind, dict[str, Any]] = {
    "transcription": {"file": described("a.wav", "audio/wav", SOUND[1]), "response_format": "json"},
    "speech": {"response_format": "mp3"},
}


def sample(kind: Kind, name: str) -> Any:
    """A value of a parameter that is not its default; a list for one of a form that may come several times."""
    found = SAMPLES | OTHER_SAMPLES.get(kind, {})
    return found.get(name, ["x"] if name.endswith("[]") else 3)


def form(fields: dict[str, Any], file: tuple[str, bytes, str] | None = SOUND) -> tuple[bytes, dict[str, str]]:
    """A form, and its Content-Type as a header."""
    files = {} if file is None else {"file": file}
    made = httpx.Request("POST", "http://x/", data=fields, files=files)
    return made.read(), {"content-type": made.headers["content-type"]}


def ask(
    http: httpx.Client, kind: Kind, engine: str, headers: dict[str, str] | None = None, **said: Any
) -> httpx.Response:
    body = LEAST[kind] | {"model": engine} | said
    if kind == "transcription":
        body.pop("file", None)
        content, kinds = form(body)
        return http.post(PATHS[kind], content=content, headers=kinds | (headers or {}))
    return http.post(PATHS[kind], json=body, headers=headers)


def reported(answer: httpx.Response) -> list[str]:
    header = answer.headers.get("x-stack-ignored-params")
    return header.split(",") if header else []
