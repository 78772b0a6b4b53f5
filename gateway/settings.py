"""Settings: read the environment, as the only module that does. Every other module gets a frozen `Settings`.

Each field is one environment variable of the same name in capitals. `.env.example` lists all of them with meaning,
default and limits, and a test proves that list complete.

The file is long because it has a field for each variable, beside the check of its form.
"""

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gateway import addresses, files
from gateway.dialects import ALL, DIALECTS
from gateway.dialects.dialect import Dialect

PLACEHOLDER_KEY = "dev-key"
MAX_FILE = 4 * 1024 * 1024  # bytes of a file with keys or a URL
MOST_WORKERS = 64
MAX_MODEL_NAME = 200  # characters
ENGINE_KEY = r"[\x21-\x7e]+"  # it goes into a header
MIN_KEY_LENGTH = 16  # characters; `make up` writes keys of 40

if TYPE_CHECKING:
    EngineName = str
else:  # pydantic refuses an unknown engine and lists the known ones
    EngineName = Literal[tuple(DIALECTS)]


class SettingsError(Exception):
    """Say why the environment cannot be used. The message has one line per variable: what is wrong, and what to do."""


def _split(value: Any) -> Any:
    """'a, b,,c' → ('a', 'b', 'c')."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _pairs(left: str, right: str) -> Callable[[Any], Any]:
    """Return a function that reads 'a=1, b=2' as {'a': '1', 'b': '2'}, and calls the two sides so in its errors."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = {}
        for part in _split(value):
            name, equals, meaning = (piece.strip() for piece in part.partition("="))
            if not (name and equals and meaning):
                raise ValueError(f"'{part}' must have the form {left}={right}")
            if name in pairs:
                raise ValueError(f"the {left} '{name}' appears twice")
            pairs[name] = meaning
        return pairs

    return read


def _model_name(value: str) -> str:
    if not 1 <= len(value) <= MAX_MODEL_NAME or re.search(r"[\x00-\x1f\x7f-\x9f]", value):
        raise ValueError(f"a model's name must have 1 to {MAX_MODEL_NAME} characters, without control characters")
    return value


ModelName = Annotated[str, AfterValidator(_model_name)]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(addresses.host)], ...], NoDecode, BeforeValidator(_split)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(addresses.origin)], ...], NoDecode, BeforeValidator(_split)]
Aliases = Annotated[dict[ModelName, ModelName], NoDecode, BeforeValidator(_pairs("alias", "model"))]
Attributes = Annotated[dict[str, str], NoDecode, BeforeValidator(_pairs("name", "value"))]
BaseUrl = Annotated[str, AfterValidator(addresses.base_url)]
CollectorUrl = Annotated[str, AfterValidator(addresses.collector)]
Address = Annotated[str, AfterValidator(addresses.address)]
Listening = Annotated[str, AfterValidator(addresses.listening)]
OwnAddress = Annotated[str, AfterValidator(addresses.own)]
Count = Annotated[int, Field(ge=1, le=10**15)] | None
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Wait = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Slots = Annotated[int, Field(ge=1, le=2048)] | None
Tokens = Annotated[int, Field(ge=256, le=100_000_000)] | None
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogLevels = Annotated[dict[str, LogLevel], NoDecode, BeforeValidator(_pairs("name", "level"))]
Resumes = Annotated[int, Field(ge=0, le=10)]


def _engine(data: dict[str, Any]) -> Dialect:
    """Return the dialect of the engine that was named, or of the default one."""
    return DIALECTS[data.get("llm_backend", ALL[0].name)]


