"""Config: which engines there are and which models lead to them; from stack.yaml, or from the environment alone.

The simple case, one engine, needs no file: `from_settings` makes the same Config of LLM_* and STACK_MODEL_ALIASES.
config/stack.example.yaml shows every field, and a test proves it complete.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from gateway.settings import BaseUrl, Resumes, Seconds, Settings, SettingsError, Slots, Wait

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # safe in headers, logs and metrics
ModelName = Annotated[str, Field(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Engine(_Strict):
    """One engine: a base URL and how it behaves."""

    dialect: Literal["ollama", "vllm", "llamacpp"]
    base_url: BaseUrl
    slots: Slots = None
    api_key_file: Path | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True)  # from LLM_API_KEY or api_key_file, never from YAML


class Target(_Strict):
    """A model on an engine, by the engine's own name for it."""

    engine: Name
    model: ModelName


class Timeouts(_Strict):
    """Seconds. What is left out is as in LLM_*_TIMEOUT."""

    connect: Seconds | None = None
    first_token: Seconds | None = None
    idle: Seconds | None = None
    total: Seconds | None = None


class Resume(_Strict):
    """How an answer goes on whose engine failed. What is left out is as in STACK_RESUME and STACK_RESUME_WAIT."""

    most: Resumes | None = None
    wait: Wait | None = None
    across_models: bool = False


class Arm(_Strict):
    """One side of a split."""

    name: Name
    weight: Annotated[int, Field(ge=1, le=1_000_000)]
    model: ModelName


class Split(_Strict):
    """Shares a model's requests out among other models."""

    arms: Annotated[tuple[Arm, ...], Field(min_length=2)]
    sticky: Annotated[str, Field(pattern=r"^(key|request|header:[A-Za-z0-9-]+)$")] = "key"


class Model(_Strict):
    """A name that callers use, and where it leads: replicas first, then the fallbacks in their order; or a split."""

    targets: tuple[Target, ...] = ()
    fallbacks: tuple[Target, ...] = ()
    split: Split | None = None
    aliases: tuple[ModelName, ...] = ()
    timeouts: Timeouts = Timeouts()
    resume: Resume = Resume()


class Retries(_Strict):
    """How often a request may be tried in all, and which share of the live traffic retries may add."""

    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    budget: Annotated[float, Field(ge=0, le=1)] = 0.2
    backoff: Annotated[float, Field(ge=0, le=60)] = 0.1
    backoff_max: Annotated[float, Field(ge=0, le=60)] = 2.0


class Breaker(_Strict):
    """After so many failures in a row an engine is left alone for so long (seconds); probes look after it meanwhile."""

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
            raise ValueError(f"models.{name}: give either targets or a split")
        if model.split and model.fallbacks:
            raise ValueError(f"models.{name}: a split has no fallbacks of its own; its arms' models have them")
        for target in (*model.targets, *model.fallbacks):
            if target.engine not in self.engines:
                raise ValueError(f"models.{name}: there is no engine '{target.engine}'")
        arms = model.split.arms if model.split else ()
        for arm in arms:
            if arm.model not in self.models or self.models[arm.model].split:
                raise ValueError(f"models.{name}: the arm '{arm.name}' must lead to a model with targets")
        if len({arm.name for arm in arms}) < len(arms):
            raise ValueError(f"models.{name}: two arms have the same name")


def load(settings: Settings) -> Config:
    """The Config in force: stack.yaml's where STACK_CONFIG names something that exists, else the environment's.

    Raises SettingsError with file, line and reason for each mistake.
    """
    if settings.stack_config.exists():  # a directory, as Docker makes for a mount that isn't there, is refused
        return _from_file(settings.stack_config)
    return from_settings(settings)


def from_settings(settings: Settings) -> Config:
    """One engine, its model, and the aliases of STACK_MODEL_ALIASES."""
    engine = Engine(
        dialect=settings.llm_backend,
        base_url=settings.llm_base_url,
        api_key=settings.llm_api_key,
        slots=settings.llm_slots,
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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path}: can't be read: {exc}") from None
    tree, raw = _parse(path, text)
    try:
        return _with_keys(path, tree, Config.model_validate(raw))
    except ValidationError as exc:
        raise SettingsError("\n".join(_sentence(path, tree, error) for error in exc.errors())) from None


def _parse(path: Path, text: str) -> tuple[yaml.Node | None, Any]:
    """The file as YAML's nodes, which know their lines, and as values."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(path, tree)
        return tree, _Loader(text).get_single_data()
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{where}: not valid YAML: {getattr(exc, 'problem', None) or exc}") from None
    except RecursionError:
        raise SettingsError(f"{path}: an alias stands for what it is part of, or it is nested too deep") from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Says where a value stands that can't be what it looks like, such as the date 2026-13-01."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"this is no {kind}", problem_mark=node.start_mark) from None


def _with_keys(path: Path, tree: yaml.Node | None, config: Config) -> Config:
    """Read each engine's key from its file."""
    engines = {}
    for name, engine in config.engines.items():
        where = f"{path}:{_line(tree, ('engines', name, 'api_key'))}: engines.{name}.api_key"
        if engine.api_key is not None:
            raise SettingsError(f"{where}: keys don't belong into this file; use api_key_file")
        if engine.api_key_file is not None:
            where = f"{path}:{_line(tree, ('engines', name, 'api_key_file'))}: engines.{name}.api_key_file"
            try:
                key = SecretStr(engine.api_key_file.read_text(encoding="utf-8").strip())
            except (OSError, UnicodeDecodeError) as exc:
                raise SettingsError(f"{where}: can't be read: {exc}") from None
            engine = engine.model_copy(update={"api_key": key})  # noqa: PLW2901
        engines[name] = engine
    return config.model_copy(update={"engines": engines})


def _sentence(path: Path, tree: yaml.Node | None, error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    location = error["loc"]
    if not location:  # one of Config's own checks: its message begins with the place
        location = tuple(message.partition(":")[0].split(".", 1))
        return f"{path}:{_line(tree, location)}: {message}"
    return f"{path}:{_line(tree, location)}: {'.'.join(map(str, location))}: {message}"


def _line(node: yaml.Node | None, location: tuple[Any, ...]) -> int:
    """The line of the deepest part of `location` that is there."""
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
    """YAML says a name must be unique; PyYAML takes the last one in silence."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise SettingsError(f"{path}:{key.start_mark.line + 1}: a name can't be a list or an object")
            if key.value in seen:
                raise SettingsError(f"{path}:{key.start_mark.line + 1}: '{key.value}' is given twice")
            seen.add(key.value)
            _refuse_duplicates(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(path, value)
