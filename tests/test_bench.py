"""`make bench-quick` runs, and its run is valid. Its figures are for readers to judge."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT


def test_bench_quick_measures_and_checks_every_answer(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        ["scripts/bench-quick", "--rounds", "1", "--json", str(figures)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if "are needed to compare with" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "CPU per blocking request" in done.stdout
    for api in ("Responses", "Messages"):
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"the same stream by {api}, ms"))
        assert re.search(r"\s\d+\.\d{3} ±.*\s\d+\.\d\dx of the chat stream, 1\.5: (met|MISSED)$", row), row
    text = json.dumps(json.loads(figures.read_text()))
    assert all(subject in text for subject in ("nginx", "direct", "gateway"))


@pytest.mark.parametrize(
    ("module", "lines"),
    [
        ("budget", ["blocking", "stream", "each of a stream's 64 tokens"]),
        ("telemetry", ["a blocking request", "the whole request"]),
    ],
)
def test_what_a_part_of_the_gateway_costs_is_told(module: str, lines: list[str]) -> None:
    command = [sys.executable, "-m", f"bench.{module}", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    if "not found" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert [line.partition(",")[0] for line in done.stdout.splitlines()] == lines
