"""Which rank writes which boxes. Decides only: frozen data in, frozen data out.

Shards come from torch's own planner protocol (``__create_chunk_list__``), so FSDP2, TP and their combinations, with
uneven and strided shards, give the boxes that torch itself would save.

Every rank works its own share out, from what all of them know of all: if rank 0 did so for a thousand ranks of a
hundred thousand tensors, it would take minutes and gigabytes. So tensors that are cut alike are of one kind, and
geometry goes by kind, of which a model has hardly more than shapes.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch
from torch.distributed.tensor import DTensor

from gpumove.errors import ConfigError, LayoutError
from gpumove.format.boxes import Box, Ints, cover_problem
from gpumove.format.codec import digest
from gpumove.state.families import Kin


class Kind(NamedTuple):
    """What tensors of one kind have in common, besides where each rank's part of them lies."""

    dtype: str
    shape: Ints
    item_bytes: int


class Table(msgspec.Struct, frozen=True):
    """The tensors that a rank has, in its order. Ranks of one job have the same table, or something is wrong with it.

    ``of`` is each tensor's kind, ``families`` names those that one rank is to write together ("" for none), and
    ``probes`` tells replicas that differ apart.
    """

    names: list[str]
    of: list[int]
    kinds: list[Kind]
    families: list[str]
    probes: list[str]


@dataclass(frozen=True)
class Gathered:
    """What all ranks have: the distinct tables, and by rank the number of its table and, by kind, its boxes.

    A number of -1 means that there were too many tables to send them all; such a job cannot be planned.
    """

    tables: Sequence[Table]
    of: Sequence[int]
    boxes: Sequence[Sequence[Box]]

    def alike(self) -> Iterator[Alike]:
        """All tensors, by what they are on the ranks."""
        if len(self.tables) == 1:
            (table,) = self.tables
            names: list[list[str]] = [[] for _ in table.kinds]
            for name, kind in zip(table.names, table.of):
                names[kind].append(name)
            yield from (Alike(found, (kind,)) for kind, found in enumerate(names))
            return
        known = [dict(zip(t.names, t.of)) for t in self.tables]
        found: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in dict.fromkeys(name for t in self.tables for name in t.names):
            found[tuple(kinds.get(name, -1) for kinds in known)].append(name)
        yield from (Alike(n, kinds) for kinds, n in found.items())

    def kind(self, alike: Alike, rank: int) -> Kind | None:
        """What these tensors are on a rank; None if it does not have them."""
        number = alike.kinds[self.of[rank]]
        return None if number < 0 else self.tables[self.of[rank]].kinds[number]

    def box(self, alike: Alike, rank: int) -> Box:
        """Which part of them a rank has."""
        return self.boxes[rank][alike.kinds[self.of[rank]]]

    def holders(self, alike: Alike, ranks: Iterable[int]) -> dict[Box, list[int]]:
        """Who of these ranks has which part of them."""
        found: dict[Box, list[int]] = defaultdict(list)
        for rank in ranks:
            found[self.box(alike, rank)].append(rank)
        return found


class Alike(NamedTuple):
    """Tensors that are cut alike: in every table, by its number, all of one kind (-1: not there)."""

    names: list[str]
    kinds: tuple[int, ...]


class Item(NamedTuple):
    """A box that a rank writes. ``source`` is its number in the snapshot; ``local`` tensors are this rank's alone.

    ``kin`` is its place in a family, and ``grain`` the bytes of the family's widest element: all are cut alike by it.
    """

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    item_bytes: int
    source: int
    local: bool
    kin: Kin | None = None
    grain: int = 0


class Piece(NamedTuple):
    """What one rank writes of one tensor: rows ``start`` to ``stop`` of its part of number ``tensor`` in its table."""

    tensor: int
    start: int
    stop: int


