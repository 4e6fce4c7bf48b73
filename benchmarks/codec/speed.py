"""How fast: encode and decode of the same chunks, codec by codec in turns. Knows no regime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from benchmarks.codec.peers import Codec, Job
from benchmarks.codec.ratios import CHUNK_BYTES
from benchmarks.codec.states import Family, Member

_MEGA = 1e6


@dataclass
class Pace:
    """One codec on one kind of buffer: for every chunk, the seconds of every round."""

    buffer: str
    codec: str
    raw_bytes: int
    stored_bytes: int = 0
    encode_s: list[list[float]] = field(default_factory=list)
    decode_s: list[list[float]] = field(default_factory=list)
    pairs_s: dict[str, list[float]] = field(default_factory=dict)
    """Wall clock of all chunks on one thread and on two, by "encode 1", "encode 2", "decode 1", "decode 2"."""
    wrong: int = 0

    @property
    def encode_mb_s(self) -> float:
        """Raw megabytes per second: every chunk at its best."""
        return self._rate(self.encode_s)

    @property
    def decode_mb_s(self) -> float:
        """The same of decoding."""
        return self._rate(self.decode_s)

    def _rate(self, rounds: Sequence[Sequence[float]]) -> float:
        return self.raw_bytes / _MEGA / sum(map(min, zip(*rounds)))

    def gain(self, verb: str) -> float:
        """Two threads over one: the best of each."""
        return min(self.pairs_s[f"{verb} 1"]) / min(self.pairs_s[f"{verb} 2"])


@dataclass(frozen=True)
class Task:
    """A codec on a kind of buffer."""

    buffer: str
    codec: Codec
    jobs: list[Job]

    def raw_bytes(self) -> int:
        """Of all that is encoded."""
        return sum(len(m.new) for job in self.jobs for m in job.members)


def joined(families: Sequence[Family]) -> Family:
    """One family out of many, member by member, so that chunks are as large as those of a large model.

    What their optimizer does to them has to be the same.
    """
    members = []
    for place, first in enumerate(families[0].members):
        old, new = (b"".join(getattr(f.members[place], side) for f in families) for side in ("old", "new"))
        members.append(Member(first.role, first.dtype, first.item_bytes, memoryview(old), memoryview(new)))
    return Family("joined", tuple(members), families[0].before, families[0].now)


def cut(family: Family, which: tuple[int, ...], steps: int) -> list[Job]:
    """Whole chunks only."""
    elements = CHUNK_BYTES // max(m.item_bytes for m in family.members)
    whole = [c for c in family.cut(elements) if len(c.members[0].new) == elements * c.members[0].item_bytes]
    return [Job(chunk, which, steps) for chunk in whole or [family]]


def measure(tasks: Sequence[Task], *, rounds: int) -> list[Pace]:
    """All tasks in turns, ``rounds`` times, one thread."""
    paces = [Pace(task.buffer, task.codec.name, task.raw_bytes()) for task in tasks]
    for number in range(rounds + 1):
        for task, pace in zip(tasks, paces):
            encode, decode = _once(task, pace, compare=number == 0)
            if number:  # the first time, memory and choices are still new
                pace.encode_s.append(encode)
                pace.decode_s.append(decode)
    return paces


def _once(task: Task, pace: Pace, *, compare: bool) -> tuple[list[float], list[float]]:
    encode, decode = [], []
    for job in task.jobs:
        ready = task.codec.ready(job)
        began = perf_counter()
        coded = task.codec.encode(ready)
        encode.append(perf_counter() - began)
        calls = task.codec.open(job, coded)
        began = perf_counter()
        found = [call() for call in calls]
        decode.append(perf_counter() - began)
        if compare:
            pace.stored_bytes += sum(map(task.codec.size, coded))
            pace.wrong += sum(memoryview(f) != m.new for f, m in zip(found, job.members))
    return encode, decode


def measure_pairs(tasks: Sequence[Task], paces: Sequence[Pace], *, rounds: int) -> None:
    """The same tasks on one thread and on two, in turns. Adds to the paces."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as two:
        for _ in range(rounds + 1):
            for task, pace in zip(tasks, paces):
                ready = [task.codec.ready(job) for job in task.jobs]
                for count, pool in ((1, one), (2, two)):
                    coded = _timed(pace, f"encode {count}", pool, task.codec.encode, ready)
                    calls = [task.codec.open(job, found) for job, found in zip(task.jobs, coded)]
                    _timed(pace, f"decode {count}", pool, lambda chunk: [call() for call in chunk], calls)
    for pace in paces:
        pace.pairs_s = {name: seconds[1:] for name, seconds in pace.pairs_s.items()}


def _timed(
    pace: Pace, name: str, pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]
) -> list[Any]:
    began = perf_counter()
    found = list(pool.map(function, items))
    pace.pairs_s.setdefault(name, []).append(perf_counter() - began)
    return found