class EngineSettings(BaseSettings):
    """Describe the endpoint behind a client. The gateway and `gateway.llm` share these fields."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    llm_backend: EngineName = ALL[0].name
    llm_base_url: BaseUrl = Field(default_factory=lambda data: _engine(data).url)
    llm_model: ModelName = Field(default_factory=lambda data: _engine(data).model)
    llm_api_key: SecretStr | None = None
    llm_timeout: Seconds = 600.0


class Settings(EngineSettings):
    """Hold every setting of the gateway. Durations are in seconds, and sizes in bytes."""

    llm_connect_timeout: Seconds = 5.0
    llm_first_token_timeout: Seconds = 300.0
    llm_idle_timeout: Seconds = 60.0
    llm_slots: Slots = None
    llm_context: Tokens = None

    stack_bind: Address = "127.0.0.1:9000"
    stack_publish: Address | None = None
    stack_metrics_bind: Listening | None = None
    stack_proxy_network: OwnAddress | None = None
    stack_workers: Annotated[int, Field(ge=1, le=MOST_WORKERS)] = 2
    stack_api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)] = ()
    stack_api_keys_file: Path = Path("/run/secrets/stack_api_keys")
    stack_admin_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)] = ()
    stack_admin_keys_file: Path = Path("/run/secrets/stack_admin_keys")
    stack_console_hours: Annotated[int, Field(ge=1, le=720)] = 12
    stack_data_dir: Path = Path("/var/lib/stack")
    stack_store_url: SecretStr | None = None
    stack_store_url_file: Path = Path("/run/secrets/stack_store_url")
    stack_store_grace: Seconds = 3600.0
    stack_usage_retention_days: Annotated[int, Field(ge=32, le=36_500)] = 400  # monthly quotas count rows
    stack_responses_days: Annotated[int, Field(ge=0, le=36_500)] = 0  # by default, no prompt is written to a disk
    stack_responses_bytes_per_key: Annotated[int, Field(ge=1 << 16, le=1 << 40)] = 256 * 1024 * 1024
    stack_limit_requests_per_minute: Count = None
    stack_limit_tokens_per_minute: Count = None
    stack_limit_concurrent: Count = None
    stack_limit_tokens_per_day: Count = None
    stack_limit_tokens_per_month: Count = None
    stack_progress_file: Path = Path("/run/progress/model.json")
    stack_config: Path = Path("/etc/stack/stack.yaml")
    stack_model_aliases: Aliases = Field(default_factory=dict)
    stack_allowed_hosts: Hosts = ()
    stack_cors_origins: Origins = ()
    stack_strict_params: bool = False
    stack_max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 20 * 1024 * 1024
    stack_connections: Annotated[int, Field(ge=16, le=65_536)] = 512
    stack_max_answer_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 64 * 1024 * 1024
    stack_body_budget_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 50)] | None = None
    stack_read_timeout: Seconds = 10.0
    stack_write_timeout: Seconds = 30.0
    stack_hold: Seconds = 10.0
    stack_drain_delay: Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)] = 3.0
    stack_grace: Annotated[float, Field(ge=1, le=300, allow_inf_nan=False)] = 60.0
    stack_queue: Annotated[int, Field(ge=0, le=1024)] = 512
    stack_queue_timeout: Wait = 60.0
    stack_swap_wait: Seconds | None = None
    stack_resume: Resumes = 3
    stack_resume_wait: Wait = 30.0
    stack_idempotency_ttl: Seconds = 600.0
    stack_idempotency_linger: Seconds = 30.0
    stack_idempotency_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 40)] = 64 * 1024 * 1024
    stack_log_level: LogLevel = "INFO"
    stack_log_levels: LogLevels = Field(default_factory=dict)
    stack_log_sample: Share = 1.0
    stack_log_content: bool = False
    stack_trace_content: bool = False
    otel_exporter_otlp_endpoint: CollectorUrl | None = None
    otel_exporter_otlp_headers: SecretStr | None = None
    otel_service_name: Annotated[str, Field(min_length=1)] = "stack"
    otel_resource_attributes: Attributes = Field(default_factory=dict)
    otel_traces_sampler_arg: Share = 1.0

    _accepted_keys: tuple[str, ...] = ()
    _admin_keys: tuple[str, ...] = ()
    _store_url: str = ""

    @property
    def reachable_from(self) -> str:
        """The host address on which the port is published. A container cannot see it, so STACK_PUBLISH says it."""
        return addresses.split_address(self.stack_publish or self.stack_bind)[0]

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return ipaddress.ip_address(self.reachable_from).is_loopback

    def accepted_keys(self) -> tuple[str, ...]:
        """Return every key of STACK_API_KEYS and its file, in plain text, as they were when the settings were
        loaded."""
        return self._accepted_keys

    def admin_keys(self) -> tuple[str, ...]:
        """Return every key of STACK_ADMIN_KEYS and its file. Without any, there is no admin API."""
        return self._admin_keys

    def collector_headers(self) -> dict[str, str]:
        """Return the headers of OTEL_EXPORTER_OTLP_HEADERS, for requests to the collector."""
        given = self.otel_exporter_otlp_headers
        pairs = _split(given.get_secret_value()) if given is not None else ()
        parts = (pair.partition("=") for pair in pairs)
        return {name.strip().lower(): unquote(value.strip()) for name, _, value in parts}

    @property
    def journals(self) -> Path:
        """The directory in which workers write usage that is not in the store yet, and their running requests."""
        return self.stack_data_dir / "journal"

    @property
    def store_url(self) -> str:
        """The URL of a PostgreSQL database, with its password; empty: SQLite in the data directory."""
        return self._store_url

    @model_validator(mode="after")
    def _check_keys(self) -> "Settings":
        keys = _read_keys(self.stack_api_keys, self.stack_api_keys_file, "STACK_API_KEYS")
        self._accepted_keys = keys = keys or ((PLACEHOLDER_KEY,) if self.on_loopback else ())
        self._admin_keys = _read_keys(self.stack_admin_keys, self.stack_admin_keys_file, "STACK_ADMIN_KEYS")
        if not self.on_loopback:
            if not keys:
                raise ValueError(
                    f"STACK_API_KEYS: no key is set, and the port is published on {self.reachable_from}, "
                    "beyond this machine. Set a strong key (openssl rand -hex 24), or publish on 127.0.0.1."
                )
            self._check_strength("STACK_API_KEYS", keys)
        if any(len(key) < MIN_KEY_LENGTH for key in self._admin_keys):
            raise ValueError(
                f"STACK_ADMIN_KEYS: a key is too short. An admin key has {MIN_KEY_LENGTH} characters or more, "
                "also on loopback (openssl rand -hex 24)."
            )
        if set(keys) & set(self._admin_keys):
            raise ValueError("STACK_ADMIN_KEYS: a key is in STACK_API_KEYS too. Use different keys.")
        return self

    def _check_strength(self, name: str, keys: tuple[str, ...]) -> None:
        if weak := [key for key in keys if len(key) < MIN_KEY_LENGTH]:
            what = f"the placeholder '{PLACEHOLDER_KEY}'" if PLACEHOLDER_KEY in weak else "a short key"
            raise ValueError(
                f"{name}: it has {what}, and the port is published on {self.reachable_from}, "
                f"beyond this machine. Use keys of {MIN_KEY_LENGTH} characters or more (openssl rand -hex 24), "
                "or publish on 127.0.0.1."
            )

    @model_validator(mode="after")
    def _check_store(self) -> "Settings":
        given = self.stack_store_url.get_secret_value() if self.stack_store_url else ""
        url = given or _read_secret(self.stack_store_url_file, "STACK_STORE_URL_FILE").strip()
        try:
            self._store_url = addresses.database(url) if url else ""
        except ValueError as exc:
            raise ValueError(f"STACK_STORE_URL: {exc}") from None
        return self

    @model_validator(mode="after")
    def _check_engine_key(self) -> "Settings":
        if self.llm_api_key is not None and not re.fullmatch(ENGINE_KEY, self.llm_api_key.get_secret_value()):
            raise ValueError("LLM_API_KEY: it may have only printable ASCII characters without spaces.")
        return self

    @model_validator(mode="after")
    def _check_collector_headers(self) -> "Settings":
        for name, value in self.collector_headers().items():
            if not re.fullmatch(r"[a-z0-9_-]+", name) or not re.fullmatch(r"[\x20-\x7e]+", value):
                raise ValueError(
                    "OTEL_EXPORTER_OTLP_HEADERS: it must have the form name=value, and pairs are separated by commas."
                )
        return self

    @model_validator(mode="after")
    def _check_aliases(self) -> "Settings":
        for alias, model in self.stack_model_aliases.items():
            if model in self.stack_model_aliases:
                raise ValueError(
                    f"STACK_MODEL_ALIASES: '{alias}' stands for '{model}', which is an alias itself. Use a model."
                )
        return self


def _read_keys(given: tuple[SecretStr, ...], file: Path, name: str) -> tuple[str, ...]:
    listed = [key.get_secret_value() for key in given]
    text = _read_secret(file, f"{name}_FILE")
    listed += [key for line in text.splitlines() if not line.lstrip().startswith("#") for key in _split(line)]
    if not all(re.fullmatch(r"[\x21-\x7e]+", key) for key in listed):
        raise ValueError(f"{name}: a key may have only printable ASCII characters without spaces.")
    return tuple(dict.fromkeys(listed))


def _read_secret(path: Path, name: str) -> str:
    try:
        return files.read(path, MAX_FILE).decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise ValueError(
            f"{name}: {path} cannot be read ({reason}). "
            "In its container the gateway runs as uid 10001, which must be allowed to read the file."
        ) from None


def load() -> Settings:
    """Read and check the environment. Raises SettingsError with a sentence for each mistake, which never has the value
    of a secret."""
    try:
        return Settings()
    except ValidationError as exc:
        errors = [error for error in exc.errors(include_input=False) if error["type"] != "default_factory_not_called"]
        raise SettingsError("\n".join(map(_sentence, errors))) from None


def _sentence(error: Any) -> str:
    name = str(error["loc"][0]).upper() + ": " if error["loc"] else ""
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}{message}"