def local_box(fqn: str, tensor: torch.Tensor) -> Box:
    """Where this rank's part of a tensor lies in the whole.

    Raises:
        ConfigError: the tensor is sharded in a way that is no box (FSDP1, nested tensors, pending partial sums).
    """
    if isinstance(tensor, DTensor):
        if any(p.is_partial() for p in tensor.placements):
            raise ConfigError(f"{fqn} holds partial sums: redistribute it before saving")
        chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        if len(chunks) != 1:
            raise ConfigError(f"{fqn} has {len(chunks)} local shards on this rank; one is supported")
        return Box(tuple(chunks[0].offsets), tuple(chunks[0].sizes))
    if type(tensor).__name__ == "ShardedTensor":
        raise ConfigError(f"{fqn} is a ShardedTensor of FSDP1: wrap the model with torch's fully_shard (FSDP2) instead")
    check_dense(fqn, tensor)
    return Box((0,) * tensor.dim(), tuple(tensor.shape))


def check_dense(fqn: str, tensor: torch.Tensor) -> None:
    """Raise ConfigError for a tensor that has no bytes to save."""
    if tensor.is_meta:
        raise ConfigError(f"{fqn} is on the meta device and has no values: materialise the model first")
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise ConfigError(f"{fqn} is a {tensor.layout} tensor; only dense (strided) tensors can be saved")
    if tensor.is_contiguous():
        return
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        raise ConfigError(
            f"{fqn} is an expanded tensor, which cannot be restored in place: use .contiguous() or .clone()"
        )


def check(gathered: Gathered) -> None:
    """Check that the ranks' parts make whole tensors.

    Raises:
        LayoutError: tensors of one name differ in shape or dtype, replicas differ, or boxes overlap or leave gaps.
    """
    problems: list[str] = []
    for alike in gathered.alike():
        if words := _problems(gathered, alike):
            problems += [f"{name} {word}" for name in alike.names for word in words]
    if len(gathered.tables) > 1:
        problems += _unlike_values(gathered)
    if problems or -1 in gathered.of:
        found = listed(sorted(problems)) or f"{gathered.of.count(-1)} ranks have other tensors than the others"
        raise LayoutError(
            f"the ranks' shards do not make whole tensors: {found}. Every rank must have every tensor, "
            "whole and equal or its shard of it (DTensor); what is a rank's own belongs into a buffer"
        )


def _problems(gathered: Gathered, alike: Alike) -> list[str]:
    """What is wrong with tensors that are alike."""
    known = [rank for rank, table in enumerate(gathered.of) if table >= 0]
    kinds = {rank: kind for rank in known if (kind := gathered.kind(alike, rank)) is not None}
    first, kind0 = next(iter(kinds.items()))
    unlike: dict[Kind, list[int]] = defaultdict(list)
    for rank, kind in kinds.items():
        if kind[:2] != kind0[:2]:
            unlike[kind].append(rank)
    there = f"{kind0.dtype}{list(kind0.shape)}"
    words = [
        f"is {there} on rank {first} and {kind.dtype}{list(kind.shape)} on rank {_some(ranks)}"
        for kind, ranks in unlike.items()
    ]
    if len(known) == len(gathered.of) and (problem := cover_problem(kind0.shape, list(gathered.holders(alike, kinds)))):
        words.append(problem)
    # Saved it would be, but no rank could restore it: each would miss what only the others have.
    if absent := [rank for rank in known if rank not in kinds]:
        words.append(f"does not exist on rank {_some(absent)}")
    return words


def _unlike_values(gathered: Gathered) -> list[str]:
    """Replicas that differ, where they are of one kind."""
    tables = [{n: (t.kinds[k][:2], p) for n, k, p in zip(t.names, t.of, t.probes)} for t in gathered.tables]
    problems = []
    for name, (kind, probe) in tables[0].items():
        found = [table.get(name, ((), "")) for table in tables]
        unlike = {n for n, (other, value) in enumerate(found) if other == kind and value != probe}
        if unlike:
            ranks = [rank for rank, table in enumerate(gathered.of) if table in unlike]
            problems.append(f"{name} has different values on ranks 0 and {_some(ranks)}")
    return problems


