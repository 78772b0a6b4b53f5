"""Pattern: read a regular expression as llama.cpp makes a grammar of a schema's `pattern`."""

import re
from collections.abc import Iterable

from gateway.grammars.grammar import MOST_SYMBOLS, ROOT, Grammar, Reader, UnsupportedError, escaped

_TOKEN = re.compile(
    r"""(?P<nothing>[\^$]|\\[bB])|(?P<group>\(\?(?:[:=!]|<[=!]|P?<\w+>))
        |(?P<chars>\[(?:[^\]\\]|\\.)*\]?)
        |(?P<bounds>\{\d{1,9}(?:,\d{0,9})?\})
        |(?P<sign>[().|*+?])
        |(?P<kind>\\[dDwWsS])
        |(?P<char>\\.|.)""",
    re.VERBOSE | re.DOTALL,
)
_KINDS = {"d": "[0-9]", "w": "[0-9A-Za-z_]", "s": "[ \t-\r]", "D": "[^0-9]", "W": "[^0-9A-Za-z_]", "S": "[^ \t-\r]"}


def read(text: str) -> Grammar:
    """Return the grammar of what a regular expression matches, as llama.cpp makes one of a schema's `pattern`: anchors
    and the kinds of groups are left out. Raises UnsupportedError as `grammar.read` does."""
    return Reader([("defines", ROOT), *_tokens(text)]).read()


def _tokens(text: str) -> Iterable[tuple[str, str]]:
    for count, found in enumerate(_TOKEN.finditer(text)):
        if count > MOST_SYMBOLS:
            raise UnsupportedError("the pattern is too long")
        kind, it = str(found.lastgroup), found[0]
        if kind == "kind":
            yield "chars", _KINDS[it[1]]
        elif kind == "char":
            yield "text", f'"{it}"' if it.startswith("\\") else f'"{escaped(ord(it), chr(34))}"'
        elif kind != "nothing":
            yield ("sign", "(") if kind == "group" else (kind, it)
