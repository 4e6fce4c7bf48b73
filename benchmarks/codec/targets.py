"""What the codecs have to reach, and whether they did. Pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.codec.ratios import Total
from benchmarks.codec.speed import Pace
from benchmarks.report import Verdict

OURS = "gpumove"
BASE, SUB, BEST = "gpumove base", "gpumove sub", "gpumove"
WEIGHTS = "bf16 weights"
FP32 = ("parameter", "exp_avg", "exp_avg_sq")
ONE, TEN, NARROW = "gpumove, 1 step", "gpumove, 10 steps", "gpumove, 1 step, bf16 gradients"
CHOOSING = "gpumove, 1 step, and the choice"


@dataclass(frozen=True)
class Size:
    """Stored over raw, at most. Distance 0: without a predecessor. ``whole``: with the input embedding."""

    regime: str
    distance: int
    at_most: float
    whole: bool = False


SIZES = (
    Size("mixed", 0, 0.72),
    Size("mixed", 1, 0.25),
    Size("mixed-bf16", 1, 0.13),
    Size("mixed", 10, 0.65),
    Size("fp32", 0, 0.84),
    Size("fp32", 1, 0.30),
    Size("fp32", 10, 0.75),
    Size("finetune-mixed", 10, 0.58),
    Size(WEIGHTS, 0, 0.67),
    Size(WEIGHTS, 10, 0.40),
    Size("lora", 1, 0.02, whole=True),
    Size("lora", 10, 0.05, whole=True),
)


@dataclass(frozen=True)
class Speed:
    """MB/s of one codec over that of another, at least."""

    buffers: tuple[str, ...]
    codec: str
    verb: str
    other: str
    at_least: float


SPEEDS = (
    Speed((WEIGHTS,), BASE, "encode", "zipnn", 1.0),
    Speed((WEIGHTS,), BASE, "decode", "zipnn", 0.8),
    Speed(FP32, BASE, "encode", "zipnn", 2.0),
    Speed(FP32, BASE, "decode", "zipnn", 0.8),
    *(Speed(FP32, codec, verb, BASE, 0.5) for codec in (SUB, ONE, TEN, NARROW) for verb in ("encode", "decode")),
)
TWO_THREADS = 1.6


def size_verdicts(totals: Sequence[Total]) -> Iterator[Verdict]:
    """Of the regimes and distances that were measured."""
    for size in SIZES:
        codec = BASE if size.distance == 0 else BEST
        for total in totals:
            if (total.regime, total.distance, total.codec) != (size.regime, size.distance, codec):
                continue
            found = total.fraction(dense=not size.whole)
            words = "base" if size.distance == 0 else f"{size.distance} step{'s' * (size.distance > 1)}"
            what = f"{words}, {'whole state' if size.whole else 'dense'}: {found:.3f} of raw, target {size.at_most}"
            yield Verdict(size.regime, OURS, what, found is not None and found <= size.at_most)


def total_rate(paces: Sequence[Pace], buffers: Sequence[str], codec: str, verb: str) -> float | None:
    """Raw MB/s over several kinds of buffers together."""
    found = [p for p in paces if p.codec == codec and p.buffer in buffers]
    if len(found) < len(buffers):
        return None
    seconds = sum(p.raw_bytes / getattr(p, f"{verb}_mb_s") for p in found)
    return sum(p.raw_bytes for p in found) / seconds


def speed_verdicts(paces: Sequence[Pace]) -> Iterator[Verdict]:
    """Against ZipNN, and against our own base."""
    for speed in SPEEDS:
        ours = total_rate(paces, speed.buffers, speed.codec, speed.verb)
        other = total_rate(paces, speed.buffers, speed.other, speed.verb)
        store = WEIGHTS if speed.buffers == (WEIGHTS,) else "fp32 state"
        if ours is None or other is None:
            yield Verdict(store, speed.codec, f"{speed.verb} could not be compared with {speed.other}", met=False)
            continue
        what = f"{speed.verb} {ours / other:.2f}x of {speed.other}, target {speed.at_least}"
        yield Verdict(store, speed.codec, what, ours / other >= speed.at_least)


def thread_verdicts(paces: Sequence[Pace]) -> Iterator[Verdict]:
    """Two threads against one."""
    for pace in paces:
        for verb in ("encode", "decode"):
            gain = pace.gain(verb)
            what = f"{verb} on two threads {gain:.2f}x of one, target {TWO_THREADS}"
            yield Verdict(pace.buffer, pace.codec, what, gain >= TWO_THREADS)


def exact_verdicts(totals: Sequence[Total], paces: Sequence[Pace]) -> Iterator[Verdict]:
    """Every decode gave the very bytes; nothing of ours is larger than raw."""
    wrong = [f"{t.regime} {t.codec}: {t.wrong[0]}" for t in totals if t.wrong]
    wrong += [f"{p.buffer} {p.codec}" for p in paces if p.wrong]
    tensors = len(totals) + len(paces)
    what = f"{tensors} states and buffers decoded bit for bit" + "".join(f"; WRONG: {w}" for w in wrong)
    yield Verdict("all", "all", what, not wrong)
    larger = sum(t.larger for t in totals if t.codec.startswith(OURS))
    yield Verdict("all", OURS, f"{larger} chunks are larger than raw", not larger)
