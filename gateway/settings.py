"""Settings: the only reader of the environment. Everything else is handed a frozen `Settings`.

Each field is one environment variable of the same name in capitals. `.env.example` lists them all
with meaning, default and constraint, and a test proves that list complete.
"""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PLACEHOLDER_KEY = "dev-key"
MIN_KEY_LENGTH = 16  # characters; `make up` writes keys of 40

# Where each engine listens and what it serves when nothing else is said (shared defaults of the engines' own docs).
ENGINES = {
    "ollama": ("http://127.0.0.1:11434/v1", "llama3.1:8b"),
    "vllm": ("http://127.0.0.1:8000/v1", "meta-llama/Llama-3.1-8B-Instruct"),
    "llamacpp": ("http://127.0.0.1:8080/v1", "SmolLM2-135M-Instruct"),
}


class SettingsError(Exception):
    """The environment can't be used. The message has one line per variable: what is wrong and what to do."""


def _split(value: Any) -> Any:
    """'a, b,,c' → ('a', 'b', 'c')."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    """'alias=model, …' → {'alias': 'model', …}."""
    if not isinstance(value, str):
        return value
    pairs = {}
    for part in _split(value):
        alias, equals, model = (piece.strip() for piece in part.partition("="))
        if not (alias and equals and model):
            raise ValueError(f"'{part}' is not of the form alias=model")
        if alias in pairs:
            raise ValueError(f"the alias '{alias}' is given twice")
        pairs[alias] = model
    return pairs


def _base_url(value: str) -> str:
    """Accept a base URL with or without its trailing slash or /v1, and return it with /v1."""
    url = urlsplit(value)
    try:
        port_ok = url.port != 0
    except ValueError:
        port_ok = False
    if (
        url.scheme not in ("http", "https")
        or not url.hostname
        or not port_ok
        or not re.fullmatch(r"[\x21-\x7e]+", value)
    ):
        raise ValueError("must look like http://host:port/v1")
    if url.username or url.password or url.query or url.fragment:
        raise ValueError("must not carry credentials, a query or a fragment (an engine's key goes into LLM_API_KEY)")
    path = url.path.rstrip("/")
    return f"{url.scheme}://{url.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _is_postgres(value: str) -> bool:
    try:
        url = urlsplit(value)
        return url.scheme in ("postgresql", "postgres") and url.port != 0 and len(url.path) > 1
    except ValueError:
        return False


def _address(value: str) -> str:
    """Check 'host:port' where host is an IP address ('[::1]:9000' for IPv6)."""
    host, port = split_address(value)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(
            f"'{value}' must be an IP address and a port, such as 127.0.0.1:9000 or 0.0.0.0:9000"
        ) from None
    if not 0 <= port <= 65535:
        raise ValueError(f"the port {port} is not between 1 and 65535")
    return value


def _listening(value: str) -> str:
    """Check 'host:port' where host is an IP address or a name of this machine's own."""
    host, port = split_address(value)
    if not re.fullmatch(r"[0-9A-Za-z:._-]+", host) or not 1 <= port <= 65535:
        raise ValueError(f"'{value}' must be an address and a port, such as 127.0.0.1:9090")
    return value


def split_address(value: str) -> tuple[str, int]:
    """'127.0.0.1:9000' → ('127.0.0.1', 9000). Raises ValueError for anything else."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+)):(\d{1,5})", value)
    if not match:
        raise ValueError(f"'{value}' must be an IP address and a port, such as 127.0.0.1:9000 or 0.0.0.0:9000")
    return match[1] or match[2], int(match[3])


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Pairs = Annotated[dict[str, str], NoDecode, BeforeValidator(_pairs)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
Address = Annotated[str, AfterValidator(_address)]
Listening = Annotated[str, AfterValidator(_listening)]
Count = Annotated[int, Field(ge=1, le=10**15)] | None
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Wait = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Slots = Annotated[int, Field(ge=1, le=2048)] | None
Resumes = Annotated[int, Field(ge=0, le=10)]


class EngineSettings(BaseSettings):
    """What a client must know of the endpoint behind it: shared by the gateway and by `gateway.llm`."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    llm_backend: Literal["ollama", "vllm", "llamacpp"] = "ollama"
    llm_base_url: BaseUrl = Field(default_factory=lambda data: ENGINES[data.get("llm_backend", "ollama")][0])
    llm_model: str = Field(default_factory=lambda data: ENGINES[data.get("llm_backend", "ollama")][1], min_length=1)
    llm_api_key: SecretStr | None = None
    llm_timeout: Seconds = 600.0


