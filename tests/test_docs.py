"""docs/when-an-engine-dies.md states only what tests prove, and names every test of resuming; docs/errors.md has every
code of an error; CONTRIBUTING.md's example of running single tests runs some."""

import ast
import re
from collections.abc import Iterator

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


def test_the_example_of_running_single_tests_runs_some() -> None:
    (example,) = re.findall(r"`scripts/test (tests/\w+) -k (\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    folder, word = example
    names = (re.findall(r"^def (test_\w+)", it.read_text(), re.MULTILINE) for it in (ROOT / folder).glob("test_*.py"))
    assert [name for found in names for name in found if word in name]


def codes(tree: ast.AST) -> Iterator[str]:
    """Each text that is passed as `code=`, or assigned to `code` in a class."""
    for node in ast.walk(tree):
        pairs: list[tuple[ast.AST, ast.AST | None]] = []
        match node:
            case ast.keyword(arg="code", value=ast.Constant(value=str(code))):
                yield code
            case ast.Assign(targets=[ast.Tuple() as names], value=ast.Tuple() as values):
                pairs = list(zip(names.elts, values.elts, strict=True))
            case ast.Assign(targets=[name]) | ast.AnnAssign(target=name):
                pairs = [(name, node.value)]
        for pair in pairs:
            match pair:
                case ast.Name(id="code"), ast.Constant(value=str(code)):
                    yield code


def test_every_code_of_an_error_is_explained_once() -> None:
    there = {code for file in (ROOT / "gateway").rglob("*.py") for code in codes(ast.parse(file.read_text()))}
    told = re.findall(r"^(?:\| [\d, ]+ \| )?`(\w+)`", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(there)
