"""Config: describe the engines and the models that use them, from stack.yaml or from the environment.

A single engine needs no file: `from_settings` makes the same Config of LLM_* and STACK_MODEL_ALIASES.
config/stack.example.yaml shows every field, and a test proves that it is complete.
"""

import stat
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from gateway import files
from gateway.settings import BaseUrl, EngineName, Resumes, Seconds, Settings, SettingsError, Slots, Tokens, Wait

MAX_FILE = 4 * 1024 * 1024  # bytes of stack.yaml, or of a key's file
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # safe in headers, logs and metrics
ModelName = Annotated[str, Field(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Engine(_Strict):
    """One engine: a base URL and how it behaves."""

    dialect: EngineName
    base_url: BaseUrl
    slots: Slots = None
    # The context window with which the engine was started; told to callers if the engine does not report it itself
    context: Tokens = None
    api_key_file: Path | None = None
    # From LLM_API_KEY or api_key_file, never from stack.yaml
    api_key: SecretStr | None = Field(default=None, exclude=True)


class Target(_Strict):
    """A model on an engine, by the engine's own name for it."""

    engine: Name
    model: ModelName


class Timeouts(_Strict):
    """Durations in seconds. A missing one comes from LLM_*_TIMEOUT."""

    connect: Seconds | None = None
    first_token: Seconds | None = None
    idle: Seconds | None = None
    total: Seconds | None = None


class Resume(_Strict):
    """How an answer continues after its engine has failed. A missing value comes from STACK_RESUME or
    STACK_RESUME_WAIT."""

    most: Resumes | None = None
    wait: Wait | None = None
    across_models: bool = False


class Arm(_Strict):
    """One share of a split."""

    name: Name
    weight: Annotated[int, Field(ge=1, le=1_000_000)]
    model: ModelName


class Split(_Strict):
    """Share the requests of a model between other models."""

    arms: Annotated[tuple[Arm, ...], Field(min_length=2)]
    sticky: Annotated[str, Field(pattern=r"^(key|request|header:[A-Za-z0-9-]+)$")] = "key"


class Model(_Strict):
    """A name that callers use, and its targets: replicas first, then the fallbacks in their order, or a split."""

    targets: tuple[Target, ...] = ()
    fallbacks: tuple[Target, ...] = ()
    split: Split | None = None
    aliases: tuple[ModelName, ...] = ()
    timeouts: Timeouts = Timeouts()
    resume: Resume = Resume()


class Retries(_Strict):
    """How often one request may be tried in total, and the share of the live traffic that retries may add."""

    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    budget: Annotated[float, Field(ge=0, le=1)] = 0.2
    backoff: Annotated[float, Field(ge=0, le=60)] = 0.1
    backoff_max: Annotated[float, Field(ge=0, le=60)] = 2.0


class Breaker(_Strict):
    """After how many consecutive failures an engine gets no requests, and for how long (seconds). Meanwhile probes
    check it.
    """

    failures: Annotated[int, Field(ge=1, le=1000)] = 5
    open_for: Seconds = 5.0
    probe_every: Seconds = 5.0


class Config(_Strict):
    """Everything about engines and models."""

    engines: Annotated[dict[Name, Engine], Field(min_length=1, max_length=32)]
    models: Annotated[dict[ModelName, Model], Field(min_length=1)]
    default_model: ModelName
    retries: Retries = Retries()
    breaker: Breaker = Breaker()

    @model_validator(mode="after")
    def _check(self) -> Self:
        names: dict[str, str] = {}
        for name, model in self.models.items():
            for used in (name, *model.aliases):
                if used in names:
                    raise ValueError(f"models: the name '{used}' is used twice, by '{names[used]}' and '{name}'")
                names[used] = name
            self._check_model(name, model)
        if self.default_model not in names:
            raise ValueError(f"default_model: there is no model or alias '{self.default_model}'")
        return self

    def _check_model(self, name: str, model: Model) -> None:
        if bool(model.targets) == bool(model.split):
            raise ValueError(f"models.{name}: it must have either targets or a split")
        if model.split and model.fallbacks:
            raise ValueError(f"models.{name}: a split cannot have fallbacks; give them to the models of its arms")
        for target in (*model.targets, *model.fallbacks):
            if target.engine not in self.engines:
                raise ValueError(f"models.{name}: there is no engine '{target.engine}'")
        arms = model.split.arms if model.split else ()
        for arm in arms:
            if arm.model not in self.models or self.models[arm.model].split:
                raise ValueError(f"models.{name}: the arm '{arm.name}' must name a model that has targets")
        if len({arm.name for arm in arms}) < len(arms):
            raise ValueError(f"models.{name}: two arms have the same name")


def load(settings: Settings) -> Config:
    """Return the Config in force: from stack.yaml if the path in STACK_CONFIG exists, otherwise from the environment.

    Raises SettingsError with file, line and reason for each mistake.
    """
    path = settings.stack_config
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return from_settings(settings)
    except OSError as exc:  # the file may exist behind an unreadable directory, so the settings alone would be a guess
        raise SettingsError(_unreadable(path, exc)) from None
    if not stat.S_ISREG(
        mode
    ):  # a directory, which Docker makes for a missing mount, or a pipe, which would be read for ever
        raise SettingsError(f"{path} is not a file. Put a stack.yaml there, or remove it.")
    return _from_file(path)


def from_settings(settings: Settings) -> Config:
    """Return a Config with one engine, its model, and the aliases of STACK_MODEL_ALIASES."""
    engine = Engine(
        dialect=settings.llm_backend,
        base_url=settings.llm_base_url,
        api_key=settings.llm_api_key,
        slots=settings.llm_slots,
        context=settings.llm_context,
    )
    aliases = settings.stack_model_aliases
    models = {
        name: Model(
            targets=(Target(engine="engine", model=name),),
            aliases=tuple(alias for alias, target in aliases.items() if target == name),
        )
        for name in dict.fromkeys((settings.llm_model, *aliases.values()))
    }
    return Config(engines={"engine": engine}, models=models, default_model=settings.llm_model)


def _from_file(path: Path) -> Config:
    try:
        text = files.read(path, MAX_FILE).decode()
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(_unreadable(path, exc)) from None
    tree, raw = _parse(path, text)
    try:
        return _with_keys(path, tree, Config.model_validate(raw))
    except ValidationError as exc:
        raise SettingsError("\n".join(_sentence(path, tree, error) for error in exc.errors())) from None


def _unreadable(path: Path, reason: OSError | UnicodeDecodeError) -> str:
    if not isinstance(reason, OSError):
        return f"{path} cannot be read: it is not UTF-8 text."
    return (
        f"{path} cannot be read ({reason.strerror}). In its container the gateway runs as uid 10001, which must be "
        "allowed to read it: on the machine, 'chmod a+rX' the file and its directory (./config, or STACK_CONFIG_DIR)."
    )


def _parse(path: Path, text: str) -> tuple[yaml.Node | None, Any]:
    """Read the file as YAML nodes, which have line numbers, and as values."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(path, tree)
        return tree, _Loader(text).get_single_data()
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{where}: not valid YAML: {getattr(exc, 'problem', None) or exc}") from None
    except RecursionError:
        raise SettingsError(f"{path}: it has an alias (*name) inside its own anchor, or is nested too deeply") from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Report the line of a value that looks like a date but is not one, such as 2026-13-01."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"the value is not a {kind}", problem_mark=node.start_mark) from None


def _with_keys(path: Path, tree: yaml.Node | None, config: Config) -> Config:
    """Read each engine's key from its file."""
    engines = {}
    for name, engine in config.engines.items():
        where = f"{path}:{_line(tree, ('engines', name, 'api_key'))}: engines.{name}.api_key"
        if engine.api_key is not None:
            raise SettingsError(f"{where}: a key must not be in this file; use api_key_file")
        if engine.api_key_file is not None:
            where = f"{path}:{_line(tree, ('engines', name, 'api_key_file'))}: engines.{name}.api_key_file"
            try:
                key = SecretStr(files.read(engine.api_key_file, MAX_FILE).decode().strip())
            except (OSError, UnicodeDecodeError) as exc:
                raise SettingsError(f"{where}: the file cannot be read: {_reason(exc)}") from None
            engine = engine.model_copy(update={"api_key": key})  # noqa: PLW2901
        engines[name] = engine
    return config.model_copy(update={"engines": engines})


def _reason(exc: OSError | UnicodeDecodeError) -> str:
    return str(exc.strerror or exc) if isinstance(exc, OSError) else str(exc)


def _sentence(path: Path, tree: yaml.Node | None, error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    location = error["loc"]
    if not location:  # a check of Config itself, whose message begins with the place
        location = tuple(message.partition(":")[0].split(".", 1))
        return f"{path}:{_line(tree, location)}: {message}"
    return f"{path}:{_line(tree, location)}: {'.'.join(map(str, location))}: {message}"


def _line(node: yaml.Node | None, location: tuple[Any, ...]) -> int:
    """Return the line of the deepest part of `location` that exists."""
    line = node.start_mark.line + 1 if node else 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            key, node = found[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _refuse_duplicates(path: Path, node: yaml.Node | None) -> None:
    """Refuse a name that appears twice in a mapping. YAML forbids it, and PyYAML silently takes the last one."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise SettingsError(f"{path}:{key.start_mark.line + 1}: a name cannot be a list or an object")
            if key.value in seen:
                raise SettingsError(f"{path}:{key.start_mark.line + 1}: '{key.value}' appears twice")
            seen.add(key.value)
            _refuse_duplicates(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(path, value)
