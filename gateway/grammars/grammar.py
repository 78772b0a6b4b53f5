"""Grammar: rules for a text, read from the notation that llama.cpp (GBNF) and vLLM (xgrammar's EBNF) share, and written
in it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_SYMBOLS = 20_000  # in one grammar; a longer one is not read
MOST_RULES = 5_000  # in one grammar; a schema may ask for any number of them


class UnsupportedError(ValueError):
    """Say that a grammar or a schema is not supported here. The message is a clause that gives the reason."""


class Chars(NamedTuple):
    """One character: of these ranges, or of none of them if `negated`."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False

    def has(self, char: str) -> bool:
        """Say whether it is this character."""
        code = ord(char)
        return any(low <= code <= high for low, high in self.ranges) != self.negated


class Ref(NamedTuple):
    """What the rule of this name allows."""

    name: str


class Repeat(NamedTuple):
    """A symbol `least` times or more, `most` times at most; None: as often as wanted."""

    of: "Symbol"
    least: int
    most: int | None


Symbol = Chars | Ref | Repeat
Sequence = tuple[Symbol, ...]
ROOT = "root"
ANY = Chars((), negated=True)


@dataclass
class Grammar:
    """Rules by their names, each a list of alternatives. The text is what the rule `root` allows."""

    rules: dict[str, list[Sequence]] = field(default_factory=dict)

    def add(self, name: str, alternatives: Iterable[Sequence]) -> Ref:
        """Add a rule under a name that is not taken. Returns what stands for it."""
        if len(self.rules) >= MOST_RULES:
            raise UnsupportedError("the grammar has too many rules")
        name = f"{name}-{len(self.rules)}"
        self.rules[name] = list(alternatives)
        return Ref(name)


def literal(text: str) -> Sequence:
    """Return the symbols of this very text."""
    return tuple(Chars(((ord(char), ord(char)),)) for char in text)


def write(grammar: Grammar) -> str:
    """Return a grammar's text, with those rules that its root needs. The names are new ones: engines differ in which
    they take."""
    names: dict[str, str] = {ROOT: ROOT}
    lines: list[str] = []
    waiting = [ROOT]
    while waiting:
        name = waiting.pop()
        alternatives = grammar.rules[name]
        for it in (symbol for sequence in alternatives for symbol in sequence):
            inner = it
            while isinstance(inner, Repeat):
                inner = inner.of
            if isinstance(inner, Ref) and inner.name not in names:
                names[inner.name] = f"r{len(names)}"
                waiting.append(inner.name)
        lines.append(f"{names[name]} ::= {' | '.join(_sequence(it, names) for it in alternatives)}")
    return "\n".join(lines) + "\n"


def _sequence(sequence: Sequence, names: Mapping[str, str]) -> str:
    parts: list[str] = []
    text = ""
    for it in sequence:
        if isinstance(it, Chars) and not it.negated and len(it.ranges) == 1 and it.ranges[0][0] == it.ranges[0][1]:
            text += escaped(it.ranges[0][0], '"')
            continue
        if text:
            parts.append(f'"{text}"')
            text = ""
        parts.append(_symbol(it, names))
    if text or not parts:
        parts.append(f'"{text}"')
    return " ".join(parts)


def _symbol(symbol: Symbol, names: Mapping[str, str]) -> str:
    if isinstance(symbol, Ref):
        return names[symbol.name]
    if isinstance(symbol, Chars):
        if not symbol.ranges:
            return r"[\x00-\U0010FFFF]" if symbol.negated else '""'
        said = (escaped(low, "]^-") + (f"-{escaped(high, ']^-')}" if high > low else "") for low, high in symbol.ranges)
        return f"[{'^' if symbol.negated else ''}{''.join(said)}]"
    inner = _symbol(symbol.of, names)
    if isinstance(symbol.of, Repeat):
        inner = f"({inner})"
    bounds = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    most = "" if symbol.most is None else symbol.most
    return inner + bounds.get((symbol.least, symbol.most), f"{{{symbol.least},{most}}}")


def escaped(code: int, special: str) -> str:
    """Return a character as a grammar has it, in quotes or brackets. `special`: what has a meaning there."""
    char = chr(code)
    if char in special or char == "\\":
        return f"\\{char}" if char in '"\\]' else f"\\x{code:02X}"
    if " " <= char <= "~":
        return char
    known = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
    if char in known:
        return known[char]
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


# -- reading -----------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*+(?:\#[^\n]*+\s*+)*+(?:
        (?P<name>[\w-][\w.-]*)\s*(?P<defines>::=)?
        | (?P<text>"(?:[^"\\]|\\.)*")
        | (?P<chars>\[(?:[^\]\\]|\\.)*\])
        | (?P<bounds>\{\s*\d{1,9}\s*(?:,\s*+(?:\d{1,9})?\s*)?\})
        | (?P<sign>[().|*+?])
    )""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_SHORT = {"n": "\n", "r": "\r", "t": "\t"}


