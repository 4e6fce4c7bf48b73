"""Whether this installation has the loops in C, and what they take. The only place that decides; knows no format.

``core`` is None where no C compiler was when gpumove was installed. Everything then runs on numpy, to the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, cast

Buffer = Any
"""Bytes at any address, in C order."""

_STEP = struct.Struct("<4B5B3x5f")
_PREDECESSOR = 255


class Core(Protocol):
    """``gpumove/format/native/module.c``. A ``layout`` is a stream's header up to its lanes; ``step``: see below."""

    def split(
        self, layout: bytes, step: bytes, words: Buffer, bases: tuple[Buffer, ...], lanes: tuple[Buffer, ...], rare: int
    ) -> tuple[int, ...]:
        """Subtract, transform, and cut into ``lanes``, one buffer for each (None: it is not wanted).

        ``rare``: the set of lanes, one bit each, whose values that are not the background are counted; if there are
        none, their buffers are not written.
        """

    def join(
        self, layout: bytes, step: bytes, words: Buffer, bases: tuple[Buffer, ...], lanes: tuple[Buffer, ...]
    ) -> None:
        """The inverse. A lane that is None is all background; that of a constant has one word."""

    def count(self, width: int, transform: int, words: Buffer) -> bytes:
        """For every byte of the transformed words 256 counts, as 32-bit integers."""

    def pack(self, kind: int, plane: Buffer, background: int, limit: int) -> tuple[bytes, bytes] | None:
        """A sparse or quads block's two pieces; None if there are more than ``limit`` other values."""

    def others(self, kind: int, codes: Buffer, size: int) -> int:
        """How many bytes the second piece has."""

    def spread(self, kind: int, codes: Buffer, background: int, others: Buffer, plane: Buffer) -> None:
        """The inverse of ``pack``."""

    def fold(self, plane: Buffer, out: Buffer) -> bool:
        """Seven bits per byte; False if a top bit is set."""

    def unfold(self, folded: Buffer, plane: Buffer) -> None:
        """The inverse."""

    def estimate(self, old: Buffer, new: Buffer, weight: float, out: Buffer) -> None:
        """Gradients as bfloat16."""

    def rounded(self, dtype: int, wide: Buffer, out: Buffer) -> None:
        """float32 as a 16-bit type."""


NOTHING = b""
"""The step that subtracts nothing."""
PREDECESSOR = _STEP.pack(_PREDECESSOR, 0, 0, 1, *[0] * 10)
"""The step whose one base is subtracted itself."""


def packed(formula: int, flags: int, repeats: int, dtypes: Sequence[int], scalars: Sequence[float]) -> bytes:
    """The step that subtracts a prediction."""
    kinds, numbers = [*dtypes, *[0] * (5 - len(dtypes))], [*scalars, *[0.0] * (5 - len(scalars))]
    return _STEP.pack(formula, flags, repeats, len(dtypes), *kinds, *numbers)


def _load() -> Core | None:
    try:
        return cast("Core", import_module("gpumove.format._native"))
    except ImportError:
        return None


core = _load()
