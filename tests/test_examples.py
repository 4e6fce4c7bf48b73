"""The examples work, and the demonstration would notice a difference."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from examples.demo import Life, differences

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--layers=1", "--width=32", "--context=64", "--batch=8")


def demo(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "examples.demo", f"--out={out}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def check(report: dict[str, Any], out: Path, *, steps: int) -> None:
    assert report["passed"] is True
    assert report["differences"] == []
    assert report["steps"] == steps
    first, second = report["killed_at"]
    assert 0 < report["resumed"][0] <= first < steps
    assert report["resumed"][0] < report["resumed"][1] <= second < steps
    assert report["compared_losses"] == steps + report["recomputed_steps"]
    assert report["verified_steps"][-1] == steps
    assert len(set(report["digests"])) == 1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_demo(tmp_path: Path) -> None:
    check(demo(tmp_path, "--steps=123", "--every-steps=10", *TINY), tmp_path, steps=123)


@pytest.mark.slow
def test_quick_demo(tmp_path: Path) -> None:
    check(demo(tmp_path, "--quick"), tmp_path, steps=203)


def life(tmp_path: Path, *, upto: int = 4) -> Life:
    steps = range(1, upto + 1)
    return Life("life", tmp_path, losses={s: (1 / s).hex() for s in steps}, samples={s: f"{s:x}" for s in steps})


def test_demo_notices_every_difference(tmp_path: Path) -> None:
    whole, same = life(tmp_path), life(tmp_path)
    assert differences(whole, [same], ["a", "a"]) == []

    bit = dataclasses.replace(same, losses={**same.losses, 3: float.fromhex("0x1.5555555555554p-2").hex()})
    assert len(differences(whole, [bit], ["a", "a"])) == 1
    other = dataclasses.replace(same, samples={**same.samples, 2: "ff"})
    assert "other samples" in differences(whole, [other], ["a", "a"])[0]
    assert "lacks the steps [4]" in differences(whole, [life(tmp_path, upto=3)], ["a", "a"])[0]
    assert "final states differ" in differences(whole, [same], ["a", "b"])[0]


def test_demo_ignores_the_line_that_a_kill_has_cut(tmp_path: Path) -> None:
    found = Life("life", tmp_path / "record.jsonl")
    line = json.dumps({"step": 7, "loss": (0.5).hex(), "samples": "aa", "at": 2.0})
    found.record.write_text(json.dumps({"resumed": 6, "at": 1.0}) + "\n" + line[:20])
    found.follow()
    assert (found.resumed, found.losses) == (6, {})
    found.record.write_text(json.dumps({"resumed": 6, "at": 1.0}) + "\n" + line + "\n")
    found.follow()
    assert found.losses == {7: (0.5).hex()}


def train(out: Path, ranks: int, url: Path, *options: str) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks else []
    command = [sys.executable, *launcher, "-m", "examples.train_gpt", f"--url={url}", f"--out={out}", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> None:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()


def told(path: Path) -> Life:
    found = Life(path.stem, path)
    found.follow()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--ddp", "--fsdp"])
def test_train_gpt_under_torchrun(tmp_path: Path, mode: str) -> None:
    """Two ranks, killed and resumed, give the losses of two ranks left alone; one process goes on where they ended."""
    options = ("--steps=60", "--every-steps=7", "--threads=1", "--layers=2", "--width=64", "--context=64")
    finish(train(tmp_path / "whole.jsonl", 2, tmp_path / "whole", mode, *options))
    broken = tmp_path / "broken.jsonl"
    broken.touch()
    process = train(broken, 2, tmp_path / "run", mode, *options)
    while told(broken).last < 30:
        assert process.poll() is None, process.communicate()
    # torchrun's workers are sessions of their own, and would outlive it.
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.communicate()
    finish(train(tmp_path / "resumed.jsonl", 2, tmp_path / "run", mode, *options))

    whole, resumed = told(tmp_path / "whole.jsonl"), told(tmp_path / "resumed.jsonl")
    assert resumed.resumed >= 7
    assert differences(whole, [told(broken), resumed], []) == []

    more = [option for option in options if not option.startswith("--steps")]
    finish(train(tmp_path / "alone.jsonl", 0, tmp_path / "run", "--steps=64", "--accumulate=2", *more))
    alone = told(tmp_path / "alone.jsonl")
    assert alone.resumed == 60
    assert sorted(alone.losses) == [61, 62, 63, 64]
