"""Rest: a grammar of what may still come of a text, after its beginning.

The beginning is followed character by character, through all the places of the grammar at which the text may be. Each
place is a stack: the symbols that have to come from there on. Written out, the stacks are the rest's rules.
"""

from collections.abc import Iterator

from gateway.grammars.grammar import ROOT, Chars, Grammar, Ref, Repeat, Sequence, Symbol, UnsupportedError, literal

MOST_PLACES = 2000  # at which a text may be at a time
MOST_STEPS = 200_000  # from place to place: about 0.4 s, in which the worker does nothing else


class Place:
    """A place in a grammar: a symbol that has to come, and what comes after it. There is one of each."""

    __slots__ = ("after", "leaves", "symbol")

    def __init__(self, symbol: Symbol, after: "Place | None") -> None:
        self.symbol = symbol
        self.after = after
        self.leaves: tuple[Place | None, ...] | None = None  # the characters at which it may begin; None: its end


class Walk:
    """Follows one text through a grammar, for `most_steps` at most."""

    def __init__(self, grammar: Grammar, most_steps: int = MOST_STEPS) -> None:
        self._grammar = grammar
        self.steps_left = most_steps
        self._known: dict[tuple[Symbol, Place | None], Place] = {}
        self._at: list[Place | None] = [self._push(it, None) for it in grammar.rules[ROOT]]

    def follow(self, text: str) -> bool:
        """Go on by this text. Returns whether the grammar allows it. Raises UnsupportedError if that takes too long."""
        for char in text:
            next_places: dict[Place | None, None] = {}
            for place in self._at:
                for leaf in self._leaves(place):
                    if leaf is not None and isinstance(leaf.symbol, Chars) and leaf.symbol.has(char):
                        next_places[leaf.after] = None
            self._at = list(next_places)
            self._count(len(self._at) + 1)
            if not self._at or len(self._at) > MOST_PLACES:
                return False
        return True

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        return any(leaf is None for place in self._at for leaf in self._leaves(place))

    @property
    def must_end(self) -> bool:
        """Whether nothing may follow."""
        return all(leaf is None for place in self._at for leaf in self._leaves(place))

    def rest(self, before: str = "") -> Grammar:
        """Return the grammar of what may still come, behind the text `before`."""
        rules = {name: it for name, it in self._grammar.rules.items() if name != ROOT}
        rest = Grammar(rules)
        if any(it == Ref(ROOT) for sequence in self._grammar.rules.values() for one in sequence for it in one):
            raise UnsupportedError("another rule of the grammar uses the root")
        ways = dict.fromkeys(tuple(_symbols(it)) for it in self._at)
        rest.rules[ROOT] = [literal(before) + it for it in ways]
        return rest

    def _place(self, symbol: Symbol, after: Place | None) -> Place:
        found = self._known.get((symbol, after))
        if found is None:
            found = self._known[symbol, after] = Place(symbol, after)
        return found

    def _push(self, sequence: Sequence, after: Place | None) -> Place | None:
        for symbol in reversed(sequence):
            after = self._place(symbol, after)
        return after

    def _leaves(self, place: Place | None) -> tuple[Place | None, ...]:
        if place is None:
            return (None,)
        if place.leaves is None:
            place.leaves = tuple(self._open(place))
        return place.leaves

    def _open(self, place: Place) -> dict[Place | None, None]:
        leaves: dict[Place | None, None] = {}
        seen: set[Place | None] = set()
        waiting: list[Place | None] = [place]
        while waiting:
            it = waiting.pop()
            if it in seen:
                continue
            seen.add(it)
            self._count(1)
            if len(seen) > MOST_PLACES:
                raise UnsupportedError("the grammar allows too many continuations, or a rule begins with itself")
            if it is None or isinstance(it.symbol, Chars):
                leaves[it] = None
            elif isinstance(it.symbol, Ref):
                waiting += [self._push(one, it.after) for one in reversed(self._grammar.rules[it.symbol.name])]
            else:
                waiting += self._repeats(it.symbol, it.after)
        return leaves

    def _repeats(self, symbol: Repeat, after: Place | None) -> Iterator[Place | None]:
        if symbol.least == 0:
            yield after
        if symbol.most is None or symbol.most > 0:
            most = None if symbol.most is None else symbol.most - 1
            if most != 0:
                after = self._place(Repeat(symbol.of, max(0, symbol.least - 1), most), after)
            yield self._place(symbol.of, after)

    def _count(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise UnsupportedError("it takes too long to follow the grammar")


def _symbols(place: Place | None) -> Iterator[Symbol]:
    while place is not None:
        yield place.symbol
        place = place.after
