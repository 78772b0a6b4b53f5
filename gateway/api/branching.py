"""Branching: count the ways in which the rules of a grammar, or of a JSON schema, can begin.

An engine follows all of them before each token. With 20 short rules, each of which is three times the next, there are
3^20 ways, and the engine answers no other request while it follows them. All functions are pure.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

from gateway.caller_schemas import in_place, references, target

_WRAPPERS = 4  # schemas that are looked at for what a reference is relative to: a tool's is in two
MOST = 10_000  # ways in which one rule may begin; 59,049 took llama.cpp 0.1 s for each token, a grammar of JSON has 13

# A rule's name with its sign, a reference, an operator, or a text (in quotes, in brackets, a token in angle brackets,
# any character).
_TOKENS = re.compile(
    r"(?P<rule>[\w-]+)[ \t\r\n]*(?:::=|:)|(?P<name>[\w-]+)|(?P<sign>[|()?*+]|\{[^}]*\}?)|#[^\n]*|\s+"
    r'|(?P<text>"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?|<[^>\s]*>?|\\.|.)',
    re.DOTALL,
)
# The number of texts, and the rules, with which each rule begins
_Rules = Mapping[Hashable, tuple[int, Iterable[Hashable]]]


def of_grammar(text: str) -> int:
    """Return the largest number of ways in which a rule of the grammar can begin."""
    texts: Counter[str] = Counter()
    rules: dict[str, list[str]] = {}
    rule, begins, before = "", True, True  # whether the rule can still begin here, and could before the last part
    groups: list[bool] = []
    for token in _TOKENS.finditer(text):
        kind, value = token.lastgroup, token[0]
        if kind == "rule":
            rule, begins, groups = token["rule"], True, []
        elif value == "|":
            begins = groups[-1] if groups else True
        elif value == "(":
            groups.append(begins)
        elif value == ")":  # a group may be empty
            begins = before = groups.pop() if groups else begins
        elif kind == "sign":
            begins = begins or (before and value != "+")
        elif kind == "name":  # a rule may be empty, too
            before = begins
            if begins:
                rules.setdefault(rule, []).append(value)
        elif kind == "text":
            before, begins = begins, False
            texts[rule] += before
    return _most({name: (texts[name], rules.get(name, ())) for name in {*texts, *rules}})


def of_schema(schema: Any) -> int:
    """Return the largest number of ways in which a value of the schema, or of one within it, can begin. The schema may
    be in a wrapper. More than MOST if one of them begins with itself, because its number has no bound."""
    pointed = pointing(schema)
    rules: dict[Hashable, tuple[int, Iterable[Hashable]]] = {}
    level: list[Any] = [schema] if isinstance(schema, dict | list) else []
    while level:
        for node in level:
            if isinstance(node, dict):
                parts = [*in_place(node), *map(pointed, references(node))]
                choices = [id(it) for it in parts if isinstance(it, dict)]
                kinds = node.get("type")
                own = len(kinds) if isinstance(kinds, list) else 1
                rules[id(node)] = (0 if choices else max(1, own), choices)
        level = [it for node in level for it in (node.values() if isinstance(node, dict) else node)]
        level = [it for it in level if isinstance(it, dict | list)]
    return _most(rules, endless=MOST + 1)


def pointing(schema: Any) -> Callable[[str], Any]:
    """Return what finds the schema to which a reference in this one points; None if there is none. The schema may be in
    a wrapper."""
    roots = list(islice(_roots(schema), _WRAPPERS))

    @cache
    def pointed(reference: str) -> Any:
        return next((found for it in roots if isinstance(found := target(it, reference), dict)), None)

    return pointed


def _most(rules: _Rules, endless: int = 0) -> int:
    """Return the largest sum, starting from the rules that refer to no other; at least `endless` if a rule begins with
    itself. In a grammar such a rule has no number, because engines refuse it."""
    waiting = {name: sum(it in rules for it in others) for name, (_, others) in rules.items()}
    users: dict[Hashable, list[Hashable]] = {}
    for name, (_, others) in rules.items():
        for other in others:
            users.setdefault(other, []).append(name)
    ways = {name: own for name, (own, _) in rules.items()}
    ready = [name for name, count in waiting.items() if count == 0]
    while ready:
        name = ready.pop()
        if ways[name] > MOST:
            return ways[name]
        for user in users.get(name, ()):
            ways[user] += ways[name]
            waiting[user] -= 1
            if waiting[user] == 0:
                ready.append(user)
    return max([*ways.values(), endless if any(waiting.values()) else 0])


def _roots(schema: Any) -> Iterator[Any]:
    """Yield what a reference may be relative to: the schema, or the schema that a response format or a tool wraps."""
    yield schema
    for outer in ("schema", "json_schema", "function", "parameters"):
        if isinstance(schema, dict) and isinstance(schema.get(outer), dict):
            yield from _roots(schema[outer])
