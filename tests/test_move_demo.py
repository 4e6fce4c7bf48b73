"""The example that moves between two clouds works, and would notice a difference; so would the benchmark of moves."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.move import main, targets
from benchmarks.move_run import Cell
from examples.demo import Life
from examples.move_between_clouds.__main__ import Trip, compare

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


def life(name: str, first: int, last: int) -> Life:
    steps = range(first, last + 1)
    at = {step: float(step) for step in range(first - 1, last + 1)}
    found = Life(name, Path(), losses={s: (1 / s).hex() for s in steps}, samples={s: f"{s:x}" for s in steps}, at=at)
    found.resumed = first - 1
    return found


def trip(before: Life | None = None, after: Life | None = None) -> Trip:
    lives = before or life("S3", 1, 3), after or life("GCS", 4, STEPS)
    return Trip(life("uninterrupted", 1, STEPS), *lives, report={}, out_bytes=0)


def test_the_example_notices_every_difference() -> None:
    assert compare(trip(), exact=True, digests=["a", "a"]) == ([], 0.0)
    assert "final states differ" in compare(trip(), exact=True, digests=["a", "b"])[0][0]
    bit = life("GCS", 4, STEPS)
    bit.losses[5] = (float.fromhex(bit.losses[5]) * (1 + 1e-9)).hex()
    assert len(compare(trip(after=bit), exact=True, digests=[])[0]) == 1
    assert "lacks the steps [4]" in compare(trip(after=life("GCS", 5, STEPS)), exact=True, digests=[])[0][0]


def test_with_other_ranks_a_thousandth_is_allowed_and_other_samples_are_not() -> None:
    near, far, other = (life("GCS", 4, STEPS) for _ in range(3))
    near.losses[5] = (0.2 * 1.0009).hex()
    far.losses[5] = (0.2 * 1.0011).hex()
    other.samples[5] = "ff"
    wrong, worst = compare(trip(after=near), exact=False, digests=[])
    assert (wrong, round(worst, 6)) == ([], 0.0009)
    assert "step 5: the loss is" in compare(trip(after=far), exact=False, digests=[])[0][0]
    assert compare(trip(after=other), exact=False, digests=[])[0] == [
        "step 5: other samples in GCS than in uninterrupted"
    ]
    nan = life("GCS", 4, STEPS)
    nan.losses[5] = float("nan").hex()
    assert len(compare(trip(after=nan), exact=False, digests=[])[0]) == 1
    assert "lacks the steps [4]" in compare(trip(after=life("GCS", 5, STEPS)), exact=False, digests=[])[0][0]


def test_a_blackout_lasts_until_all_steps_are_done_again() -> None:
    late = life("GCS", 3, STEPS)
    late.at = {step: 10.0 + step for step in late.at}
    assert trip(after=late).blackout_s == 10.0  # step 3 was done at 3, and once more at 13
    sent = life("GCS", 4, STEPS)
    sent.at = {step: 10.0 + step for step in sent.at}
    assert trip(after=sent).blackout_s == 10.0  # from the restore on


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_example_moves_and_trains_on(tmp_path: Path, ranks: int) -> None:
    command = [sys.executable, "-m", "examples.move_between_clouds", "--quick", f"--target-ranks={ranks}"]
    done = subprocess.run([*command, f"--out={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert 0 < report["resumed"] <= report["step"] < report["steps"]
    assert report["compared_losses"] == report["steps"] + report["step"] - report["resumed"]
    assert report["out_bytes"] >= report["move"]["sent_bytes"] > 0
    assert report["worst_difference"] <= (0 if ranks == 2 else 1e-3)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


WHOLE = Cell("fp32", None, state_bytes=100, blackout_s=100.0)
MOVED = Cell("fp32", 3.0, every_step=True, state_bytes=100, link_bytes=150, blackout_s=33.0, rounds=4, forecast_s=30.0)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"blackout_s": 33.1}, ["blackout"]),
        ({"forecast_s": 26.0}, ["forecast"]),
        ({"forecast_s": None}, ["forecast"]),
        ({"ratio": 30.0, "blackout_s": 36.0, "rounds": 1}, []),
        ({"ratio": 30.0, "link_bytes": 161}, ["rounds", "copies"]),
        ({"ratio": 30.0, "blackout_s": 76.0, "forecast_s": 76.0, "rounds": 1}, ["blackout"]),
        ({"state": "lora", "ratio": 30.0}, []),
    ],
)
def test_the_benchmark_judges_by_its_targets(change: dict[str, object], missed: list[str]) -> None:
    found = list(targets([WHOLE, dataclasses.replace(MOVED, **change)]))  # type: ignore[arg-type]
    wrong = [verdict.what for verdict in found if not verdict.met]
    assert len(wrong) == len(missed), wrong
    assert all(word in words for word, words in zip(missed, wrong))


@pytest.mark.slow
def test_the_benchmark_measures_both_ways(tmp_path: Path) -> None:
    assert main(["--quick", "--states", "mixed", "--out", str(tmp_path)]) == 0
    whole, moved = json.loads((tmp_path / "move_quick.json").read_text())["cells"]
    assert whole["bad"] == moved["bad"] == []
    assert whole["parts_s"].keys() == {"leave", "restore"}
    assert {"leave", "copy", "hand over", "restore"} <= moved["parts_s"].keys()
    assert 0 < moved["blackout_s"] < whole["blackout_s"]
    assert moved["link_bytes"] >= moved["report"]["sent_bytes"] > 0
