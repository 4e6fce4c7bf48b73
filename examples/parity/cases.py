"""What is compared with what, what has to come of it, and whether it did. Knows no processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpumove.parity.verdict import BITWISE, DIFFERENT, WITHIN, Certificate

HALF = {"batch": 0.5}
EXIT = {BITWISE: 0, WITHIN: 0, DIFFERENT: 50}


@dataclass(frozen=True)
class Case:
    """A job that goes on from a checkpoint of another one."""

    name: str
    what: str
    """What is not as it was, in some words."""
    verdict: str | None = None
    """What has to come of it; None: whatever the numbers of both jobs say."""
    cause: str | None = None
    names: str = ""
    """What the certificate has to name as a difference of the machines, where it makes one."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Of the script, instead of those that the first job had."""
    env: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1
    fault: str | None = None
    """Of the resume: examples/parity/broken.py."""
    dropout: bool = True
    """Which of the two first jobs it goes on from."""
    quick: bool = False


CASES = (
    Case("same", "nothing else", BITWISE, quick=True),
    Case("threads", "two threads", names="threads", options={"threads": 2}, quick=True),
    Case("precision", "bfloat16 products", names="precision", options={"precision": "medium"}),
    Case("kernels", "AVX2 kernels", names="AVX2", env={"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}),
    Case("ranks", "two ranks", WITHIN, names="1 rank then, 2 now", options=HALF, ranks=2, dropout=False, quick=True),
    Case("masks", "two ranks, dropout", DIFFERENT, "world_size", options=HALF, ranks=2),
    Case("batch", "half the batch", DIFFERENT, "samples", options=HALF),
    Case("data", "data one batch on", DIFFERENT, "samples", fault="data", quick=True),
    Case("rng", "generators lost", DIFFERENT, "rng", fault="rng", quick=True),
    Case("moment", "a moment zeroed", DIFFERENT, "optimizer", fault="moment", quick=True),
    Case("schedule", "rate one step on", DIFFERENT, "scheduler", fault="schedule", quick=True),
)


@dataclass(frozen=True)
class Numbers:
    """What a script has put down itself, by step, every bit of it."""

    losses: Mapping[int, str]
    norms: Mapping[int, str]


def truth(before: Numbers, after: Numbers, tolerance: float) -> str:
    """The verdict by the scripts' own records, of all steps that the second one has done."""
    both = ((before.losses, after.losses), (before.norms, after.norms))
    if all(one[step] == other[step] for one, other in both for step in other):
        return BITWISE
    losses = [(float.fromhex(before.losses[step]), float.fromhex(loss)) for step, loss in after.losses.items()]
    return WITHIN if all(abs(a - b) <= tolerance * abs(a) for a, b in losses) else DIFFERENT


def wrong(case: Case, found: Certificate, exit_code: int, before: Numbers, after: Numbers, steps: int) -> list[str]:
    """In what the certificate is not right; an empty list is the point of it all.

    Args:
        case: what was done.
        found: what was said of it.
        exit_code: of ``gpumove certify``.
        before: what the first job has put down.
        after: and the second one.
        steps: that were asked for.
    """
    said, first = [], found.setting.step + 1
    if [step.step for step in found.steps] != list(range(first, first + steps)):
        said.append(f"{len(found.steps)} steps were compared, and not {steps} from step {first} on")
    for step in found.steps:
        told = (before.losses.get(step.step), after.losses.get(step.step))
        if (_bits(step.before), _bits(step.after)) != told:
            said.append(f"step {step.step}: the losses are not those that the scripts have put down")
    if exit_code != EXIT.get(found.verdict):
        said.append(f"the exit code is {exit_code} with {found.verdict}")
    known = truth(before, after, found.tolerance)
    if case.fault is None and found.verdict != known:
        said.append(f"it says {found.verdict}, and the scripts' own numbers say {known}")
    if case.verdict is not None and found.verdict != case.verdict:
        said.append(f"it says {found.verdict}, and has to say {case.verdict}")
    if case.cause is not None and found.cause != case.cause:
        said.append(f"it names {found.cause or 'no cause'}, and has to name {case.cause}")
    if found.verdict != BITWISE and case.names not in found.why + " ".join(found.setting.differences):
        said.append(f"it does not say that the machines differ in {case.names}")
    return said


def _bits(loss: float | str | None) -> str | None:
    return loss.hex() if isinstance(loss, float) else None
