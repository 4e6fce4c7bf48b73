"""The codecs that are compared, each behind one small contract: encode the chunks of a family, and give them back."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import zstandard

from benchmarks.codec.states import Family, Member
from gpumove.format.codec import decode, digest
from gpumove.format.coding import Coded, Coder, Field, Hyper, Rule

BASES = ("gpumove base", "zipnn", "zstd 1", "zstd 3")
DELTAS = ("xor + zstd 3", "gpumove sub", "gpumove")


class Job(NamedTuple):
    """A family's chunks to encode: the members in ``which``, so many optimizer steps after their predecessors."""

    family: Family
    which: tuple[int, ...]
    steps: int

    @property
    def members(self) -> list[Member]:
        """Those that are encoded."""
        return [self.family.members[n] for n in self.which]


class Codec(abc.ABC):
    """One way to code. ``ready`` and ``open`` are not timed; ``encode`` and ``decode`` are."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abc.abstractmethod
    def ready(self, job: Job) -> Any:
        """What encode takes."""

    @abc.abstractmethod
    def encode(self, ready: Any) -> list[Any]:
        """One result per member that is encoded; None where nothing has to be stored."""

    @abc.abstractmethod
    def open(self, job: Job, coded: Sequence[Any]) -> list[Callable[[], Any]]:
        """For each result, a call that decodes it and gives the bytes."""

    def size(self, coded: Any) -> int:
        """Stored bytes of one result."""
        return 0 if coded is None else len(coded)

    def way(self, coded: Any) -> str:
        """What it was stored as, where a codec has several ways."""
        return self.name


class Ours(Codec):
    """gpumove, as a save uses it.

    "base" knows no predecessor, "sub" the predecessor but no optimizer, "best" all there is to know. What is unchanged
    is not encoded. ``forgets``: how to encode is chosen anew for each chunk, as for a tensor that has only one.
    """

    def __init__(self, name: str, kind: str, *, forgets: bool = False) -> None:
        super().__init__(name)
        self._kind, self._forgets = kind, forgets
        self._coder = Coder()

    def ready(self, job: Job) -> tuple[list[Field], Rule | None, Job]:
        best = self._kind == "best"
        fields = []
        for n, m in enumerate(job.family.members):
            delta = self._kind != "base"
            clean = n not in job.which or (delta and m.new == m.old)
            role = m.role if best or self._kind == "base" else ""
            fields.append(Field(role, m.dtype, m.new, m.old if delta else None, clean))
        return fields, rule_of(job) if best else None, job

    def encode(self, ready: tuple[list[Field], Rule | None, Job]) -> list[Coded | None]:
        fields, rule, job = ready
        key = None if self._forgets else (job.family.name, job.steps, job.which)
        found = self._coder.encode(fields, rule, key=key)
        return [found[n] for n in job.which]

    def open(self, job: Job, coded: Sequence[Coded | None]) -> list[Callable[[], Any]]:
        members = job.family.members
        calls: list[Callable[[], Any]] = []
        for member, found in zip(job.members, coded):
            if found is None:
                calls.append(partial(memoryview, member.old))
                continue
            bases = [members[s.field].old if s.old else members[s.field].new for s in found.bases]
            calls.append(_Decode(found, bases, _room(len(member.new)), digest(member.new)))
        return calls

    def size(self, coded: Coded | None) -> int:
        return 0 if coded is None else len(coded.stored)

    def way(self, coded: Coded | None) -> str:
        return "unchanged" if coded is None else coded.codec


class _Decode:
    """One chunk to decode into memory that is there already, as a restore has it."""

    def __init__(self, coded: Coded, bases: Sequence[memoryview], out: memoryview, expected: str) -> None:
        self._coded, self._bases, self._out, self._expected = coded, bases, out, expected

    def __call__(self) -> memoryview:
        stored = memoryview(self._coded.stored)
        decode(self._coded.codec, stored, self._out, bases=self._bases, expected=self._expected)
        return self._out


def _room(nbytes: int) -> memoryview:
    """Memory that has been written to before: a page's first touch is no part of a codec."""
    return memoryview(np.ones(nbytes, np.uint8))


def rule_of(job: Job) -> Rule | None:
    """What a save knows of the optimizer: its numbers at the predecessor, and now."""
    before, now = job.family.before, job.family.now
    if not now:
        return None
    tries = tuple(dict.fromkeys(_hyper(rates, now["step"]) for rates in (before, now)))
    return Rule("adam" if "beta1" in now else "momentum", round(now["step"] - before["step"]), tries)


def _hyper(rates: dict[str, float], step: float) -> Hyper:
    known = {name: value for name, value in rates.items() if name in Hyper._fields}
    return Hyper(**{**known, "step": round(step)})


class Zstd(Codec):
    """Plain Zstandard of each chunk, or of its XOR with the predecessor."""

    def __init__(self, name: str, level: int, *, xor: bool = False) -> None:
        super().__init__(name)
        self._xor = xor
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._decompressor = zstandard.ZstdDecompressor()

    def ready(self, job: Job) -> list[tuple[memoryview, memoryview]]:
        return [(m.old, m.new) for m in job.members]

    def encode(self, ready: list[tuple[memoryview, memoryview]]) -> list[Any]:
        return [self._compressor.compress(_xored(new, old) if self._xor else new) for old, new in ready]

    def open(self, job: Job, coded: Sequence[Any]) -> list[Callable[[], Any]]:
        return [partial(self._decode, c, m.old) for m, c in zip(job.members, coded)]

    def _decode(self, coded: bytes, old: memoryview) -> Any:
        found = self._decompressor.decompress(coded)
        return _xored(found, old) if self._xor else found


def _xored(a: Any, b: memoryview) -> memoryview:
    return memoryview(np.bitwise_xor(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)))


class ZipNN(Codec):
    """The zipnn package, one thread. It overwrites what it is given, so it gets copies before the clock starts."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        from zipnn import ZipNN as Package

        self._of = {
            dtype: Package(input_format="byte", bytearray_dtype=dtype, threads=1) for dtype in ("float32", "bfloat16")
        }

    def ready(self, job: Job) -> list[tuple[str, bytearray]]:
        return [(m.dtype, bytearray(m.new)) for m in job.members]

    def encode(self, ready: list[tuple[str, bytearray]]) -> list[Any]:
        return [self._of[dtype].compress(data) for dtype, data in ready]

    def open(self, job: Job, coded: Sequence[Any]) -> list[Callable[[], Any]]:
        return [partial(self._of[m.dtype].decompress, bytearray(c)) for m, c in zip(job.members, coded)]


def present() -> bool:
    """Whether ZipNN is installed: it is built from source, so it is no part of what development needs."""
    return find_spec("zipnn") is not None


def make(name: str) -> Codec:
    """A codec by its name."""
    kinds: dict[str, Callable[[], Codec]] = {
        "gpumove base": lambda: Ours(name, "base"),
        "gpumove sub": lambda: Ours(name, "sub"),
        "gpumove": lambda: Ours(name, "best"),
        "zipnn": lambda: ZipNN(name),
        "zstd 1": lambda: Zstd(name, 1),
        "zstd 3": lambda: Zstd(name, 3),
        "xor + zstd 3": lambda: Zstd(name, 3, xor=True),
    }
    return kinds[name]()
