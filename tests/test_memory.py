"""Many saves in one process: memory must not grow, and a save may take the state's copy and the budget, no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import Row, Soak

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


def soaked(counts: list[int]) -> list[str]:
    rows = [Row(100, 100, descriptors=9, threads=count, seconds=1.0) for count in counts]
    return Soak(state_bytes=10, budget_bytes=1, bare_peak_bytes=90, rows=rows).problems(slack_bytes=0, growth_bytes=0)


def test_threads_that_stay_are_told_from_those_that_were_there_for_a_moment() -> None:
    assert soaked([18] * 20) == []
    assert soaked([18] * 19 + [43]) == []
    assert soaked([18 + n // 3 for n in range(20)]) == ["threads went from 20 to 24"]
