"""Config: describe the engines and the models that use them, from stack.yaml or from the environment.

A single engine needs no file: `from_settings` makes the same Config of LLM_* and STACK_MODEL_ALIASES.
config/stack.example.yaml shows every field, and a test proves that it is complete.
"""

import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from gateway import addresses, files, yaml_file
from gateway.dialects import DIALECTS
from gateway.settings import (
    ENGINE_KEY,
    BaseUrl,
    EngineName,
    ModelName,
    Resumes,
    Seconds,
    Settings,
    SettingsError,
    Slots,
    Tokens,
    Wait,
)

FIRST = "engine"  # the one engine of the settings
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # safe in headers, logs and metrics


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Engine(_Strict):
    """One engine: a base URL and how it behaves."""

    dialect: EngineName
    base_url: BaseUrl
    slots: Slots = None
    # The context window with which the engine was started; told to callers if the engine does not report it itself
    context: Tokens = None
    gpu: Name | None = None  # engines with the same one take turns: one is awake, and the others sleep
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
        for name, engine in self.engines.items():
            if engine.gpu is not None and DIALECTS[engine.dialect].sleeper is None:
                raise ValueError(f"engines.{name}: 'gpu' is for engines that can sleep, and {engine.dialect} cannot")
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
    """Return the Config in force: from stack.yaml if the path in STACK_CONFIG exists, otherwise from the environment
    and the models.yaml of `make up`, if there is one.

    Raises SettingsError with file, line and reason for each mistake.
    """
    path = settings.stack_config
    if _exists(path, "Put a stack.yaml there, or remove it."):
        return _from_file(path)
    listed = models_file(settings)
    if not _exists(listed, "Remove it, and run 'make up'."):
        return from_settings(settings)
    models = _listed(listed)
    try:
        return from_settings(settings, models)
    except ValidationError as exc:
        reasons = "; ".join(it["msg"].removeprefix("Value error, ") for it in exc.errors())
        raise SettingsError(f"{listed}: {reasons}. Run 'make up', which writes this file.") from None


def models_file(settings: Settings) -> Path:
    """Return the path of the file in which `make up` lists the models of LLM_MODELS, beside stack.yaml."""
    return settings.stack_config.with_name("models.yaml")


def names_no_models(settings: Settings) -> bool:
    """Return whether no file names the models. All models of the one engine may then be used."""
    return not settings.stack_config.is_file() and not models_file(settings).is_file()


def _exists(path: Path, cure: str) -> bool:
    """Return whether there is such a file. Raises SettingsError if it cannot be known, or, with the cure, if it is
    something else."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as exc:  # the file may exist behind an unreadable directory, so the settings alone would be a guess
        raise SettingsError(yaml_file.unreadable(path, exc)) from None
    if not stat.S_ISREG(
        mode
    ):  # a directory, which Docker makes for a missing mount, or a pipe, which would be read for ever
        raise SettingsError(f"{path} is not a file. {cure}")
    return True


class Listed(_Strict):
    """A model of LLM_MODELS, on the engine's service with this name. `gpu`: see Engine."""

    model: ModelName
    engine: Name = FIRST
    gpu: Name | None = None


class _List(_Strict):
    models: Annotated[tuple[Listed, ...], Field(min_length=1, max_length=32)]


def from_settings(settings: Settings, listed: Sequence[Listed] = ()) -> Config:
    """Return a Config with the models of LLM_MODELS, the first of which is the default, or with LLM_MODEL alone, and
    the aliases of STACK_MODEL_ALIASES. All engines are of one kind. Raises SettingsError."""
    first = Engine(
        dialect=settings.llm_backend,
        base_url=settings.llm_base_url,
        api_key=settings.llm_api_key,
        slots=settings.llm_slots,
        context=settings.llm_context,
    )
    on = {it.model: it.engine for it in listed} or {settings.llm_model: FIRST}
    default, aliases = next(iter(on)), settings.stack_model_aliases
    if own := [alias for alias in aliases if alias in on]:
        raise SettingsError(f"STACK_MODEL_ALIASES: '{own[0]}' is the name of the model itself (LLM_MODEL).")
    models = {
        name: Model(
            targets=(Target(engine=on.get(name, FIRST), model=name),),
            aliases=tuple(alias for alias, target in aliases.items() if target == name),
        )
        for name in dict.fromkeys((*on, *aliases.values()))
    }
    gpus = {it.engine: it.gpu for it in listed}
    engines = {
        name: _beside(first, name).model_copy(update={"gpu": gpus.get(name)})
        for name in dict.fromkeys((FIRST, *on.values()))
    }
    return Config(engines=engines, models=models, default_model=default)


def _beside(first: Engine, name: str) -> Engine:
    """Return the engine of another service: as the first, with its own name as the host. Its context may be another."""
    if name == FIRST:
        return first
    return first.model_copy(update={"base_url": addresses.with_host(first.base_url, name), "context": None})


def _listed(path: Path) -> tuple[Listed, ...]:
    """Return the models of the file. Raises SettingsError."""
    tree, raw = yaml_file.read(path)
    try:
        return _List.model_validate(raw).models
    except ValidationError as exc:
        raise yaml_file.sentences(path, tree, exc) from None


def _from_file(path: Path) -> Config:
    tree, raw = yaml_file.read(path)
    try:
        return _with_keys(path, tree, Config.model_validate(raw))
    except ValidationError as exc:
        raise yaml_file.sentences(path, tree, exc) from None


def _with_keys(path: Path, tree: yaml.Node | None, config: Config) -> Config:
    """Read each engine's key from its file."""
    engines = {}
    for name, engine in config.engines.items():
        where = f"{path}:{yaml_file.line(tree, ('engines', name, 'api_key'))}: engines.{name}.api_key"
        if engine.api_key is not None:
            raise SettingsError(f"{where}: a key must not be in this file; use api_key_file")
        if engine.api_key_file is not None:
            where = f"{path}:{yaml_file.line(tree, ('engines', name, 'api_key_file'))}: engines.{name}.api_key_file"
            try:
                key = SecretStr(files.read(engine.api_key_file, yaml_file.MAX_FILE).strip().decode("latin-1"))
            except (OSError, ValueError) as exc:  # ValueError: no file can have this path
                raise SettingsError(f"{where}: the file cannot be read: {_reason(exc)}") from None
            if not re.fullmatch(ENGINE_KEY, key.get_secret_value()):
                raise SettingsError(
                    f"{where}: {engine.api_key_file} must have one line, the key, which may have only printable ASCII "
                    "characters without spaces"
                )
            engine = engine.model_copy(update={"api_key": key})  # noqa: PLW2901
        engines[name] = engine
    return config.model_copy(update={"engines": engines})


def _reason(exc: OSError | ValueError) -> str:
    return str(exc.strerror or exc) if isinstance(exc, OSError) else str(exc)
