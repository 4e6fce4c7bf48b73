"""Which rank writes which boxes, and which stored boxes a rank reads. Decides only: frozen data in, frozen data out.

Shards come from torch's own planner protocol (``__create_chunk_list__``), so FSDP2, TP and their combinations, with
uneven and strided shards, give the boxes that torch itself would save.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import torch
from torch.distributed.tensor import DTensor

from gpumove.errors import ConfigError, LayoutError
from gpumove.format.boxes import Box, Ints, cover_problem
from gpumove.format.codec import digest
from gpumove.state.families import Kin
from gpumove.state.values import dtype_name


class Shard(NamedTuple):
    """A rank's local piece of one tensor: what layouts are made of.

    ``probe`` tells replicas that differ apart; ``family`` names those that one rank is to write together.
    """

    fqn: str
    dtype: str
    shape: Ints
    offset: Ints
    box: Ints
    item_bytes: int
    probe: str = ""
    family: str = ""


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
    """A box that one rank writes: rows ``start`` to ``stop`` of its shard number ``shard``."""

    shard: int
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
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        raise ConfigError(f"{fqn} is an expanded tensor, which cannot be restored in place: make it .contiguous()")
    return Box((0,) * tensor.dim(), tuple(tensor.shape))


def check_dense(fqn: str, tensor: torch.Tensor) -> None:
    """Raise ConfigError for a tensor that has no bytes to save."""
    if tensor.is_meta:
        raise ConfigError(f"{fqn} is on the meta device and has no values: materialise the model first")
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise ConfigError(f"{fqn} is a {tensor.layout} tensor; only dense (strided) tensors can be saved")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        raise ConfigError(
            f"{fqn} is an expanded tensor, which cannot be restored in place: use .contiguous() or .clone()"
        )


def shard_of(fqn: str, tensor: torch.Tensor, *, probe: bool, family: str = "") -> Shard:
    """Describe a rank's part of a tensor, with a sampled digest for tensors that claim to be replicas."""
    box = local_box(fqn, tensor)
    mark = _probe(tensor) if probe and not isinstance(tensor, DTensor) else ""
    return Shard(fqn, dtype_name(tensor.dtype), tuple(tensor.shape), *box, tensor.element_size(), mark, family)


