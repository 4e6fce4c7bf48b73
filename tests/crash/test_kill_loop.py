"""A real training, killed with SIGKILL at random moments: what the log refers to is there, and is what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_training_survives_being_killed(tmp_path: Path) -> None:
    # In a process of its own: it forks, and a process with threads, such as pytest's, must not.
    command = [sys.executable, "-m", "benchmarks.kill_loop", "--kills", "8", "--steps", "150", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kill_loop_file.json").read_text())
    assert found["kills"] == 8
    assert found["bad"] == []
    assert found["resumes"] > 0
    assert found["checkpoints_read"] > 0
