"""Stored chunks as a graph: each with its pack and what it is decoded from; to and from a part's record.

A part is complete in itself: it lists every chunk that one of its own is decoded from, however old, so that a reader
needs no other part. In memory these are nodes that point at each other; in the record they are numbers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from gpumove.errors import IntegrityError
from gpumove.format.boxes import Box
from gpumove.format.dtypes import item_bytes
from gpumove.format.manifest import Base, Chunk, Pack, Part, TensorEntry
from gpumove.format.pack import shape_bytes

_MAX_GROWTH = 16
"""A base is of the same box, so it is at most this much larger (float64 for an 8-bit copy); more is an attack."""


class Spot(NamedTuple):
    """Where a chunk's bytes lie: what makes two nodes the same chunk."""

    key: str
    at: int
    length: int


@dataclass(frozen=True, eq=False)
class Stored:
    """One stored chunk. ``nbytes`` are its decoded bytes."""

    pack: Pack
    at: int
    length: int
    codec: str
    digest: str
    nbytes: int
    bases: tuple[Stored, ...] = ()
    chain: int = field(init=False)
    """Earlier saves that a reader has to go through, one after the other, to decode it."""
    spot: Spot = field(init=False)
    """Where it lies."""

    def __post_init__(self) -> None:
        steps = (b.chain + (b.pack.attempt != self.pack.attempt) for b in self.bases)
        object.__setattr__(self, "chain", max(steps, default=0))
        object.__setattr__(self, "spot", Spot(self.pack.key, self.at, self.length))


class Placed(NamedTuple):
    """A box of a tensor and its bytes: a stored chunk, or the base64 text that travels in the part.

    ``nbytes`` are decoded.
    """

    box: Box
    nbytes: int
    stored: Stored | None
    inline: str | None = None


def closure(nodes: Iterable[Stored], *, known: Container[Spot] = ()) -> dict[Spot, Stored]:
    """The nodes and all that they are decoded from, bases before those that need them; ``known`` ones are left out."""
    found: dict[Spot, Stored] = {}
    for node in nodes:
        todo = [(node, False)]  # no recursion: a chain may be longer than the interpreter's stack
        while todo:
            at, ready = todo.pop()
            if at.spot in found or at.spot in known:
                continue
            if ready or not at.bases:
                found[at.spot] = at
            else:
                todo.append((at, True))
                todo += ((base, False) for base in at.bases)
    return found


class Shelf:
    """The stored chunks of a part that was read."""

    def __init__(self, part: Part) -> None:
        """Rebuild the nodes of ``Part.bases``.

        Raises:
            IntegrityError: a record points where there is nothing.
        """
        self._part, self._name = part, f"parts/{part.attempt}/{part.rank:06d}"
        self._nodes: list[Stored] = []
        for base in part.bases:
            self._nodes.append(self._node(base, base.nbytes))

    def _node(self, record: Chunk | Base, nbytes: int) -> Stored:
        if not 0 <= record.pack < len(self._part.packs):
            raise IntegrityError(f"{self._name}: a chunk lies in a pack that the part does not list")
        if any(not 0 <= n < len(self._nodes) for n in record.bases):
            raise IntegrityError(f"{self._name}: a chunk is decoded from one that the part does not list before it")
        if record.at < 0 or record.length < 0 or record.at + record.length > self._part.packs[record.pack].nbytes:
            raise IntegrityError(f"{self._name}: a chunk lies outside of its pack")
        bases = tuple(self._nodes[n] for n in record.bases)
        if any(base.nbytes > _MAX_GROWTH * nbytes for base in bases) or nbytes < 0:
            raise IntegrityError(f"{self._name}: a chunk is decoded from one of another size")
        pack = self._part.packs[record.pack]
        return Stored(pack, record.at, record.length, record.codec, record.digest, nbytes, bases)

    def placed(self, entry: TensorEntry) -> list[Placed]:
        """A tensor's chunks.

        Raises:
            IntegrityError: as above.
        """
        sizes = [shape_bytes(c.shape, item_bytes(entry.dtype)) for c in entry.chunks]
        return [
            Placed(Box(c.offset, c.shape), n, None if c.inline is not None else self._node(c, n), c.inline)
            for c, n in zip(entry.chunks, sizes)
        ]


class Tables:
    """The packs and bases that a part under construction refers to, each once."""

    def __init__(self) -> None:
        self._packs: dict[Pack, int] = {}
        self._bases: dict[Spot, int] = {}
        self._records: list[Base] = []

    @property
    def packs(self) -> tuple[Pack, ...]:
        """In the order of their numbers."""
        return tuple(self._packs)

    @property
    def bases(self) -> tuple[Base, ...]:
        """In the order of their numbers."""
        return tuple(self._records)

    def chunk(self, box: Box, stored: Stored) -> Chunk:
        """The record of a stored chunk in a box."""
        return Chunk(
            offset=box.offset,
            shape=box.shape,
            pack=self._pack(stored),
            at=stored.at,
            length=stored.length,
            codec=stored.codec,
            digest=stored.digest,
            bases=self._numbers(stored),
        )

    def _pack(self, stored: Stored) -> int:
        return self._packs.setdefault(stored.pack, len(self._packs))

    def _numbers(self, stored: Stored) -> tuple[int, ...]:
        for spot, node in closure(stored.bases, known=self._bases).items():
            numbers = tuple(self._bases[b.spot] for b in node.bases)
            self._bases[spot] = len(self._records)
            self._records.append(
                Base(self._pack(node), node.at, node.length, node.digest, node.nbytes, node.codec, numbers)
            )
        return tuple(self._bases[b.spot] for b in stored.bases)
