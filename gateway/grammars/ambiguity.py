"""Ambiguity: count the ways in which a grammar can follow one and the same text.

Before each token, llama.cpp follows every token of its vocabulary in all of these ways, and what it has found for one
way does not help it with another. `[a-z]?` thirty times in a row can follow ten letters in 30 million ways. The text
that most ways can follow is searched for among the likeliest texts. All functions are pure.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate, count

from gateway.grammars import pattern
from gateway.grammars.grammar import Chars, Grammar, Ref, Repeat, Sequence, Symbol, UnsupportedError, read
from gateway.grammars.rest import Place, Walk

MOST = 1_000  # ways for one text; 924 took llama.cpp up to 0.4 s for each token on a busy core, and 8,008 took 3 s
LENGTH = 16  # characters of a text; few tokens are longer
_PLACES = 1_000  # that are looked at, the nearest to the grammar's beginning first
_TEXTS = 4  # that are followed at a time
_STEPS = 600_000  # from place to place: about 0.6 s
_LAST = 0x10FFFF

# A grammar's tokens by their names or numbers, which count as one character, and what may hold such a text.
_TOKENS = re.compile(r'#[^\n]*|"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?|(?P<token>!?<[^<>\s]*>)', re.DOTALL)

_Ways = Counter[Place | None]  # the number of ways to each place


class Ways:
    """The ways through one grammar or some patterns: searched for once, in up to a second, and then known."""

    def __init__(self, search: Callable[[], tuple[int, str]]) -> None:
        self._search = search
        self._found: tuple[int, str] | None = None
        self._reason = ""

    @property
    def known(self) -> bool:
        return self._found is not None or bool(self._reason)

    def most(self) -> tuple[int, str]:
        """Return the number of ways for one text, or more than MOST as soon as that is known, and the pattern that has
        it. Raises UnsupportedError if that takes too long, or if the grammar is not one of llama.cpp's."""
        if not self.known:
            try:
                self._found = self._search()
            except UnsupportedError as exc:
                self._reason = str(exc)
        if self._found is None:
            raise UnsupportedError(self._reason)
        return self._found


@lru_cache(32)
def of_grammar(text: str) -> Ways:
    """Return the ways for one text of a grammar."""
    return Ways(lambda: (_grammar(text), ""))


@lru_cache(32)
def of_patterns(patterns: tuple[str, ...]) -> Ways:
    """Return the ways for one text of the patterns of JSON schemas. Patterns that are not understood do not count:
    llama.cpp refuses them or leaves them out."""
    return Ways(lambda: _worst(patterns))


def _grammar(text: str) -> int:
    return _Search(read(_TOKENS.sub(lambda it: r'"\x00"' if it["token"] else it[0], text)), _STEPS).most()


def _worst(patterns: tuple[str, ...]) -> tuple[int, str]:
    most, steps = (0, ""), _STEPS
    for it in patterns:
        try:
            search = _Search(pattern.read(it), steps)
        except UnsupportedError:
            continue
        most = max(most, (search.most(), it))
        steps = search.steps_left
    return most


class _Numbered:
    """A grammar in which no symbol equals another one: llama.cpp does not notice that two of them are the same."""

    def __init__(self, grammar: Grammar) -> None:
        self._numbers = count(_LAST + 1)
        self._names = {name: name for name in grammar.rules}  # of rules, by the names under which symbols refer to them
        rules = {name: [tuple(self._sequence(it)) for it in them] for name, them in grammar.rules.items()}
        self.grammar = Grammar({name: rules[rule] for name, rule in self._names.items()})

    def _sequence(self, sequence: Sequence) -> Iterator[Symbol]:
        for it in sequence:
            if isinstance(it, Repeat) and it.least:  # the first one is written out, as llama.cpp does it
                yield self._symbol(it.of)
                yield self._symbol(Repeat(it.of, it.least - 1, None if it.most is None else it.most - 1))
            else:
                yield self._symbol(it)

    def _symbol(self, symbol: Symbol) -> Symbol:
        number = next(self._numbers)
        if isinstance(symbol, Chars):
            return Chars((*symbol.ranges, (number, number)), symbol.negated)
        if isinstance(symbol, Repeat):
            return Repeat(self._symbol(symbol.of), symbol.least, symbol.most)
        name = f"{symbol.name}\0{number}"
        self._names[name] = symbol.name
        return Ref(name)


