"""Memory grows with the number of cells: a 64 x 64 map fits into less than a GiB."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


def test_a_step_on_64_by_64_cells_takes_less_than_a_gib() -> None:
    size = "--sides", "64", "--batch", "2", "--channels", "64", "--hidden", "2048"
    command = [sys.executable, str(SCRIPT), "--child", *size, "--limit", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < json.loads(done.stdout)["mib"] < 1024
