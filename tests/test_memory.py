"""Many saves in one process: memory must not grow, and a save may take the state's copy and the budget, no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("store", ["file", "s3"])
def test_memory_stays_within_the_copy_and_the_budget(store: str, tmp_path: Path) -> None:
    # In a process of its own, whose memory is not stirred by other tests. A second copy of the state would be 60 MB.
    # The heaps of the threads settle within some 80 saves; the long form (benchmarks.soak) shows that they then stay.
    size = ["--size-mb", "60", "--budget-mib", "8", "--saves", "20", "--growth-mib", "12"]
    command = [sys.executable, "-m", "benchmarks.soak", *size, "--store", store, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"soak_{store}.json").read_text())
    assert len(found["rows"]) == 20
    assert found["above_bytes"] > found["state_bytes"]  # else nothing was measured
