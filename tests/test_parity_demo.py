"""The example that certifies judges right, and would notice a certificate that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from examples.parity.broken import FAULTS
from examples.parity.cases import BITWISE, CASES, DIFFERENT, WITHIN, Case, Numbers, truth, wrong
from gpumove.format.manifest import TraceRow
from gpumove.parity.verdict import Certificate, Setting, judge

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4


def numbers(*, spoil: float = 1.0, at: int = 3) -> Numbers:
    losses = {n: (2.0 / n * (spoil if n >= at else 1.0)).hex() for n in range(1, STEPS + 1)}
    return Numbers(losses, {n: (1.0 / n).hex() for n in losses})


def certificate(after: Numbers, **setting: object) -> Certificate:
    before = numbers()
    rows = [
        [TraceRow(n, float.fromhex(side.losses[n]), {"grad_norm": float.fromhex(side.norms[n])}) for n in side.losses]
        for side in (before, after)
    ]
    here = Setting(url="file:///run", run="r", step=0, entry=3, asked=STEPS, recorded=STEPS, same_devices=True)
    return judge(rows[0], rows[1], msgspec.structs.replace(here, **setting))


def problems(case: Case, found: Certificate, after: Numbers, code: int = 0) -> list[str]:
    return wrong(case, found, code, numbers(), after, STEPS)


def test_the_truth_is_in_the_numbers() -> None:
    assert truth(numbers(), numbers(), 1e-3) == BITWISE
    assert truth(numbers(), numbers(spoil=1 + 1e-9), 1e-3) == WITHIN
    assert truth(numbers(), numbers(spoil=1.002), 1e-3) == DIFFERENT
    assert truth(numbers(), numbers(spoil=float("nan")), 1e-3) == DIFFERENT
    norm = replace(numbers(), norms={**numbers().norms, 2: (0.5 + 1e-9).hex()})
    assert truth(numbers(), norm, 1e-3) == WITHIN, "not all bits are those of losses"


def test_the_example_notices_every_wrong_certificate() -> None:
    free, same = Case("free", ""), numbers()
    good = certificate(same)
    assert problems(Case("same", "", BITWISE), good, same) == []
    assert "has to say different" in problems(Case("data", "", DIFFERENT, fault="data"), good, same)[0]
    assert "the exit code is 50 with bitwise" in problems(free, good, same, 50)[0]

    far = numbers(spoil=1.5)
    assert (
        "numbers say different" in problems(free, msgspec.structs.replace(good, steps=certificate(far).steps), far)[0]
    )
    bad = certificate(far)
    assert problems(free, bad, far, 50) == []
    assert problems(Case("moment", "", DIFFERENT, bad.cause, fault="moment"), bad, far, 50) == []
    assert "has to name samples" in problems(Case("data", "", DIFFERENT, "samples", fault="data"), bad, far, 50)[0]
    assert "differ in threads" in problems(replace(free, names="threads"), bad, far, 50)[0]
    named = certificate(far, differences=("threads: 1 -> 2",))
    assert problems(replace(free, names="threads"), named, far, 50) == []

    few = msgspec.structs.replace(good, steps=good.steps[:-1])
    assert "3 steps were compared, and not 4" in problems(free, few, same)[0]
    other = replace(same, losses={**same.losses, 2: (1.0 + 1e-15).hex()})
    assert "are not those that the scripts have put down" in problems(free, good, other)[0]


def test_there_is_a_case_for_every_fault_and_every_verdict() -> None:
    assert {case.fault for case in CASES} - {None} == set(FAULTS)
    for cases in (CASES, [case for case in CASES if case.quick]):
        assert {case.verdict for case in cases} - {None} == {BITWISE, WITHIN, DIFFERENT}
        assert {case.cause for case in cases if case.fault} == {"samples", "rng", "optimizer", "scheduler"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [["--quick"], []], ids=["quick", "whole"])
def test_parity_demo(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "examples.parity", f"--out={tmp_path}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is True
    assert [case["name"] for case in report["cases"]] == [c.name for c in CASES if c.quick or not options]
    assert {c["name"]: c["cause"] for c in report["cases"] if c["name"] in FAULTS} == {
        "data": "samples", "rng": "rng", "moment": "optimizer", "schedule": "scheduler",
    }  # fmt: skip
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
