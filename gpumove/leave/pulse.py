"""Who is there: every rank writes a sign of life while the job leaves, and watches those of the others.

Signs are compared by this rank's own clock: none of another machine's matters.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from gpumove.leave.board import Board

BEAT_S = 0.25
"""Seconds between two signs."""


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """A sign of life: a number that grows, the step told last, whether the training thread waits right
    there, and whether it is in something that takes long."""

    number: int
    step: int
    waiting: bool = False
    busy: bool = False
    ended: bool = False
    """The last sign: this rank's part in it is over."""


@dataclass
class _Seen:
    beat: Beat | None
    since: float


class Pulses:
    """What this rank has seen of the others."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._seen: dict[int, _Seen] = {}
        self._looked = 0.0

    def show(self, rank: int, beat: Beat) -> None:
        """Give a sign."""
        self._board.put(f"beat/{rank}", msgspec.msgpack.encode(beat))

    def look(self, ranks: Iterable[int]) -> None:
        """See what is new. More often than signs are given would be no use."""
        now = time.monotonic()
        if now - self._looked < BEAT_S:
            return
        self._looked = now
        for rank in ranks:
            data = self._board.get(f"beat/{rank}")
            beat = None if data is None else msgspec.msgpack.decode(data, type=Beat)
            if rank not in self._seen or self._seen[rank].beat != beat:
                self._seen[rank] = _Seen(beat, now)

    def beats(self, ranks: Iterable[int]) -> dict[int, Beat]:
        """The last signs of those that gave one."""
        found = {rank: self._seen[rank].beat for rank in ranks if rank in self._seen}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def silent(self, ranks: Iterable[int], silent_s: float) -> list[int]:
        """Which of them are gone: they said so, or have given no sign for so long."""
        now = time.monotonic()
        return [
            rank
            for rank in ranks
            if (seen := self._seen.get(rank)) is not None
            and ((seen.beat is not None and seen.beat.ended) or now - seen.since > silent_s)
        ]


def meeting_place(beats: Iterable[Beat]) -> int:
    """The first step that nobody of these has passed: where the farthest wait, or the one behind it."""
    there = list(beats)
    farthest = max(beat.step for beat in there)
    return farthest if all(beat.waiting for beat in there if beat.step == farthest) else farthest + 1
