"""What to read of which objects, and what to decode together. Decides only: records in, ranges out, no I/O."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from gpumove.format.stored import Placed, Spot, Stored, closure

_GAP = 256 << 10
"""Ranges closer than this are fetched as one: a request costs more than the bytes between."""
_RANGE = 16 << 20


class Wanted(NamedTuple):
    """A chunk that somebody needs.

    ``use`` gets its decoded, verified bytes, which are gone when it returns. Where ``into`` is given, the bytes are
    left there instead: what is coded is then decoded in place.
    """

    name: str
    placed: Placed
    use: Callable[[memoryview], None]
    into: memoryview | None = None


class Span(NamedTuple):
    """Bytes of one pack that are read together."""

    key: str
    start: int
    stop: int


@dataclass
class Group:
    """Chunks that are decoded from each other, or that merely lie side by side, in the order of decoding."""

    nodes: dict[Spot, Stored] = field(default_factory=dict)
    wanted: dict[Spot, list[Wanted]] = field(default_factory=lambda: defaultdict(list))

    @property
    def stored_bytes(self) -> int:
        """Bytes to read."""
        return sum(node.length for node in self.nodes.values())

    @property
    def held_bytes(self) -> int:
        """Most bytes that reading and decoding it holds: all that is read, and what is decoded and still needed."""
        waiting = Counter(base.spot for node in self.nodes.values() for base in node.bases)
        sizes: dict[Spot, int] = {}
        peak = 0
        for spot, node in self.nodes.items():
            sizes[spot] = node.nbytes
            peak = max(peak, sum(sizes.values()))
            waiting.subtract(base.spot for base in node.bases)
            for done in {spot, *(base.spot for base in node.bases)}:
                if not waiting[done]:
                    sizes.pop(done, None)
        return self.stored_bytes + peak

    def take(self, other: Group) -> None:
        """Join another group to this one."""
        self.nodes.update(other.nodes)
        for spot, wanted in other.wanted.items():
            self.wanted[spot] += wanted


def spans(nodes: Iterable[Stored]) -> list[Span]:
    """What to read of which packs: neighbours joined, each chunk once."""
    by_pack: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for node in nodes:
        by_pack[node.spot.key].add((node.at, node.length))
    found: list[Span] = []
    for key, spots in by_pack.items():
        last: Span | None = None
        for at, length in sorted(spots):
            if last and at <= last.stop + _GAP and at + length - last.start <= _RANGE:
                last = found[-1] = last._replace(stop=max(last.stop, at + length))
            else:
                # Rounded down, so that chunks keep in the buffer the alignment that they have in the object.
                last = Span(key, at & ~63, at + length)
                found.append(last)
    return found


def groups(wanted: Iterable[Wanted], *, here: Container[Spot] = ()) -> list[Group]:
    """Wanted chunks in groups that can be read and decoded apart, each about as large as one read. Largest first.

    Chunks that share a base, directly or not, are in one group, so that each is read and decoded once.

    Args:
        wanted: what is needed.
        here: what need not be read, nor what it is decoded from.
    """
    families: dict[Spot, Group] = {}
    for want in wanted:
        node = want.placed.stored
        if node is None or node.spot in here:
            continue
        mine = families.get(node.spot) or Group()
        for spot, needed in closure([node], known=here).items():
            other = families.get(spot)
            if other is not None and other is not mine:
                mine, other = (mine, other) if len(mine.nodes) >= len(other.nodes) else (other, mine)
                mine.take(other)
                families.update(dict.fromkeys(other.nodes, mine))
            mine.nodes.setdefault(spot, needed)
            families[spot] = mine
        mine.wanted[node.spot].append(want)
    return sorted(_joined({id(g): g for g in families.values()}.values()), key=lambda g: -g.stored_bytes)


def _joined(apart: Iterable[Group]) -> list[Group]:
    """Small groups put together, in the order in which they lie in their packs."""
    found: list[Group] = []
    size = 0
    for group in sorted(apart, key=lambda g: next(iter(g.wanted))):
        nbytes = group.stored_bytes
        if not found or size + nbytes > _RANGE:
            found.append(Group())
            size = 0
        found[-1].take(group)
        size += nbytes
    return found


def batches(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Wanted chunks in runs that are worth a thread's while."""
    batch: list[Wanted] = []
    size = 0
    for want in wanted:
        batch.append(want)
        size += want.placed.nbytes
        if size >= _RANGE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
