"""From placed chunks to a part's record: the graph of what is decoded from what, and the tables that name it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpumove.format.manifest import FORMAT, Chunk, Pack, Part, TensorEntry
from gpumove.format.stored import Stored, Tables
from gpumove.save.chunks import Bytes, ChunkKey, Cut, data_of
from gpumove.state.plan import Item


class Outcome(NamedTuple):
    """What became of a chunk: the predecessor's serves (``stored``), or it was coded and is to be placed.

    ``bases`` are chunks of earlier saves, or numbers of tasks of this one.
    """

    digest: str
    codec: str = ""
    bases: tuple[Stored | int, ...] = ()
    stored: Stored | None = None


@dataclass
class Placement:
    """Where coded chunks came to lie, by task."""

    pack: Pack
    at: int
    length: int


@dataclass
class Written:
    """All outcomes and placements of a part."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    places: dict[int, Placement] = field(default_factory=dict)

    def nodes(self, cut: Cut) -> dict[int, Stored]:
        """The stored chunk of every task that does not travel inline."""
        found: dict[int, Stored] = {}
        for index in self.outcomes:
            self._node(index, cut, found)
        for index, twin in cut.twins.items():
            found[index] = found[twin]
        return found

    def _node(self, index: int, cut: Cut, found: dict[int, Stored]) -> Stored:
        if index in found:
            return found[index]
        outcome = self.outcomes[index]
        if outcome.stored is not None:
            found[index] = outcome.stored
            return outcome.stored
        # A unit's chunks depend on at most three of each other, so this does not go deep.
        bases = tuple(b if isinstance(b, Stored) else self._node(b, cut, found) for b in outcome.bases)
        place = self.places[index]
        nbytes = cut.tasks[index].nbytes
        found[index] = Stored(place.pack, place.at, place.length, outcome.codec, outcome.digest, nbytes, bases)
        return found[index]


@dataclass(frozen=True)
class Heading:
    """What a part says about itself."""

    run: str
    attempt: str
    rank: int
    world_size: int
    step: int
    values: dict[str, Any]


def assemble(
    heading: Heading, items: Sequence[Item], cut: Cut, written: Written, snapshot: Bytes
) -> tuple[Part, dict[ChunkKey, Stored]]:
    """The part's record, and the table that the next save compares with."""
    tables = Tables()
    nodes = written.nodes(cut)
    chunks: list[list[Chunk]] = [[] for _ in items]
    for index, task in enumerate(cut.tasks):
        if (node := nodes.get(index)) is None:
            text = base64.b64encode(data_of(task, snapshot)).decode()
            chunk = Chunk(offset=task.key.box.offset, shape=task.key.box.shape, inline=text)
        else:
            chunk = tables.chunk(task.key.box, node)
        chunks[task.item].append(chunk)
    entries = [(i.local, TensorEntry(i.fqn, i.dtype, i.shape, tuple(c))) for i, c in zip(items, chunks)]
    part = Part(
        format=FORMAT,
        run=heading.run,
        attempt=heading.attempt,
        rank=heading.rank,
        world_size=heading.world_size,
        step=heading.step,
        packs=tables.packs,
        tensors=tuple(e for local, e in entries if not local),
        local=tuple(e for local, e in entries if local),
        bases=tables.bases,
        values=heading.values,
    )
    return part, {cut.tasks[index].key: node for index, node in nodes.items()}