def share(gathered: Gathered, rank: int, *, split_bytes: int) -> list[Piece]:
    """What one rank writes, of ranks that :func:`check` has passed: together they write everything once.

    What several ranks have goes to them by bytes as even as can be, families as a whole. All ranks come to the same
    result because all go by rank 0's families, and by nothing that they do not know of each other.

    Args:
        gathered: what all ranks have.
        rank: whose share.
        split_bytes: replicas larger than this are cut into rows, for several holders.
    """
    mine = gathered.tables[gathered.of[rank]]
    number = {name: n for n, name in enumerate(mine.names)}
    lead = gathered.tables[gathered.of[0]]
    family = {name: f or name for name, f in zip(lead.names, lead.families)}
    loads = [0] * len(gathered.of)
    pools: dict[tuple[int, ...], dict[tuple[str, Box], list[str]]] = defaultdict(lambda: defaultdict(list))
    pieces: list[Piece] = []
    for alike in gathered.alike():
        holders = gathered.holders(alike, range(len(gathered.of)))
        box = gathered.box(alike, rank)
        whole = 0, box.shape[0] if box.shape else 1
        item_bytes = mine.kinds[alike.kinds[gathered.of[rank]]].item_bytes
        for part, ranks in holders.items():
            if len(ranks) == 1:
                loads[ranks[0]] += len(alike.names) * part.volume() * item_bytes
        if holders[box] == [rank] if box.volume() else rank == 0 and not any(b.volume() for b in holders):
            # An empty tensor is still a tensor: somebody must write that it exists.
            pieces += [Piece(number[name], *whole) for name in alike.names]
        elif box.volume():
            pool = pools[tuple(holders[box])]
            for name in alike.names:
                pool[family[name], box].append(name)
    for together, pool in pools.items():
        sizes = {name: mine.kinds[mine.of[number[name]]].item_bytes for names in pool.values() for name in names}
        for name, start, stop in _dealt(pool, sizes, together, rank, loads=loads, split_bytes=split_bytes):
            pieces.append(Piece(number[name], start, stop))
    return sorted(pieces)


def _dealt(
    pool: dict[tuple[str, Box], list[str]],
    item_bytes: dict[str, int],
    ranks: Sequence[int],
    rank: int,
    *,
    loads: Sequence[int],
    split_bytes: int,
) -> Iterator[tuple[str, int, int]]:
    """One rank's rows of what these ranks all have: the largest families first, to whoever has least."""
    sizes = {key: key[1].volume() * sum(item_bytes[name] for name in names) for key, names in pool.items()}
    least = [(loads[r], r) for r in ranks]
    heapq.heapify(least)
    for key in sorted(pool, key=lambda k: (-sizes[k], k)):
        rows = key[1].shape[0] if key[1].shape else 1
        largest = key[1].volume() * max(item_bytes[name] for name in pool[key])
        parts = min(len(ranks), rows, -(-largest // split_bytes))
        takers = [heapq.heappop(least) for _ in range(parts)]
        for n, (load, taker) in enumerate(takers):
            start, stop = rows * n // parts, rows * (n + 1) // parts
            if taker == rank:
                yield from ((name, start, stop) for name in pool[key])
            heapq.heappush(least, (load + sizes[key] * (stop - start) // rows, taker))


def _some(ranks: Sequence[int]) -> str:
    """At most eight ranks."""
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def listed(problems: Sequence[str]) -> str:
    """Problems as one text; a thousand of them tell no more than fifty."""
    more = f"; and {len(problems) - 50} more" if len(problems) > 50 else ""
    return "; ".join(problems[:50]) + more


def plan_digest(rows: Iterable[tuple[str, str, Ints, Box]]) -> str:
    """The digest of what one rank writes: (fqn, dtype, shape, box) in order."""
    return digest(msgspec.json.encode([[f, d, s, b.offset, b.shape] for f, d, s, b in rows]))
