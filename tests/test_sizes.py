"""The sizes of functions and files: a reader has one idea at a time before him, or is told why not."""

import ast
from pathlib import Path

from tests.support.processes import ROOT

DIRECTORIES = ("gateway", "scripts", "bench", "engine")
FUNCTION, FILE = 45, 300  # lines, at most
SCREEN = 20  # lines within which a longer file says why, after the words of REASON
REASON = "file is long because"


def sources() -> list[Path]:
    """Every Python file, with a suffix or without."""
    files = (file for name in DIRECTORIES for file in sorted((ROOT / name).rglob("*")) if file.is_file())
    found = [file for file in files if file.suffix == ".py" or (not file.suffix and is_python(file))]
    assert len(found) > 100
    return found


def is_python(file: Path) -> bool:
    with file.open("rb") as opened:
        return b"python" in opened.readline(100)


def test_no_function_is_longer_than_a_screen() -> None:
    long = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION:
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert long == []


def test_a_long_file_says_why_on_its_first_screen() -> None:
    long = []
    for file in sources():
        lines = file.read_text().splitlines()
        if len(lines) > FILE and REASON not in " ".join(" ".join(lines[:SCREEN]).split()):
            long.append(f"{file.relative_to(ROOT)} has {len(lines)} lines")
    assert long == []
