"""The ways through a grammar are searched for once."""

import pytest

from gateway.grammars import ambiguity
from gateway.grammars.grammar import UnsupportedError


def test_what_a_search_found_is_known() -> None:
    ways = ambiguity.of_grammar("root ::= [a-y]+")
    assert not ways.known
    assert ways.most() == (1, "")
    assert ambiguity.of_grammar("root ::= [a-y]+").known


def test_a_refusal_is_known() -> None:
    for known in (False, True):
        ways = ambiguity.of_grammar("root ::= (")
        assert ways.known is known
        with pytest.raises(UnsupportedError):
            ways.most()