class _Search(Walk):
    def __init__(self, grammar: Grammar, most_steps: int) -> None:
        super().__init__(_Numbered(grammar).grammar, most_steps)
        self._tried: set[tuple[object, ...]] = set()

    def most(self) -> int:
        """Return the largest number of ways that is found."""
        found, seen, waiting = 1, set(self._at), deque(self._at)
        while waiting and len(seen) < _PLACES:
            place = waiting.popleft()
            leaves = [it for it in self._leaves(place) if it is not None]
            self._count(len(leaves))
            for leaf in leaves:
                if leaf.after not in seen:
                    seen.add(leaf.after)
                    waiting.append(leaf.after)
            if len(leaves) > 1 and self._is_new(place) and len(self._likeliest(Counter([place]), 1, least=2)) > 0:
                found = max(found, self._follow(place))
                if found > MOST:
                    break
        return found

    def _is_new(self, place: Place | None) -> bool:
        """Whether no place was tried that begins with the same symbols."""
        symbols: list[object] = []
        while place is not None and len(symbols) < 3:
            symbols.append(place.symbol)
            place = place.after
        before = len(self._tried)
        self._tried.add(tuple(symbols))
        return len(self._tried) > before

    def _follow(self, place: Place | None) -> int:
        texts, most = [_Ways([place])], 1
        for _ in range(LENGTH):
            found: dict[frozenset[tuple[Place | None, int]], _Ways] = {}
            for ways in texts:
                for char in self._likeliest(ways, _TEXTS):
                    after = self._after(ways, char)
                    found[frozenset(after.items())] = after
            texts = sorted(found.values(), key=Counter.total, reverse=True)[:_TEXTS]
            most = max(most, max(map(Counter.total, texts), default=0))
            if most > MOST or not texts:
                break
        return most

    def _likeliest(self, ways: _Ways, most: int, least: int = 1) -> list[int]:
        """Return the characters that the most ways can follow, at most `most` that differ in them."""
        changes: Counter[int] = Counter()
        for number, chars, _ in self._next(ways):
            for low, high in _ranges(chars):
                changes[low] += number
                changes[high + 1] -= number
        codes = sorted(changes)
        totals = accumulate(changes[it] for it in codes)
        found = sorted(
            ((total, code) for total, code in zip(totals, codes, strict=True) if total >= least), reverse=True
        )
        return [code for _, code in found[:most]]

    def _after(self, ways: _Ways, code: int) -> _Ways:
        after = _Ways()
        for number, chars, place in self._next(ways):
            if chars.has(chr(code)):
                after[place] += number
        return after

    def _next(self, ways: _Ways) -> Iterator[tuple[int, Chars, Place | None]]:
        """Yield the characters that may come, with the number of ways to them, and the place after each."""
        for place, number in ways.items():
            leaves = self._leaves(place)
            for it in leaves:
                if it is not None and isinstance(it.symbol, Chars):
                    self._count(1 + len(it.symbol.ranges))
                    yield number, it.symbol, it.after


def _ranges(chars: Chars) -> Iterator[tuple[int, int]]:
    if not chars.negated:
        yield from (it for it in chars.ranges if it[0] <= _LAST)
        return
    begin = 0
    for low, high in sorted(chars.ranges):
        if low > begin:
            yield begin, low - 1
        begin = max(begin, high + 1)
    if begin <= _LAST:
        yield begin, _LAST
