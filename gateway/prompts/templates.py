"""Templates: a language with Jinja2's syntax in which no template takes long or produces much.

Jinja2's sandbox protects the interpreter, and not its memory and time: `"x".ljust(10**9)` is a gigabyte, and three
loops take an hour. A template may therefore contain only what `language` knows to be bounded. Everything else is
refused when the template is set, with its name and line.
"""

import functools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes

from gateway.prompts.language import AS_THEY_ARE, LANGUAGE, MAX_LENGTH, METHODS, OWN_FILTERS, Budget

MAX_DEPTH = 60  # levels of a template's tree

_NODES: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.With),
    *(nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.CondExpr),
    *(nodes.Filter, nodes.Test, nodes.Call, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
    *(nodes.Concat, nodes.Add, nodes.Sub, nodes.Div, nodes.FloorDiv, nodes.Neg, nodes.Pos),
)
_NAMES: dict[type[nodes.Node], str] = {nodes.Mul: "*", nodes.Pow: "**", nodes.Mod: "%"}


class RefusedError(ValueError):
    """Say where and why a template cannot be used."""


class FailedError(Exception):
    """Say why a template cannot be rendered with these values."""


def check(template: str, variables: Iterable[str]) -> None:
    """Check that a text can be a template with these variables. Raises RefusedError."""
    if not template.strip():
        raise RefusedError("The template is empty.")
    if "\0" in template:  # PostgreSQL cannot store it
        raise RefusedError("The template has a NUL character. Remove it.")
    if len(template) > MAX_LENGTH:
        raise RefusedError(f"The template is longer than {MAX_LENGTH} characters.")
    try:
        unknown = meta.find_undeclared_variables(_parsed(template)) - set(variables)
    except TemplateSyntaxError as exc:
        raise RefusedError(f"Line {exc.lineno}: {exc.message}") from None
    except (RecursionError, MemoryError, ValueError) as exc:
        raise RefusedError("The template is nested too deeply, or has an invalid number.") from exc
    if unknown:
        raise RefusedError(f"There is no variable '{min(unknown)}'. Possible variables: {', '.join(variables)}.")


def prepare(template: str) -> None:
    """Compile a template for `render`, which takes longer than rendering it. A template that cannot be compiled is left
    alone."""
    with suppress(TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, TypeError, AttributeError):
        _compiled(template)


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return the rendered text, of at most MAX_LENGTH characters. Raises FailedError."""
    try:
        parts, size = [], 0
        for part in _compiled(template).generate({**values, "_budget": Budget()}):
            parts.append(part)
            size += len(part)
            if size > MAX_LENGTH:
                raise FailedError(f"The rendered text is longer than {MAX_LENGTH} characters.")
        return "".join(parts)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as exc:
        raise FailedError(f"{exc}") from exc
    except (SyntaxError, RecursionError, MemoryError) as exc:
        raise FailedError("The template is nested too deeply.") from exc


@functools.lru_cache(maxsize=256)
def _compiled(template: str) -> Any:
    return LANGUAGE.from_string(_parsed(template))


def _parsed(template: str) -> nodes.Template:
    """Return the syntax tree, with counting filters in place of everything that could grow. Raises TemplateSyntaxError
    for a construct that is not allowed."""
    tree = LANGUAGE.parse(template)
    _refuse(tree)
    counted: nodes.Template = _counted(tree)
    return counted


def _refuse(tree: nodes.Node) -> None:
    level: list[nodes.Node] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in node.iter_child_nodes()]
        for node in level:
            if why := _trouble(node):
                raise TemplateSyntaxError(why, node.lineno)
        if not level:
            return
    raise TemplateSyntaxError("the template is nested too deeply", 1)


def _trouble(node: nodes.Node) -> str:
    """Return what is wrong with a node, or an empty string."""
    match node:
        case nodes.For(recursive=True):
            return "a loop cannot call itself"
        case nodes.Name(name=name) | nodes.Getattr(attr=name) if name.startswith("_"):
            return f"'{name}' is not allowed: no name may begin with an underscore"
        case nodes.Filter(name=name) if name not in AS_THEY_ARE and name not in OWN_FILTERS:
            return f"the filter '{name}' cannot be used here"
        case nodes.Call(kwargs=named, dyn_args=several, dyn_kwargs=more) if named or several or more:
            return "the arguments of a method cannot have names, and cannot be unpacked with * or **"
        case nodes.Call(node=nodes.Name(name="range")) | nodes.Call(node=nodes.Getattr()):
            return _method_trouble(node.node)
        case nodes.Call():
            return "only methods of texts and labels, and range(), can be called"
        case nodes.Filter(dyn_args=several, dyn_kwargs=more) if several or more:
            return "the arguments of a filter cannot be unpacked with * or **"
    if not isinstance(node, (*_NODES, nodes.Keyword)):
        name = _NAMES.get(type(node), type(node).__name__.lower())
        return f"'{name}' cannot be used here"
    return ""


def _method_trouble(called: nodes.Node) -> str:
    if isinstance(called, nodes.Getattr) and not any(called.attr in names for names in METHODS.values()):
        return f"the method '{called.attr}()' cannot be used here"
    return ""


def _counted(node: Any) -> Any:
    """Return the tree with counting filters in it."""
    steps = sum(1 for _ in node.find_all(nodes.Node)) if isinstance(node, nodes.For) else 0
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_counted(it) if isinstance(it, nodes.Node) else it for it in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _counted(value))
    match node:
        case nodes.For():
            node.iter = _filter(node, node.iter, "_each", nodes.Const(steps))
        case nodes.Call(node=nodes.Getattr(node=value, attr=name)):
            return _filter(node, value, "_call", nodes.Const(name), *node.args)
        case nodes.Call():
            return _filter(node, nodes.Const(None), "_range", *node.args)
        case nodes.Concat():
            return _filter(node, nodes.List(node.nodes), "_concat")
        case nodes.List() | nodes.Tuple(ctx="load"):
            return _filter(node, nodes.List(node.items), "_flat")
    return node


def _filter(at: nodes.Node, value: nodes.Node, name: str, *args: nodes.Node) -> nodes.Node:
    made = nodes.Filter(value, name, list(args), [], None, None).set_lineno(at.lineno, override=True)
    return made.set_environment(LANGUAGE)
