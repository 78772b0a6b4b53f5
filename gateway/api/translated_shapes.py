"""Translated shapes: describe requests and answers of the Responses and Messages APIs, only for the OpenAPI document.

The shapes filter nothing. gateway.translation checks requests and writes answers.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class ResponseRequest(_Open):
    model: str = Field(description="A name from /v1/models.")
    input: str | list[dict[str, Any]] = Field(examples=["Count from 1 to 5."])
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    store: bool | None = Field(
        default=None, description="Default: true if the gateway stores responses; otherwise true is refused."
    )
    previous_response_id: str | None = Field(default=None, description="The stored response to continue.")


class ResponseAnswer(_Open):
    id: str
    object: Literal["response"]
    created_at: int = Field(description="Seconds since 1970.")
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: dict[str, Any] | None


class ResponseEvent(_Open):
    """An event of a stream. `response.completed`, `response.incomplete` or `response.failed` is the last one. A stream
    that fails ends with `error`, `response.failed` and a closed connection."""

    type: str
    sequence_number: int


class ResponseCount(BaseModel):
    object: Literal["response.input_tokens"]
    input_tokens: int


class MessageTurn(_Open):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]] = Field(examples=["Count from 1 to 5."])


class _Prompt(_Open):
    model: str = Field(description="A name from /v1/models.")
    messages: list[MessageTurn]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessageRequest(_Prompt):
    max_tokens: int = Field(examples=[256])
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class MessageCountRequest(_Prompt):
    pass


class MessageAnswer(_Open):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class MessageEvent(_Open):
    """An event of a stream. `message_stop` is the last one. A stream that fails ends with `error` and a closed
    connection."""

    type: str


class MessageCount(BaseModel):
    input_tokens: int


class MessageError(BaseModel):
    type: str
    message: str
    details: dict[str, Any] | None = None


class MessageErrorEnvelope(BaseModel):
    type: Literal["error"]
    error: MessageError
    request_id: str | None


# The OpenAPI document is made from the signatures and texts of these functions, as in `openapi`.


def responses(body: ResponseRequest) -> None:
    """Answer a conversation in the form of OpenAI's Responses API; with `stream`, as its events.

    A response is stored if the gateway is set up to store responses (`STACK_RESPONSES_DAYS`), unless `store` is false.
    A streamed request that no engine can answer gets a stream that ends with `response.failed`.
    """


def response_input_tokens(body: ResponseRequest) -> None:
    """Count the tokens of a prompt. The header `x-stack-counted-by` says whether the engine counted them.

    The key is charged one request and no tokens.
    """


def messages(body: MessageRequest) -> None:
    """Answer a conversation in the form of Anthropic's Messages API; with `stream`, as its events."""


def message_count_tokens(body: MessageCountRequest) -> None:
    """Count the tokens of a prompt. The header `x-stack-counted-by` says whether the engine counted them.

    The key is charged one request and no tokens.
    """
