"""The tests' own layers: code that test modules share is in tests/support, and tests and bench do not import each
other."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.support.processes import ROOT


@cache
def imported(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports are not used"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def imports_of(directory: str, package: str) -> list[tuple[str, str]]:
    """Each import of a package by a file of a directory: the file, and the module."""
    files = sorted((ROOT / directory).rglob("*.py"))
    assert files
    found = [(str(file.relative_to(ROOT)), name) for file in files for name in sorted(imported(file))]
    return [(file, name) for file, name in found if name.partition(".")[0] == package]


def test_code_that_tests_share_is_in_support() -> None:
    allowed = ("tests", "tests.support", "tests.READ_BY_THE_STACK")
    assert [
        it for it in imports_of("tests", "tests") if it[1] not in allowed and not it[1].startswith("tests.support.")
    ] == []


@pytest.mark.parametrize(("directory", "package"), [("bench", "tests"), ("tests", "bench"), ("gateway", "tests")])
def test_no_test_file_imports_another(directory: str, package: str) -> None:
    assert imports_of(directory, package) == []


def test_support_holds_no_tests() -> None:
    assert [file.name for file in (ROOT / "tests/support").rglob("test_*.py")] == []
