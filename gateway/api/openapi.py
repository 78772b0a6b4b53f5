"""OpenAPI: describe the shapes of requests and answers, only for the OpenAPI document.

The shapes filter nothing. `pipeline.check` checks what a request must have. Everything else goes to the engine
unchanged, and answers are the engine's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.api import translated_shapes as shapes


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Message(_Open):
    role: str = Field(examples=["user"])
    content: str | list[dict[str, Any]] | None = Field(default=None, examples=["Count from 1 to 5."])


class StreamOptions(_Open):
    include_usage: bool = Field(default=False, description="Send a last chunk with the number of tokens.")


class _Generation(_Open):
    model: str | None = Field(default=None, description="A name from /v1/models. Default: the configured model.")
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
    model: str | None = Field(default=None, description="A name from /v1/models. Default: the configured model.")
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
    model: str = Field(description="The model that answered.")
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


class ChunkChoice(_Open):
    index: int
    delta: dict[str, Any] = Field(description="The new part: role, content, tool_calls, …")
    finish_reason: str | None = None


class ChatCompletionChunk(_Answer):
    """An event of a stream. The last event's data is `[DONE]`; a stream that fails ends with an ErrorEnvelope
    and a closed connection."""

    choices: list[ChunkChoice]


class TextChunkChoice(_Open):
    index: int
    text: str
    finish_reason: str | None = None


class CompletionChunk(_Answer):
    """An event of a stream. The last event's data is `[DONE]`; a stream that fails ends with an ErrorEnvelope
    and a closed connection."""

    choices: list[TextChunkChoice]


class Embedding(_Open):
    object: str = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(_Open):
    object: str = "list"
    model: str
    data: list[Embedding]
    usage: Usage | None = None


class RerankRequest(_Open):
    model: str | None = Field(default=None, description="A name from /v1/models. Default: the configured model.")
    query: str = Field(examples=["How long is the Danube?"])
    documents: list[str | dict[str, str]] = Field(examples=[["The Danube is 2,850 km long.", "The Alps are high."]])
    top_n: int | None = Field(default=None, ge=1, description="How many of the best are returned. Default: all.")


class Ranked(_Open):
    index: int = Field(description="The document's place in the request, from 0 on.")
    relevance_score: float


class Ranking(_Open):
    model: str
    results: list[Ranked] = Field(description="The most relevant first.")
    usage: Usage | None = None


class TranscriptionRequest(_Open):
    """A form (multipart/form-data)."""

    file: bytes = Field(description="The sound.", json_schema_extra={"format": "binary"})
    model: str | None = Field(default=None, description="A name from /v1/models. Default: the configured model.")
    language: str | None = Field(default=None, examples=["en"])
    prompt: str | None = None
    response_format: Literal["json", "text", "verbose_json"] | None = None
    temperature: float | None = None


class Transcription(_Open):
    text: str


class SpeechRequest(_Open):
    model: str | None = Field(default=None, description="A name from /v1/models. Default: the configured model.")
    input: str = Field(examples=["Good morning."])
    voice: str | None = None
    response_format: str | None = Field(default=None, examples=["mp3"])
    speed: float | None = None


class Model(_Open):
    id: str
    object: str = "model"
    created: int
    owned_by: str
    type: str = "model"
    display_name: str
    created_at: str
    context_length: int | None = Field(None, description="Tokens of one conversation; absent: not known yet.")
    max_context_length: int | None = Field(None, description="The largest context window that the model was made for.")
    capabilities: list[str] | None = Field(
        None, description="What the engines tell: chat, embeddings, tools, vision, audio, thinking."
    )
    loaded: bool | None = Field(None, description="Whether an engine has the model in its memory.")


class ModelList(BaseModel):
    object: str = "list"
    data: list[Model]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    error: Error


# The OpenAPI document is made from the signatures and texts of these functions. `Dispatch` does the work.


def chat_completions(body: ChatRequest) -> None:
    """Answer a conversation; with `stream`, token by token as server-sent events that end with `[DONE]`.

    Unknown fields go to the engine unchanged. A stream that cannot be finished ends with an error event and a
    closed connection. The header
    `x-stack-ignored-params` names what the engine ignored; with `x-stack-strict: true` that is a 400.
    """


def completions(body: CompletionRequest) -> None:
    """Continue a text."""


def embeddings(body: EmbeddingRequest) -> None:
    """Turn texts into vectors, if the model can."""


def rerank(body: RerankRequest) -> None:
    """Order documents by how well they answer a query, if the model can. Without an engine that ranks it is a 404."""


def transcription(body: TranscriptionRequest) -> None:
    """Write down what is said in a sound, if an engine of the model can. Otherwise it is a 404.

    The request is a form (multipart/form-data), the answer JSON, or plain text with `response_format=text`.
    """


def speech(body: SpeechRequest) -> None:
    """Speak a text, if an engine of the model can. Otherwise it is a 404. The answer is a sound, in pieces."""


@dataclass(frozen=True, slots=True)
class Schema:
    """How a relayed endpoint is documented."""

    document: Callable[..., None]  # its request is the type of `body`, its description the docstring
    answer: type[BaseModel] | None  # None: it is a sound
    chunk: type[BaseModel] | None = None  # the data of each event of its stream, if it can stream
    error: type[BaseModel] = ErrorEnvelope
    tag: str = "OpenAI"


# By the `schema` of a row in gateway.endpoints.
SCHEMAS = {
    "chat": Schema(chat_completions, ChatCompletion, ChatCompletionChunk),
    "completion": Schema(completions, Completion, CompletionChunk),
    "embedding": Schema(embeddings, Embeddings),
    "rerank": Schema(rerank, Ranking, tag="Rerank"),
    "transcription": Schema(transcription, Transcription),
    "speech": Schema(speech, None),
    "response": Schema(shapes.responses, shapes.ResponseAnswer, shapes.ResponseEvent),
    "response_count": Schema(shapes.response_input_tokens, shapes.ResponseCount),
    "message": Schema(
        shapes.messages, shapes.MessageAnswer, shapes.MessageEvent, shapes.MessageErrorEnvelope, "Anthropic"
    ),
    "message_count": Schema(
        shapes.message_count_tokens, shapes.MessageCount, error=shapes.MessageErrorEnvelope, tag="Anthropic"
    ),
}
