"""Endpoints: one row for each relayed endpoint, with everything in which one endpoint differs from another.

Every module that treats endpoints differently reads the difference here. A new endpoint is a new row, and its schema in
`api/openapi.py`. How an engine handles an endpoint is in the engine's own file (gateway.dialects).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

Kind = str  # the name of an endpoint in logs, metrics and usage: a key of ENDPOINTS
# The API that a request used. Several APIs may have one kind.
Api = Literal[
    "chat_completions", "completions", "embeddings", "rerank", "responses", "messages", "transcriptions", "speech"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One relayed endpoint."""

    kind: Kind
    api: Api
    path: str  # its path for callers
    also: tuple[str, ...] = ()  # other paths of the same endpoint
    asks: str  # the engine's path, relative to its base URL
    content: str  # the field that holds what is asked
    # What the entries of that field are. Messages are one conversation. Each prompt is answered `n` times. Each input
    # is read by itself, without a chat template.
    counted: Literal["messages", "prompts", "inputs"]
    # The fields beside it whose text is a part of the prompt. A prompt's estimate counts them all (limits.estimates).
    rendered: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()  # those of them that an engine reads again with each entry
    logged_as: str  # the number of entries, in the log line of its start
    schema: str  # the name of its shapes in the OpenAPI document (api.openapi.SCHEMAS)
    # What usage and metrics count beside tokens: the documents, seconds of sound, or characters of a text.
    unit: Literal["", "documents", "seconds", "characters"] = ""
    form: bool = False  # its requests are forms with a file (gateway.multipart), otherwise JSON
    sounds: bool = False  # its answer is a sound, which is passed on in pieces, otherwise JSON
    limits: tuple[str, ...] = ()  # OpenAI's names for the most tokens of an answer: the newest, then the oldest
    streams: bool = False  # whether `stream` has a meaning; otherwise every answer is blocking
    prompts: bool = False  # whether the operator's prompts stand before its content
    resumes: bool = False  # whether another engine can continue an answer that broke off
    translated: bool = False  # its requests become requests of its kind (gateway.translation); its API names the face
    counting: bool = False  # it only counts the tokens of a prompt

    @property
    def generates(self) -> bool:
        """Whether an engine generates tokens for it, and so whether its answers have a limit and a speed."""
        return bool(self.limits)

    @property
    def metered(self) -> bool:
        """Whether its requests take tokens. A sound has other units."""
        return self.unit not in ("seconds", "characters")

    @property
    def chats(self) -> bool:
        """Whether its content is a conversation."""
        return self.counted == "messages"


_CHAT = Endpoint(
    kind="chat",
    api="chat_completions",
    path="/v1/chat/completions",
    asks="chat/completions",
    content="messages",
    rendered=("tools", "functions", "response_format"),  # a template writes tools and schemas as JSON
    counted="messages",
    logged_as="n_messages",
    schema="chat",
    limits=("max_completion_tokens", "max_tokens"),
    streams=True,
    prompts=True,
    resumes=True,
)
_COMPLETION = Endpoint(
    kind="completion",
    api="completions",
    path="/v1/completions",
    asks="completions",
    content="prompt",
    rendered=("suffix", "response_format"),
    counted="prompts",
    logged_as="n_prompts",
    schema="completion",
    limits=("max_tokens",),
    streams=True,
    prompts=True,
    resumes=True,
)
_EMBEDDING = Endpoint(
    kind="embedding",
    api="embeddings",
    path="/v1/embeddings",
    asks="embeddings",
    content="input",
    counted="inputs",
    logged_as="n_inputs",
    schema="embedding",
)
# Neither API is OpenAI's: Jina and Cohere began them, and engines took them over.
_RERANK = Endpoint(
    kind="rerank",
    api="rerank",
    path="/v1/rerank",
    also=("/v2/rerank", "/rerank"),
    asks="rerank",
    content="documents",
    rendered=("query",),
    repeated=("query",),
    counted="inputs",
    logged_as="n_documents",
    schema="rerank",
    unit="documents",
)
# Neither takes tokens of a key's limits: engines count none for them.
_TRANSCRIPTION = Endpoint(
    kind="transcription",
    api="transcriptions",
    path="/v1/audio/transcriptions",
    asks="audio/transcriptions",
    content="file",
    counted="inputs",
    logged_as="n_files",
    schema="transcription",
    unit="seconds",
    form=True,
)
_SPEECH = Endpoint(
    kind="speech",
    api="speech",
    path="/v1/audio/speech",
    asks="audio/speech",
    content="input",
    counted="inputs",
    logged_as="n_inputs",
    schema="speech",
    unit="characters",
    sounds=True,
)
# The kind of a translated endpoint stays "chat", and so does everything that happens behind the translation.
_RESPONSES = replace(_CHAT, api="responses", path="/v1/responses", content="input", schema="response", translated=True)
_RESPONSES_COUNT = replace(
    _RESPONSES, path="/v1/responses/input_tokens", schema="response_count", counting=True, streams=False
)
_MESSAGES = replace(_CHAT, api="messages", path="/v1/messages", schema="message", translated=True)
_MESSAGES_COUNT = replace(
    _MESSAGES, path="/v1/messages/count_tokens", schema="message_count", counting=True, streams=False
)
ROWS: tuple[Endpoint, ...] = (
    _CHAT,
    _COMPLETION,
    _EMBEDDING,
    _RERANK,
    _TRANSCRIPTION,
    _SPEECH,
    _RESPONSES,
    _RESPONSES_COUNT,
    _MESSAGES,
    _MESSAGES_COUNT,
)

ENDPOINTS: Mapping[Kind, Endpoint] = MappingProxyType({it.kind: it for it in ROWS if not it.translated})
BY_PATH: Mapping[str, Endpoint] = MappingProxyType({path: it for it in ROWS for path in (it.path, *it.also)})
