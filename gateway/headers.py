"""Headers: the names of the gateway's own HTTP headers, and of those that it shares with OpenAI's API.

EXPOSED has the headers of an answer that callers may read, so that a browser shows them to a page.
"""

# Of a request.
AUTHORIZATION = b"authorization"
API_KEY = b"x-api-key"
IDEMPOTENCY_KEY = b"idempotency-key"
STRICT = b"x-stack-strict"
QUEUE_TIMEOUT = b"x-stack-queue-timeout"
RESUME = b"x-stack-resume"
USER = b"x-openwebui-user-jwt"  # which person a front end sends the request for, signed
TRACEPARENT = b"traceparent"  # W3C Trace Context
TRACESTATE = b"tracestate"
FORWARDED_FOR = b"x-forwarded-for"  # of a reverse proxy

# Of a request and of its answer.
REQUEST_ID = b"x-request-id"

# Of an answer.
ARM = b"x-stack-arm"
CHANGED_ROLES = b"x-stack-changed-roles"
COUNTED_BY = b"x-stack-counted-by"
FORCED_TOOLS = b"x-stack-forced-tools"
IGNORED_PARAMS = b"x-stack-ignored-params"
LOADING = b"x-stack-loading"
QUEUE_MS = b"x-stack-queue-ms"
RESUMES = b"x-stack-resumes"
REPLAYED = b"idempotent-replayed"
RETRY_AFTER = "retry-after"  # seconds
RETRY_AFTER_MS = "retry-after-ms"  # milliseconds, which OpenAI's clients prefer
SHOULD_RETRY = "x-should-retry"  # OpenAI's clients obey "false"

_RATE_LIMIT = "x-ratelimit-"
RATE_LIMIT_PREFIX = _RATE_LIMIT.encode()
RATE_LIMITS = tuple(
    f"{_RATE_LIMIT}{what}-{name}" for name in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)

# Of an answer of Anthropic's API.
ANTHROPIC = (
    "request-id",
    *(
        f"anthropic-ratelimit-{name}-{what}"
        for name in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    ),
)

EXPOSED: tuple[str, ...] = (
    *(
        it.decode()
        for it in (
            REQUEST_ID,
            ARM,
            CHANGED_ROLES,
            COUNTED_BY,
            FORCED_TOOLS,
            IGNORED_PARAMS,
            LOADING,
            QUEUE_MS,
            RESUMES,
            REPLAYED,
        )
    ),
    RETRY_AFTER,
    RETRY_AFTER_MS,
    SHOULD_RETRY,
    *RATE_LIMITS,
    *ANTHROPIC,
)
