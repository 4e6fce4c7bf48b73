"""Recorded rows against rows of the same steps trained again: which numbers differ, where first, and by how much. Pure.

A row is compared where both sides know a number. What differs by nature, such as random draws at another number of
ranks, is no evidence against; what was not recorded is none for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from gpumove.format.manifest import TraceRow
from gpumove.parity.trace import number, word
from gpumove.words import count

SAME_DEVICES, OTHER_DEVICES = 0.001, 0.005
"""Tolerances of a loss, relative."""
_LR = 1e-6
"""A learning rate is computed on the host; more than a last digit of another mathematical library is another rate."""
_ONSET = {"loss": 2e-6, "grad_norm": 1e-5}
"""Where bits can be expected, a first difference above these is no rounding: 16 units in the last place of a float32
loss, and a gradient norm, in which rounding adds up."""
_FLOOR = 0.01
"""Of the largest loss: differences of losses nearer to zero are relative to this, since they may cross it."""
NUMBERS = ("loss", "grad_norm")
STATE = ("samples", "rank_samples", "lr")
"""Facts that are the same or are not: rounding does not touch them."""
DICE = ("rng", "rng_device")
"""Likewise, but nothing need have drawn from them."""
_ALL = (*STATE, *DICE, *NUMBERS)
_BFLOAT16_BITS, _BFLOAT16_STEP = 8, 2.0**-7


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared with what."""

    url: str
    run: str
    step: int
    """Of the checkpoint that the steps follow."""
    entry: int
    asked: int
    recorded: int = 0
    """Steps that there are to compare with, at most as many as were asked for."""
    world_sizes: tuple[int, int] = (1, 1)
    same_devices: bool | None = None
    same_kind: bool = True
    """Both sides compute on GPUs, or both on the host: then random numbers are drawn in the same place."""
    differences: tuple[str, ...] = ()
    """Of the machines, in words: those that may change how numbers are rounded."""
    reproducible: bool = False
    """The machine gives the same bits every time: no device, or deterministic algorithms."""
    tolerance: float | None = None

    @property
    def ranks(self) -> str:
        """Both numbers, in words."""
        return f"{count(self.world_sizes[0], 'rank')} then, {self.world_sizes[1]} now"


class Table:
    """Every step's differences, and what they are measured by."""

    def __init__(self, pairs: Sequence[tuple[TraceRow, TraceRow]], setting: Setting) -> None:
        """Compare them all."""
        self.setting = setting
        self.same_world = setting.world_sizes[0] == setting.world_sizes[1]
        self.pairs = {b.step: (b, a) for b, a in pairs}
        self.differs: dict[int, tuple[str, ...]] = {}
        self.known: dict[int, tuple[str, ...]] = {}
        scale = {name: _FLOOR * max((_size(b, name) for b, _ in pairs), default=0.0) for name in _ONSET}
        self.relative: dict[str, dict[int, float]] = {name: {} for name in _ONSET}
        for b, a in pairs:
            names = [n for n in _ALL if self._counts(n) and _value(b, n) is not None and _value(a, n) is not None]
            self.known[b.step] = tuple(names)
            self.differs[b.step] = tuple(n for n in names if not _equal(n, _value(b, n), _value(a, n)))
            for name in set(names) & set(_ONSET):
                self.relative[name][b.step] = _relative(number(b, name), number(a, name), scale[name])
        self.losses = self.relative["loss"]
        self.coarse = _is_coarse([n for pair in pairs for row in pair if (n := row.loss) is not None])
        usual = SAME_DEVICES if setting.same_devices is not False else OTHER_DEVICES
        tolerance = usual if setting.tolerance is None else setting.tolerance
        self.tolerance = max(tolerance, _BFLOAT16_STEP) if self.coarse else tolerance

    def _counts(self, name: str) -> bool:
        """Whether a difference in it would be evidence."""
        if name == "rng_device":
            return self.same_world and self.setting.same_devices is True
        if name == "rng":
            return self.same_world and self.setting.same_kind
        return self.same_world or name != "rank_samples"

    @property
    def same_machine(self) -> bool:
        """Whether nothing is known that could change how numbers are rounded."""
        return self.same_world and self.setting.same_devices is True and not self.setting.differences

    def first(self, facts: Sequence[str]) -> tuple[int, str] | None:
        """The first step in which one of these differs, and which."""
        for step, names in self.differs.items():
            if found := [name for name in facts if name in names]:
                return step, found[0]
        return None

    def beyond(self) -> tuple[int, str] | None:
        """The first step whose numbers cannot be those of the same job."""
        over = next((step for step, relative in self.losses.items() if relative > self.tolerance), None)
        jump = self._jump()
        if jump is not None and (over is None or jump[0] <= over):
            return jump
        return None if over is None else (over, "loss")

    def _jump(self) -> tuple[int, str] | None:
        """The first difference, if bits could be expected up to there and it is no rounding.

        They can where the machine is the same, and gives the same bits every time or has just done so: a gradient norm
        that is equal in every bit was summed over every gradient.
        """
        onset = self.first(NUMBERS)
        if onset is None or not self.same_machine:
            return None
        earlier = [step for step in self.known if step < onset[0]]
        if not self.setting.reproducible and not any("grad_norm" in self.known[step] for step in earlier):
            return None
        step, _ = onset
        large = [name for name, most in _ONSET.items() if self.relative[name].get(step, 0.0) > most]
        return (step, large[0]) if large else None


# -------------------------------------------------------------------- numbers


def _value(row: TraceRow, name: str) -> float | str | None:
    if name in ("loss", "grad_norm", "lr"):
        return number(row, name)
    found = row.facts.get(name)
    return found if isinstance(found, str) else None


def said(row: TraceRow, name: str) -> float | str | None:
    """A fact of a row as JSON has it."""
    value = _value(row, name)
    return (word(value) or value) if isinstance(value, float) else value


def _equal(name: str, before: float | str | None, after: float | str | None) -> bool:
    if name == "lr" and isinstance(before, float) and isinstance(after, float):
        return before == after or _relative(before, after, 0.0) <= _LR
    return repr(before) == repr(after)  # so that nan is nan, and -0.0 is not 0.0


def _size(row: TraceRow, name: str) -> float:
    value = number(row, name)
    return abs(value) if value is not None and math.isfinite(value) else 0.0


def _relative(before: float | None, after: float | None, scale: float) -> float:
    if before is None or after is None or repr(before) == repr(after):
        return 0.0
    if not math.isfinite(before) or not math.isfinite(after):
        return math.inf
    size = max(abs(before), scale)
    return abs(after - before) / size if size else math.inf


def _is_coarse(losses: Sequence[float]) -> bool:
    """Whether all of these are numbers that bfloat16 has; few equal ones may be so by chance."""
    return len(set(losses)) > 3 and all(_bits(loss) <= _BFLOAT16_BITS for loss in losses)


def _bits(value: float) -> int:
    whole = int(abs(math.frexp(value)[0]) * (1 << 53)) if math.isfinite(value) else 0
    return whole.bit_length() - ((whole & -whole).bit_length() - 1) if whole else 0
