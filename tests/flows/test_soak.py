"""The short forms of `make soak`: every request has one outcome, and nothing is left behind."""

import subprocess
from pathlib import Path

from tests.support.deaths import deaths
from tests.support.processes import ROOT


def test_every_request_has_one_outcome_and_nothing_is_left_behind() -> None:
    done = subprocess.run(
        ["scripts/soak", "--requests", "1500"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every request had its one outcome" in done.stdout


def test_every_request_is_accounted_for_while_engines_and_workers_are_killed(tmp_path: Path) -> None:
    figures, failures = deaths(tmp_path, requests=200, concurrency=24, seed=1, between=30)
    assert not failures, failures[:5]
    assert figures["killed"]["workers"] > 0
    assert figures["killed"]["engines"] > 0
