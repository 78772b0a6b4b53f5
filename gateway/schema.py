"""Schema: the shapes of requests and answers, for the OpenAPI document alone.

They describe; they don't filter. What a request must have is checked in pipeline.check, everything else goes to
the engine as it came, and answers are the engine's own.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Message(_Open):
    role: str = Field(examples=["user"])
    content: str | list[dict[str, Any]] | None = Field(default=None, examples=["Count from 1 to 5."])


class StreamOptions(_Open):
    include_usage: bool = Field(default=False, description="Send a last chunk with the tokens used.")


class _Generation(_Open):
    model: str | None = Field(default=None, description="A name from /v1/models; left out, the configured model.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


class ChatRequest(_Generation):
    messages: list[Message] = Field(min_length=1)
    n: int | None = None
    logprobs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


class CompletionRequest(_Generation):
    prompt: str | list[Any]


class EmbeddingRequest(_Open):
    model: str | None = Field(default=None, description="A name from /v1/models; left out, the configured model.")
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None


class Usage(_Open):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class _Answer(_Open):
    id: str
    object: str
    created: int
    model: str = Field(description="The model that really answered.")
    usage: Usage | None = None


class ChatChoice(_Open):
    index: int
    message: Message
    finish_reason: str


class ChatCompletion(_Answer):
    choices: list[ChatChoice]


class TextChoice(_Open):
    index: int
    text: str
    finish_reason: str


class Completion(_Answer):
    choices: list[TextChoice]


class Embedding(_Open):
    object: str = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(_Open):
    object: str = "list"
    model: str
    data: list[Embedding]
    usage: Usage | None = None


class Model(_Open):
    id: str
    object: str = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: str = "list"
    data: list[Model]


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    error: Error
