"""Runs are killed, damaged and robbed in the short form of the campaign."""

import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "faults.py"


def test_whatever_befalls_a_run_it_says_so_or_resumes_to_the_same_bits() -> None:
    done = subprocess.run([sys.executable, CAMPAIGN, "--short"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 3 kills, 0 faults" in done.stdout
