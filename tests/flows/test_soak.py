"""The short form of `make soak`: every request has one outcome, and nothing is left behind."""

import subprocess

from tests.processes import ROOT


def test_every_request_has_one_outcome_and_nothing_is_left_behind() -> None:
    done = subprocess.run(
        ["scripts/soak", "--requests", "1500"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every request had its one outcome" in done.stdout