class Settings(EngineSettings):
    """Everything that can be set about the gateway. Times are seconds, sizes are bytes."""

    llm_connect_timeout: Seconds = 5.0
    llm_first_token_timeout: Seconds = 300.0
    llm_idle_timeout: Seconds = 60.0
    llm_slots: Slots = None

    stack_bind: Address = "127.0.0.1:9000"
    stack_publish: Address | None = None
    stack_metrics_bind: Listening | None = None
    stack_workers: Annotated[int, Field(ge=1, le=64)] = 2
    stack_api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)] = ()
    stack_api_keys_file: Path = Path("/run/secrets/stack_api_keys")
    stack_admin_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)] = ()
    stack_admin_keys_file: Path = Path("/run/secrets/stack_admin_keys")
    stack_data_dir: Path = Path("/var/lib/stack")
    stack_store_url: SecretStr | None = None
    stack_store_url_file: Path = Path("/run/secrets/stack_store_url")
    stack_store_grace: Seconds = 3600.0
    stack_usage_retention_days: Annotated[int, Field(ge=32, le=36_500)] = 400  # monthly quotas count rows
    stack_limit_requests_per_minute: Count = None
    stack_limit_tokens_per_minute: Count = None
    stack_limit_concurrent: Count = None
    stack_limit_tokens_per_day: Count = None
    stack_limit_tokens_per_month: Count = None
    stack_progress_file: Path = Path("/run/progress/model.json")
    stack_config: Path = Path("/etc/stack/stack.yaml")
    stack_model_aliases: Pairs = Field(default_factory=dict)
    stack_allowed_hosts: Names = ()
    stack_cors_origins: Names = ()
    stack_strict_params: bool = False
    stack_max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 20 * 1024 * 1024
    stack_read_timeout: Seconds = 10.0
    stack_write_timeout: Seconds = 30.0
    stack_hold: Seconds = 10.0
    stack_drain_delay: Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)] = 3.0
    stack_grace: Annotated[float, Field(ge=1, le=300, allow_inf_nan=False)] = 60.0
    stack_queue: Annotated[int, Field(ge=0, le=1024)] = 512
    stack_queue_timeout: Wait = 60.0
    stack_resume: Resumes = 3
    stack_resume_wait: Wait = 30.0
    stack_idempotency_ttl: Seconds = 600.0
    stack_idempotency_linger: Seconds = 30.0
    stack_idempotency_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 40)] = 64 * 1024 * 1024
    stack_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    stack_log_content: bool = False

    _accepted_keys: tuple[str, ...] = ()
    _admin_keys: tuple[str, ...] = ()
    _store_url: str = ""

    @property
    def reachable_from(self) -> str:
        """The host address the port is published on. A container can't see that: STACK_PUBLISH says it."""
        return split_address(self.stack_publish or self.stack_bind)[0]

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return ipaddress.ip_address(self.reachable_from).is_loopback

    def accepted_keys(self) -> tuple[str, ...]:
        """Every key of STACK_API_KEYS and its file, in plain text, as it was when this was loaded."""
        return self._accepted_keys

    def admin_keys(self) -> tuple[str, ...]:
        """The same of STACK_ADMIN_KEYS. None: there is no admin API."""
        return self._admin_keys

    @property
    def journals(self) -> Path:
        """Where the workers write down what isn't in the store yet, and what they are at."""
        return self.stack_data_dir / "journal"

    @property
    def store_url(self) -> str:
        """A PostgreSQL database, with its password; empty: SQLite, in the data directory."""
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
            self._check_strength("STACK_ADMIN_KEYS", self._admin_keys)
        if set(keys) & set(self._admin_keys):
            raise ValueError("STACK_ADMIN_KEYS: holds a key of STACK_API_KEYS too. An admin key must be no other's.")
        return self

    def _check_strength(self, name: str, keys: tuple[str, ...]) -> None:
        if weak := [key for key in keys if len(key) < MIN_KEY_LENGTH]:
            what = f"the placeholder '{PLACEHOLDER_KEY}'" if PLACEHOLDER_KEY in weak else "a short key"
            raise ValueError(
                f"{name}: holds {what}, and the port is published on {self.reachable_from}, "
                f"beyond this machine. Use keys of {MIN_KEY_LENGTH} characters or more (openssl rand -hex 24), "
                "or publish on 127.0.0.1."
            )

    @model_validator(mode="after")
    def _check_store(self) -> "Settings":
        given = self.stack_store_url.get_secret_value() if self.stack_store_url else ""
        url = given or _read_secret(self.stack_store_url_file, "STACK_STORE_URL_FILE").strip()
        if url and not _is_postgres(url):
            raise ValueError("STACK_STORE_URL: must look like postgresql://user:password@host:5432/database")
        self._store_url = url.replace("postgres://", "postgresql://", 1)
        return self

    @model_validator(mode="after")
    def _check_engine_key(self) -> "Settings":
        if self.llm_api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.llm_api_key.get_secret_value()):
            raise ValueError("LLM_API_KEY: may hold only printable ASCII characters without spaces.")
        return self

    @model_validator(mode="after")
    def _check_aliases(self) -> "Settings":
        for alias, model in self.stack_model_aliases.items():
            if model in self.stack_model_aliases:
                raise ValueError(f"STACK_MODEL_ALIASES: '{alias}' points at '{model}', which is an alias itself.")
            if alias == self.llm_model:
                raise ValueError(f"STACK_MODEL_ALIASES: '{alias}' is the name of the model itself (LLM_MODEL).")
        return self


def _read_keys(given: tuple[SecretStr, ...], file: Path, name: str) -> tuple[str, ...]:
    listed = [key.get_secret_value() for key in given]
    text = _read_secret(file, f"{name}_FILE")
    listed += [key for line in text.splitlines() if not line.lstrip().startswith("#") for key in _split(line)]
    if not all(re.fullmatch(r"[\x21-\x7e]+", key) for key in listed):
        raise ValueError(f"{name}: a key may hold only printable ASCII characters without spaces.")
    return tuple(dict.fromkeys(listed))


def _read_secret(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise ValueError(
            f"{name}: {path} can't be read ({reason}). "
            "In its container the gateway runs as uid 10001, which must be allowed to read the file."
        ) from None


def load() -> Settings:
    """Read and check the environment. Raises SettingsError with a sentence per mistake, never a secret's value."""
    try:
        return Settings()
    except ValidationError as exc:
        errors = [error for error in exc.errors(include_input=False) if error["type"] != "default_factory_not_called"]
        raise SettingsError("\n".join(map(_sentence, errors))) from None


def _sentence(error: Any) -> str:
    name = str(error["loc"][0]).upper() + ": " if error["loc"] else ""
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}{message}"
