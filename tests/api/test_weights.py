"""What takes long to check is weighed so that it runs in a thread."""

from typing import Any

import pytest

from gateway.api import bounds
from gateway.api.body import LARGE

GRAMMAR = "root ::= " + '"a" ' * 2_000
TAG = {"type": "grammar", "grammar": GRAMMAR}
LONG: dict[str, dict[str, Any]] = {
    "a grammar": {"grammar": GRAMMAR},
    "vLLM's": {"structured_outputs": {"grammar": GRAMMAR}},
    "in a structural tag": {"structural_tag": {"format": TAG}},
    "in a tool": {"tools": [TAG]},
    "a regular expression": {"guided_regex": "(a)" * 10_000},
    "a pattern": {"tools": [{"pattern": "(a)" * 10_000}]},
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_is_checked_in_a_thread(name: str) -> None:
    texts, _ = bounds.check(LONG[name], ["vllm"])
    assert texts.weight > LARGE
    texts.check()


def test_a_short_one_is_checked_at_once() -> None:
    texts, _ = bounds.check({"grammar": GRAMMAR[:1000], "tools": [{"pattern": "^[a-z]+$"}]}, ["vllm"])
    assert 0 < texts.weight < LARGE
