"""Language: the texts, lists, filters and methods of templates, each with its bound. `templates` checks what uses them.

Each text and list has at most MAX_LENGTH characters and items. Each step is counted, and a rendering has at most STEPS.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import StrictUndefined, Undefined, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LENGTH = 64 * 1024  # characters of a template, of what it comes to, and of any text or list in it
MAX_ARGUMENT = 1000  # characters of a text that a method or filter is given
MAX_RANGE = 1000
STEPS = 20_000  # nodes that are evaluated, and 256 characters that are handled, are a step each
CHUNK = 256

# What only reads its text or list, or gives no more than that. Those in OWN_FILTERS are made anew below.
AS_THEY_ARE = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length"),
    *("list", "lower", "max", "min", "reverse", "sort", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)
METHODS: dict[type, tuple[str, ...]] = {
    str: (
        *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower"),
        *("isspace", "isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rpartition"),
        *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
        *("join", "replace"),
    ),
    dict: ("get", "items", "keys", "values"),
}
_Scalar = str | int | float | bool | None


class Budget:
    """The steps that one rendering has left."""

    def __init__(self) -> None:
        self._left = STEPS

    def charge(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise SecurityError(f"the template takes more than {STEPS} steps")

    def handled(self, value: Any) -> Any:
        """Return the value and charge for its size. Raises SecurityError if it is too large."""
        size = len(value) if isinstance(value, str) else 0
        if isinstance(value, list | tuple | dict):
            size = len(value) + sum(len(it) for it in value if isinstance(it, str | tuple))
        if size > MAX_LENGTH:
            raise SecurityError(f"a text or list in the template is longer than {MAX_LENGTH}")
        self.charge(1 + size // CHUNK)
        return value


class _Language(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "/", "//"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, optimized=False, finalize=_scalar)
        self.globals.clear()
        plain = {name: _bounded(FILTERS[name]) for name in AS_THEY_ARE}
        self.filters = {**plain, **OWN_FILTERS, **_INNER}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget: Budget = context["_budget"]
        if isinstance(left, str | list) and isinstance(right, str | list) and len(left) + len(right) > MAX_LENGTH:
            raise SecurityError(f"a text or list in the template is longer than {MAX_LENGTH}")
        return budget.handled(_BINARY[operator](left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up a label before a method: a label may have the name of a method of dictionaries."""
        return obj[attribute] if isinstance(obj, dict) else super().getattr(obj, attribute)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "/": operator.truediv,
    "//": operator.floordiv,
}


def _scalar(value: Any) -> Any:
    """Return a value that can be written or joined. Raises SecurityError for a list, whose size is not known."""
    if isinstance(value, Undefined):
        return str(value)  # raises UndefinedError, which says what is missing
    if not isinstance(value, _Scalar):
        raise SecurityError("a template can write only text and numbers; use `join` for a list")
    return value


def _text(value: Any) -> str:
    return str(_scalar(value))


def _bounded(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Return one of Jinja2's filters with the counting of steps around it."""
    passed = getattr(filter_, "jinja_pass_arg", None)

    @pass_context
    @functools.wraps(filter_)
    def bounded(context: Context, value: Any, *args: Any, **named: Any) -> Any:
        budget: Budget = context["_budget"]
        budget.handled(value)
        for it in (*args, *named.values()):
            _argument(it)
        first: list[Any] = []
        if passed is not None:
            first = [
                {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[passed.name]
            ]
        found = filter_(*first, value, *args, **named)
        return budget.handled(list(found) if isinstance(found, Iterator) else found)

    del bounded.__wrapped__  # Jinja2 would look there for what is passed
    return bounded


def _argument(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_ARGUMENT:
        raise SecurityError(f"an argument of a method or filter has more than {MAX_ARGUMENT} characters")
    return value


@pass_context
def _join(context: Context, values: Any, between: str = "") -> str:
    budget: Budget = context["_budget"]
    texts = [_text(it) for it in budget.handled(values)]
    between = _argument(_text(between))
    if sum(map(len, texts)) + len(between) * len(texts) > MAX_LENGTH:
        raise SecurityError(f"a text in the template is longer than {MAX_LENGTH}")
    return str(budget.handled(between.join(texts)))


@pass_context
def _replace(context: Context, value: Any, old: str, new: str, count: int = -1) -> str:
    budget: Budget = context["_budget"]
    text, old, new = budget.handled(_text(value)), _argument(_text(old)), _argument(_text(new))
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    if len(text) + times * (len(new) - len(old)) > MAX_LENGTH:
        raise SecurityError(f"a text in the template is longer than {MAX_LENGTH}")
    return str(budget.handled(text.replace(old, new, times)))


@pass_context
def _string(context: Context, value: Any) -> str:
    budget: Budget = context["_budget"]
    return str(budget.handled(_text(value)))


@pass_context
def _concat(context: Context, values: list[Any]) -> Any:
    return _join(context, values)


@pass_context
def _flat(context: Context, values: list[Any]) -> list[Any]:
    """Return a list in a template. It may hold only texts and numbers, because the size of nested lists is
    not counted."""
    budget: Budget = context["_budget"]
    return list(budget.handled([_scalar(it) for it in values]))


@pass_context
def _call(context: Context, value: Any, name: str, *args: Any) -> Any:
    budget: Budget = context["_budget"]
    kind = next((it for it in METHODS if isinstance(value, it)), None)
    if kind is None or name not in METHODS[kind]:
        raise SecurityError(f"the method '{name}()' cannot be used here")
    if name == "join":
        return _join(context, args[0] if args else (), value)
    if name == "replace":
        return _replace(context, value, *args)
    found = getattr(kind, name)(budget.handled(value), *map(_argument, args))
    return budget.handled(found if isinstance(found, _Scalar) else list(found))


@pass_context
def _range(context: Context, _: None, *args: int) -> list[int]:
    budget: Budget = context["_budget"]
    if len(found := range(*args)) > MAX_RANGE:
        raise SecurityError(f"range() has at most {MAX_RANGE} steps")
    return list(budget.handled(list(found)))


@pass_context
def _each(context: Context, values: Any, steps: int) -> Iterator[Any]:
    """Yield the items of a loop, and charge `steps` for each run of its body."""
    budget: Budget = context["_budget"]
    for it in values:
        budget.charge(steps)
        yield it


OWN_FILTERS: dict[str, Callable[..., Any]] = {"join": _join, "replace": _replace, "string": _string}
_INNER: dict[str, Callable[..., Any]] = {
    "_concat": _concat,
    "_flat": _flat,
    "_call": _call,
    "_range": _range,
    "_each": _each,
}
LANGUAGE = _Language()
