"""LLM: a thin client for any OpenAI-compatible endpoint, this gateway included.

    llm = LLM(LLMConfig("http://127.0.0.1:9000/v1", "llama3.1:8b", timeout=60, api_key="dev-key"))
    print(llm.chat([{"role": "user", "content": "Hello"}])["choices"][0]["message"]["content"])

It adds two things to plain HTTP: errors come as `LLMError` with OpenAI's code, and a stream that ends before
the answer is complete raises instead of ending. It uses no proxy, whatever the environment says.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from gateway.settings import EngineSettings

Messages = list[dict[str, Any]]


class LLMError(Exception):
    """The endpoint could not answer. `status` is the HTTP status, if there was one. `code` is OpenAI's error code."""

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class LLMConfig:
    """Where the endpoint is and what to ask it for. `timeout` is how long the endpoint may be silent, in seconds. For a
    blocking answer, that is the whole time until the answer comes."""

    base_url: str
    model: str
    timeout: float = 600.0
    api_key: str | None = field(default=None, repr=False)


def config_from_env() -> LLMConfig:
    """Read LLM_BACKEND, LLM_BASE_URL, LLM_MODEL, LLM_TIMEOUT and LLM_API_KEY, with the backend's defaults.

    Raises pydantic.ValidationError if one of them is invalid.
    """
    env = EngineSettings()
    key = env.llm_api_key.get_secret_value() if env.llm_api_key else None
    return LLMConfig(env.llm_base_url, env.llm_model, env.llm_timeout, key)


class LLM:
    """One endpoint, blocking (`chat`) and streaming (`astream`). Close it, or use it as a context manager.

    Without a configuration, it uses `config_from_env`, and raises what that raises.
    """

    def __init__(self, config: LLMConfig | None = None) -> None:
        self.config = config or config_from_env()
        self._tls = httpx.create_ssl_context()  # costs 20 ms, so it is built once
        self._client = httpx.Client(**self._options())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def chat(
        self,
        messages: Messages,
        model: str | None = None,
        temperature: float = 0.7,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Ask, wait, and return the whole response object. `kwargs` are added to the request. Raises LLMError."""
        body = self._body(messages, model, temperature, max_tokens, kwargs)
        try:
            response = self._client.post("chat/completions", json=body)
        except httpx.HTTPError as exc:
            raise self._unreachable(exc) from exc
        if response.status_code != 200:
            raise _refused(response)
        try:
            answer: dict[str, Any] = response.json()
        except ValueError as exc:
            raise LLMError("The endpoint's answer is not JSON.", status=200) from exc
        return answer

    async def astream(
        self,
        messages: Messages,
        model: str | None = None,
        temperature: float = 0.7,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[dict[str, Any]]:
        """Ask, and yield each parsed chunk as it arrives. Raises LLMError, also if the stream breaks off."""
        body = self._body(messages, model, temperature, max_tokens, kwargs) | {"stream": True}
        finished = False
        try:
            async with (
                httpx.AsyncClient(**self._options()) as client,  # one per stream: a pool belongs to one event loop
                client.stream("POST", "chat/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    await response.aread()
                    raise _refused(response)
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        break
                    chunk = json.loads(data)
                    if error := chunk.get("error"):
                        raise _error(error, response.status_code)
                    finished = finished or any(choice.get("finish_reason") for choice in chunk.get("choices", ()))
                    yield chunk
        except (ValueError, AttributeError) as exc:
            raise LLMError("The endpoint's answer is not an OpenAI stream.", status=200) from exc
        except httpx.HTTPError as exc:
            raise self._unreachable(exc) from exc
        if not finished:
            raise LLMError("The stream ended before the answer was complete.", status=200)

    def _options(self) -> dict[str, Any]:
        config = self.config
        return {
            "base_url": config.base_url,
            "timeout": config.timeout,
            "verify": self._tls,
            "trust_env": False,  # a proxy must not get the key and the prompts of a gateway on this machine
            "headers": {"authorization": f"Bearer {config.api_key}"} if config.api_key else {},
        }

    def _body(
        self, messages: Messages, model: str | None, temperature: float, max_tokens: int | None, more: dict[str, Any]
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model or self.config.model, "messages": messages, "temperature": temperature}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        return body | more

    def _unreachable(self, exc: httpx.HTTPError) -> LLMError:
        return LLMError(f"{self.config.base_url} is unreachable, or the connection broke: {exc or type(exc).__name__}.")


def _refused(response: httpx.Response) -> LLMError:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = response.text[:500]
    return _error(error, response.status_code)


def _error(error: Any, status: int) -> LLMError:
    if isinstance(error, dict):
        return LLMError(str(error.get("message")), status=status, code=error.get("code"))
    return LLMError(str(error), status=status)
