"""`make bench-quick` runs and its run is valid; what it measures is judged by readers, not here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT


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
    text = json.dumps(json.loads(figures.read_text()))
    assert all(subject in text for subject in ("nginx", "direct", "gateway"))


def test_bench_budget_tells_what_limits_and_usage_cost() -> None:
    command = [sys.executable, "-m", "bench.budget", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    if "not found" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert [line.partition(",")[0] for line in done.stdout.splitlines()] == [
        "blocking",
        "stream",
        "each of a stream's 64 tokens",
    ]
