"""Names: what OpenTelemetry calls each thing that a span says. This is the one place that knows its conventions.

The names in gen_ai are those of semantic-conventions-genai v0.1.0 (status: development), the other common ones those of
semantic-conventions v1.45.0 (stable). A name in stack is the gateway's own, because the conventions have none. The same
for metrics: gateway.metrics. docs/traces.md says which span has which attribute.
"""

from collections.abc import Mapping
from types import MappingProxyType

# Of a request to an engine.
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"  # the dialect: the conventions list no engine that one runs oneself
REQUEST_MODEL = "gen_ai.request.model"
STREAM = "gen_ai.request.stream"
CHOICES = "gen_ai.request.choice.count"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
SEED = "gen_ai.request.seed"
FINISH_REASONS = "gen_ai.response.finish_reasons"
FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"  # seconds
TOKENS_IN = "gen_ai.usage.input_tokens"
TOKENS_OUT = "gen_ai.usage.output_tokens"
TOKENS_CACHED = "gen_ai.usage.cache_read.input_tokens"
INPUT = "gen_ai.input.messages"  # only if STACK_TRACE_CONTENT asks for it
OUTPUT = "gen_ai.output.messages"  # likewise

# Of any request.
ERROR = "error.type"
METHOD = "http.request.method"
ROUTE = "http.route"
STATUS = "http.response.status_code"
SCHEME = "url.scheme"
PATH = "url.path"
ADDRESS = "server.address"
PORT = "server.port"
SERVICE = "service.name"
VERSION = "service.version"
INSTANCE = "service.instance.id"

# The gateway's own.
REQUEST_ID = "stack.request.id"  # as in the log
KEY = "stack.key.id"
API = "stack.api"
ARM = "stack.arm"
ENGINE = "stack.engine"
ENGINE_REQUEST_ID = "stack.engine.request.id"
ATTEMPTS = "stack.attempts"
RESUMES = "stack.resumes"

# Of spans and their events.
QUEUE = "queue"
OUTAGE = "outage"
PAUSE = "pause"
RESUME = "resume"
FIRST_TOKEN = "stack.first_token"  # noqa: S105  not a secret

OPERATIONS: Mapping[str, str] = MappingProxyType({"completion": "text_completion", "embedding": "embeddings"})
"""By the kind of a request: its `gen_ai.operation.name`, if that is not the name of the kind."""