def read(text: str) -> Grammar:
    """Return the grammar that this text describes. Raises UnsupportedError if it has anything else than rules,
    literals, classes, groups and repetitions."""
    return Reader(_tokens(text)).read()


class Reader:
    """Reads one grammar from its tokens."""

    def __init__(self, tokens: Iterable[tuple[str, str]]) -> None:
        self._grammar = Grammar()
        self._tokens = list(tokens)
        self._at = 0

    def read(self) -> Grammar:
        grammar = self._grammar
        while (token := self._next()) is not None:
            kind, name = token
            if kind != "defines" or name in grammar.rules:
                raise UnsupportedError("a rule of the grammar has no name, or the name of an earlier rule")
            grammar.rules[name] = []
            grammar.rules[name] = self._alternatives()
        rules = (it for alternatives in grammar.rules.values() for sequence in alternatives for it in sequence)
        for it in rules:
            while isinstance(it, Repeat):
                it = it.of  # noqa: PLW2901
            if isinstance(it, Ref) and it.name not in grammar.rules:
                raise UnsupportedError("the grammar uses a rule that it does not define")
        if ROOT not in grammar.rules:
            raise UnsupportedError("the grammar has no rule 'root'")
        return grammar

    def _peek(self) -> tuple[str, str] | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _next(self) -> tuple[str, str] | None:
        token = self._peek()
        self._at += 1
        return token

    def _alternatives(self) -> list[Sequence]:
        found = [self._sequence()]
        while self._peek() == ("sign", "|"):
            self._next()
            found.append(self._sequence())
        return found

    def _sequence(self) -> Sequence:
        made: list[Symbol] = []
        while (token := self._peek()) is not None:
            kind, text = token
            if kind == "defines" or token in (("sign", "|"), ("sign", ")")):
                break
            self._next()
            made += self._repeated(self._item(kind, text))
        return tuple(made)

    def _item(self, kind: str, text: str) -> Sequence:
        if kind == "text":
            return literal(_unescaped(text[1:-1]))
        if kind == "chars":
            return (_class(text[1:-1]),)
        if kind == "name":
            return (Ref(text),)
        if text == ".":
            return (ANY,)
        if text != "(":
            raise UnsupportedError(f"the grammar has '{text}' where it does not belong")
        inside = self._alternatives()
        if self._next() != ("sign", ")"):
            raise UnsupportedError("a group in the grammar does not end")
        return (self._grammar.add("group", inside),)

    def _repeated(self, item: Sequence) -> Sequence:
        while (token := self._peek()) is not None and (token[0] == "bounds" or token[1] in ("*", "+", "?")):
            if token[0] not in ("bounds", "sign"):
                break
            self._next()
            least, most = _bounds(token[1])
            one = item[0] if len(item) == 1 else self._grammar.add("group", [item])
            item = (Repeat(one, least, most),)
        return item


def _bounds(text: str) -> tuple[int, int | None]:
    known: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if text in known:
        return known[text]
    least, comma, most = text[1:-1].partition(",")
    if not comma:
        return int(least), int(least)
    return int(least), int(most) if most.strip() else None


def _tokens(text: str) -> Iterable[tuple[str, str]]:
    at, count = 0, 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        count += 1
        if found is None or count > MOST_SYMBOLS:
            if re.fullmatch(r"\s*+(#[^\n]*+\s*+)*+", text[at:]):
                return
            raise UnsupportedError("the grammar has unknown characters, or is too long")
        at = found.end()
        kind = str(found.lastgroup)
        yield kind, found["name"] if kind == "defines" else found[kind]


def _class(text: str) -> Chars:
    negated = text.startswith("^")
    parts = re.findall(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)|[^\\]", text[negated:], re.DOTALL)
    codes = [-1 if it == "-" else ord(_unescaped(it)) for it in parts]  # a hyphen that stands for itself has no escape
    ranges: list[tuple[int, int]] = []
    at = 0
    while at < len(codes):
        low = ord("-") if codes[at] < 0 else codes[at]
        if 0 < at + 1 < len(codes) - 1 and codes[at + 1] < 0:
            ranges.append((low, ord("-") if codes[at + 2] < 0 else codes[at + 2]))
            at += 3
        else:
            ranges.append((low, low))
            at += 1
    return Chars(tuple(ranges), negated)


def _unescaped(text: str) -> str:
    def char(found: re.Match[str]) -> str:
        said = found[1]
        if len(said) > 1 and (code := int(said[1:], 16)) > 0x10FFFF:
            raise UnsupportedError(f"the grammar has the unknown character \\{said}")
        return chr(code) if len(said) > 1 else _SHORT.get(said, said)

    return _ESCAPE.sub(char, text)
