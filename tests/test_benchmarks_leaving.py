"""The benchmark of leaving would notice a false claim and an overrun, and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.leaving import Cell, main

TRAINED = {step: f"digest-{step}" for step in range(1, 11)}
DURABLE = {"text": "durable: step 10", "durable": True, "step": 10}
LOST = {"text": "not durable: resumes from step 7, 3 steps lost", "durable": False, "step": 7}


def judged(resumed_from: int, digest: str, **what: Any) -> Cell:
    cell = Cell("gpumove", 30, 4, 3, 8, resumed_from=resumed_from, **{"done_s": 4.0, **what})
    cell.judge(TRAINED, digest)
    return cell


def test_what_is_true_is_not_bad() -> None:
    durable, lost = judged(10, "digest-10", said=DURABLE), judged(7, "digest-7", said=LOST)
    assert (durable.bad, durable.durable, durable.lost_steps) == ([], True, 0)
    assert (lost.bad, lost.durable, lost.lost_steps) == ([], False, 3)


@pytest.mark.parametrize(
    ("resumed_from", "digest", "what", "words"),
    [
        (7, "digest-7", {"said": DURABLE}, "a resume begins from step 7"),
        (7, "digest-7", {"said": {**LOST, "durable": True}}, "trained until step 10"),
        (10, "digest-9", {"said": DURABLE}, "is not what was trained"),
        (0, "", {"said": LOST}, "a resume begins from step 0"),
        (7, "digest-7", {"done_s": None}, "still at work at the deadline"),
    ],
)
def test_what_is_false_is_bad(resumed_from: int, digest: str, what: dict[str, Any], words: str) -> None:
    assert any(words in text for text in judged(resumed_from, digest, **what).bad)


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    short = ("--notices", "30", "0", "--transfers", "1", "--interval", "4", "--state-mb", "3")
    assert main([*short, "--out", str(tmp_path)]) == 0
    cells = {(c["peer"], c["notice_s"]): c for c in json.loads((tmp_path / "leaving.json").read_text())["cells"]}
    assert cells["gpumove", 30]["durable"]
    assert cells["dcp-notice", 30]["durable"]
    assert cells["gpumove", 0]["done_s"] is None
