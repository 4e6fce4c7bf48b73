"""How small: every tensor of a state through a codec and back, compared bit for bit. Knows no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from benchmarks.codec.peers import Codec, Job
from benchmarks.codec.states import Family

CHUNK_BYTES = 4 << 20
_LARGEST_ITEM = 4


@dataclass
class Total:
    """What one codec made of one state. Bytes by (role, whether dense): raw and stored."""

    regime: str
    distance: int
    codec: str
    raw: Counter[tuple[str, bool]] = field(default_factory=Counter)
    stored: Counter[tuple[str, bool]] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Tensors that came back with other bytes; there must be none."""
    larger: int = 0
    """Chunks that are stored in more bytes than they have."""

    def fraction(self, *, dense: bool = True, role: str | None = None) -> float | None:
        """Stored bytes over raw ones; None where there are none. ``dense``: without the input embedding."""
        keys = [key for key in self.raw if (key[1] or not dense) and role in (None, key[0])]
        raw = sum(self.raw[key] for key in keys)
        return sum(self.stored[key] for key in keys) / raw if raw else None


def chunks(families: Iterable[Family]) -> Iterator[Family]:
    """As a save cuts them: all members of a family in the same boxes."""
    for family in families:
        yield from family.cut(CHUNK_BYTES // _LARGEST_ITEM)


def only(families: Iterable[Family], role: str) -> Iterator[Family]:
    """The members of one role by themselves, as if a checkpoint held nothing else."""
    for family in families:
        kept = tuple(replace(m, role="parameter") for m in family.members if m.role == role)
        if kept:
            yield Family(family.name, kept, {}, {})


def measure(regime: str, distance: int, codec: Codec, families: Iterable[Family]) -> Total:
    """Encode and decode it all."""
    total = Total(regime, distance, codec.name)
    for chunk in chunks(families):
        job = Job(chunk, tuple(range(len(chunk.members))), distance)
        coded = codec.encode(codec.ready(job))
        for member, found, call in zip(job.members, coded, codec.open(job, coded)):
            key = (member.role, chunk.dense)
            total.raw[key] += len(member.new)
            total.stored[key] += codec.size(found)
            total.ways[codec.way(found)] += len(member.new)
            total.larger += codec.size(found) > len(member.new)
            if memoryview(call()) != member.new:
                total.wrong.append(f"{chunk.name} {member.role}")
    return total