def _probe(tensor: torch.Tensor) -> str:
    """A digest of up to 256 elements spread over a plain tensor."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    step = max(1, flat.numel() // 256)
    return digest(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())[:16] if flat.numel() else ""


def assign(layouts: Sequence[Sequence[Shard]], *, split_bytes: int) -> list[list[Piece]]:
    """Share the writing among the ranks: everything once, by bytes as even as can be.

    Args:
        layouts: every rank's shards, by rank.
        split_bytes: replicas larger than this are cut into rows, one run for each holder.

    Returns:
        For every rank the pieces that it writes.

    Raises:
        LayoutError: tensors of one name differ in shape or dtype, replicas differ, or boxes overlap or leave gaps.
    """
    holders = _holders(layouts)
    _check_cover(layouts, holders)
    load = [0] * len(layouts)
    pieces: list[list[Piece]] = [[] for _ in layouts]
    shared: dict[tuple[object, ...], list[list[tuple[int, int]]]] = defaultdict(list)
    for places in holders.values():
        shard = layouts[places[0][0]][places[0][1]]
        if not math.prod(shard.box):
            if not math.prod(shard.shape):  # an empty tensor is still a tensor: somebody must write that it exists
                pieces[places[0][0]].append(Piece(places[0][1], 0, shard.box[0] if shard.box else 1))
            continue
        if len(places) == 1:
            rank, index = places[0]
            pieces[rank].append(Piece(index, 0, shard.box[0] if shard.box else 1))
            load[rank] += _nbytes(shard)
        else:
            family = (shard.family or shard.fqn, shard.offset, shard.box, tuple(rank for rank, _ in places))
            shared[family].append(places)
    sizes = {key: sum(_nbytes(layouts[p[0][0]][p[0][1]]) for p in members) for key, members in shared.items()}
    for key in sorted(shared, key=lambda k: (-sizes[k], k)):
        _share(layouts, shared[key], sizes[key], load=load, pieces=pieces, split_bytes=split_bytes)
    return pieces


def _share(
    layouts: Sequence[Sequence[Shard]],
    family: list[list[tuple[int, int]]],
    nbytes: int,
    *,
    load: list[int],
    pieces: list[list[Piece]],
    split_bytes: int,
) -> None:
    """Give replicated shards of one box to the least loaded holder, or cut large ones into even runs of rows."""
    ranks = [rank for rank, _ in family[0]]
    first = layouts[family[0][0][0]][family[0][0][1]]
    rows = first.box[0] if first.box else 1
    largest = max(_nbytes(layouts[places[0][0]][places[0][1]]) for places in family)
    parts = len(ranks) if largest > split_bytes and rows >= len(ranks) else 1
    order = sorted(range(len(ranks)), key=lambda n: (load[ranks[n]], ranks[n]))
    for n, holder in enumerate(order[:parts]):
        start, stop = rows * n // parts, rows * (n + 1) // parts
        for places in family:
            rank, index = places[holder]
            pieces[rank].append(Piece(index, start, stop))
        load[ranks[holder]] += nbytes * (stop - start) // rows


def _nbytes(shard: Shard) -> int:
    return math.prod(shard.box) * shard.item_bytes


def _holders(layouts: Sequence[Sequence[Shard]]) -> dict[tuple[str, Ints, Ints], list[tuple[int, int]]]:
    """(tensor, box) -> who has it, as (rank, index of the shard)."""
    holders: dict[tuple[str, Ints, Ints], list[tuple[int, int]]] = defaultdict(list)
    for rank, layout in enumerate(layouts):
        for index, shard in enumerate(layout):
            holders[shard.fqn, shard.offset, shard.box].append((rank, index))
    return holders


def _check_cover(
    layouts: Sequence[Sequence[Shard]], holders: dict[tuple[str, Ints, Ints], list[tuple[int, int]]]
) -> None:
    """Every tensor covered exactly, by replicas that agree; else all problems in one error."""
    boxes: dict[str, list[Box]] = defaultdict(list)
    first: dict[str, tuple[int, Shard]] = {}
    where: dict[str, set[int]] = defaultdict(set)
    unlike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (fqn, offset, box), places in holders.items():
        boxes[fqn].append(Box(offset, box))
        for rank, index in places:
            shard = layouts[rank][index]
            where[fqn].add(rank)
            rank0, shard0 = first.setdefault(fqn, (rank, shard))
            if (shard.shape, shard.dtype) != (shard0.shape, shard0.dtype):
                here, there = (f"{s.dtype}{list(s.shape)}" for s in (shard, shard0))
                unlike[fqn, f"is {there} on rank {rank0} and {here} on rank"].append(rank)
            elif shard.probe != shard0.probe and shard.box == shard0.box:
                unlike[fqn, f"has different values on ranks {rank0} and"].append(rank)
    problems = [f"{fqn} {what} {_some(ranks)}" for (fqn, what), ranks in unlike.items()]
    for fqn, found in boxes.items():
        if problem := cover_problem(first[fqn][1].shape, found):
            problems.append(f"{fqn} {problem}")
        # Saved it would be, but no rank could restore it: each would miss what only the others have.
        if len(where[fqn]) < len(layouts):
            absent = sorted(set(range(len(layouts))) - where[fqn])
            problems.append(f"{fqn} does not exist on rank {_some(absent)}")
    if problems:
        raise LayoutError(
            f"the ranks' shards do not make whole tensors: {listed(sorted(problems))}. Every rank must have every "
            "tensor, whole and equal or its shard of it (DTensor); what is a rank's own belongs into a buffer"
        )


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
