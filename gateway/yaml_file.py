"""YAML file: read a file of the operator's, and report each mistake in it with its line."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gateway import files
from gateway.settings import SettingsError

MAX_FILE = 4 * 1024 * 1024  # bytes


def read(path: Path) -> tuple[yaml.Node | None, Any]:
    """Return the file as YAML nodes, which have line numbers, and as values. Raises SettingsError."""
    try:
        text = files.read(path, MAX_FILE).decode()
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(unreadable(path, exc)) from None
    return _parse(path, text)


def sentences(path: Path, tree: yaml.Node | None, mistakes: ValidationError) -> SettingsError:
    """Return a sentence with file, line and reason for each mistake."""
    return SettingsError("\n".join(_sentence(path, tree, error) for error in mistakes.errors()))


def unreadable(path: Path, reason: OSError | UnicodeDecodeError) -> str:
    if not isinstance(reason, OSError):
        return f"{path} cannot be read: it is not UTF-8 text."
    return (
        f"{path} cannot be read ({reason.strerror}). In its container the gateway runs as uid 10001, which must be "
        "allowed to read it: on the machine, 'chmod a+rX' the file and its directory (./config, or STACK_CONFIG_DIR). "
        "If SELinux is on there, also 'chcon -t container_file_t' both."
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


def _sentence(path: Path, tree: yaml.Node | None, error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    location = error["loc"]
    if not location:  # a check of Config itself, whose message begins with the place
        location = tuple(message.partition(":")[0].split(".", 1))
        return f"{path}:{line(tree, location)}: {message}"
    return f"{path}:{line(tree, location)}: {'.'.join(map(str, location))}: {message}"


def line(node: yaml.Node | None, location: tuple[Any, ...]) -> int:
    """Return the line of the deepest part of `location` that exists."""
    found_at = node.start_mark.line + 1 if node else 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            key, node = found[0]
            found_at = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            found_at = node.start_mark.line + 1
        else:
            break
    return found_at


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
