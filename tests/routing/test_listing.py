"""What the engines tell of one model, merged; and a page of the list."""

from typing import Any

import pytest

from gateway.dialects.asking import Facts
from gateway.errors import BadRequest
from gateway.routing.listing import merged, page


def test_merged_facts_hold_at_every_engine_that_tells() -> None:
    first = Facts(4096, 8192, frozenset({"chat", "tools"}), loaded=False)
    second = Facts(2048, None, frozenset({"chat", "vision"}), loaded=True)
    assert merged([first, second, Facts()]) == Facts(2048, 8192, frozenset({"chat"}), loaded=True)
    assert merged([Facts(), Facts()]) == merged([]) == Facts()


ENTRIES: list[dict[str, Any]] = [{"id": it} for it in "abcde"]


@pytest.mark.parametrize(
    ("limit", "after", "before", "found", "more"),
    [
        (None, None, None, "abcde", False),
        (5, None, None, "abcde", False),
        (2, None, None, "ab", True),
        (2, "b", None, "cd", True),
        (2, "c", None, "de", False),
        (2, "e", None, "", False),
        (2, None, "d", "bc", True),
        (2, None, "c", "ab", False),
        (2, None, "a", "", False),
        (None, "a", "d", "bc", False),
    ],
)
def test_a_page_is_what_anthropics_parameters_ask_for(
    limit: int | None, after: str | None, before: str | None, found: str, more: bool
) -> None:
    entries, has_more = page(ENTRIES, limit, after, before)
    assert ("".join(it["id"] for it in entries), has_more) == (found, more)


@pytest.mark.parametrize("name", ["after_id", "before_id"])
def test_an_unknown_id_is_named(name: str) -> None:
    with pytest.raises(BadRequest) as caught:
        page(ENTRIES, 2, **{"after_id": None, "before_id": None, name: "x"})
    assert caught.value.param == name
