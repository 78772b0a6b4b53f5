"""docs/when-an-engine-dies.md states only what tests prove, and names every test of resuming."""

import re

from gateway.settings import Settings
from tests.support.processes import ROOT

PAGE = (ROOT / "docs/when-an-engine-dies.md").read_text()
FLOWS = ("resume", "resume_kinds", "resume_ways", "outage", "survival")
TESTS = [*(ROOT / f"tests/flows/test_{it}.py" for it in FLOWS), ROOT / "tests/stack/test_resume.py"]


def test_the_page_names_exactly_the_tests_that_exist() -> None:
    there = {name for file in TESTS for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert set(re.findall(r"`(test_\w+)`", PAGE)) == there


def test_every_statement_names_a_test() -> None:
    statements = [it.strip() for it in re.split(r"\n(?:- |\n)", PAGE[PAGE.index("## ") :])]
    assert not [
        it for it in statements if "`test_" not in it and not it.startswith(("#", "|")) and not it.endswith(":")
    ]


def test_the_page_states_the_real_defaults() -> None:
    for name, default in re.findall(r"`(STACK_\w+)` \((\d+)", PAGE):
        assert Settings.model_fields[name.lower()].default == float(default), name
