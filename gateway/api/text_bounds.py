"""Text bounds: limit a grammar or a regular expression, as gateway.api.bounds limits other fields."""

import re

from gateway.api import branching
from gateway.errors import BadRequest

MAX_TEXT = 64 * 1024  # characters of all grammars of a request, and of all its regular expressions
MAX_DEPTH = 64  # of brackets in one, and of a schema; 60,000 parentheses overflowed the parser's stack
MAX_OPTIONS = 64  # of ? * + { in one rule: 100 in a row took 11 s for two tokens, 200 more than 40 s
MAX_ALTERNATIVES = 1000  # 5000 took 12 s for each token
MOST_REPEATS = 100_000  # with any engine; some take fewer (gateway.dialects)

BRANCHES = "'{where}' has a rule that can begin in more than " + f"{branching.MOST} ways. Simplify it."

_REPEAT = re.compile(r"\{(\d+)(?:(,)(\d*))?\}")
# Text in quotes, in brackets, in a comment or behind a backslash is not an operator. Without a closing quote or
# bracket, it extends to the end, so each character is read once. A class ends at its first bracket, as llama.cpp reads
# it.
_TEXTS = re.compile(r'#[^\n]*|//[^\n]*|\\.|"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?|\s+', re.DOTALL)
_CLASSES = re.compile(r"\\.|\[\^?(?:[^\]\\]|\\.)*\]?", re.DOTALL)


# What the check of one character takes, in bytes of a body whose checks take as long (gateway.api.body.LARGE).
_GRAMMAR, _REGEX = 256, 64  # up to 1.6 µs, and 0.2 µs


class Texts:
    """The grammars and the regular expressions of one request, each once, until they are checked."""

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats
        self._grammars: dict[str, str] = {}  # and where they are
        self._regexes: dict[str, str] = {}
        self._sizes = [0, 0]

    @property
    def weight(self) -> int:
        """What their check takes, in bytes of a body."""
        return self._sizes[False] * _GRAMMAR + self._sizes[True] * _REGEX

    def add(self, text: str, where: str, *, regex: bool) -> None:
        """Add a text that is to be checked. Raises BadRequest if they have too many characters in all."""
        known = self._regexes if regex else self._grammars
        if text in known:
            return
        known[text] = where
        self._sizes[regex] += len(text)
        if self._sizes[regex] > MAX_TEXT:
            kind = "regular expressions" if regex else "grammars"
            raise BadRequest(
                f"The {kind} up to '{where}' have more than {MAX_TEXT} characters in all. Send fewer or shorter ones.",
                param=where,
            )

    def check(self) -> None:
        """Check all of them. Raises BadRequest."""
        for text, where in self._grammars.items():
            check_text(text, where, self._repeats, regex=False)
        for text, where in self._regexes.items():
            check_text(text, where, self._repeats, regex=True)


def check_text(text: str, where: str, repeats: int, *, regex: bool) -> None:
    """Check a grammar, or a regular expression."""
    bare = (_CLASSES if regex else _TEXTS).sub("", text)
    depth = deepest = 0
    for sign in re.findall(r"[()]", bare):
        depth += 1 if sign == "(" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise BadRequest(f"'{where}' is nested more than {MAX_DEPTH} levels deep.", param=where)
    if max(sum(map(rule.count, "?*+{")) for rule in bare.split("::=")) > MAX_OPTIONS:
        raise BadRequest(
            f"'{where}' has more than {MAX_OPTIONS} optional or repeated parts in one rule.",
            param=where,
        )
    if bare.count("|") > MAX_ALTERNATIVES:
        raise BadRequest(f"'{where}' has more than {MAX_ALTERNATIVES} alternatives.", param=where)
    if not regex and branching.of_grammar(text) > branching.MOST:
        raise BadRequest(BRANCHES.format(where=where), param=where)
    for least, between, most in _REPEAT.findall(bare):
        low, high = _whole(least), _whole(most)
        if max(low, high) > repeats:
            raise BadRequest(f"'{where}' has a repetition of more than {repeats} times.", param=where)
        if between and most and low > high:  # llama.cpp counts down from there, for gigabytes
            raise BadRequest(
                f"'{where}' has a repetition of at least {low} and at most {high} times, which is impossible.",
                param=where,
            )


def _whole(digits: str) -> int:
    return int(digits.lstrip("0")[:20] or "0")
