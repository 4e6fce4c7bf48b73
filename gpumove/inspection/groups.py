"""A checkpoint's tensors by groups: how many bytes, and in which way each was stored. Plain data, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gpumove.format.manifest import Part
from gpumove.format.stored import Placed, Shelf, Spot, Stored, closure

_WAYS = {"raw": "raw", "planes": "base", "sub": "delta", "round": "derived"}
"""Codecs by what they do; all others predict."""


@dataclass
class Way:
    """What was stored in one way. ``nbytes`` are decoded; tied tensors count once in ``stored_bytes``."""

    chunks: int = 0
    nbytes: int = 0
    stored_bytes: int = 0


@dataclass
class Group:
    """Tensors that belong together: a part of a model, or one kind of state of an optimizer.

    ``ways``: ``clean`` (not sent: an older chunk serves), ``raw``, ``base`` (by itself), ``delta`` (to the last save),
    ``predicted`` (by the optimizer's rule), ``derived`` (the rounding of another tensor), ``inline`` (in the part).
    """

    name: str
    tensors: int = 0
    nbytes: int = 0
    stored_bytes: int = 0
    new_stored_bytes: int = 0
    ways: dict[str, Way] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What it takes to read everything."""

    nbytes: int
    chain: int


def tally(parts: Sequence[Part], attempt: str) -> tuple[tuple[Group, ...], Needs]:
    """Count a checkpoint's chunks.

    Args:
        parts: all of them.
        attempt: the checkpoint's own; chunks of others are clean.
    """
    groups: dict[str, Group] = {}
    names: set[str] = set()
    spots: dict[Spot, Stored] = {}
    optimizers = {
        name for part in parts for name, v in part.values.items() if isinstance(v, dict) and "param_groups" in v
    }
    needed: dict[Spot, Stored] = {}
    for part in parts:
        shelf = Shelf(part)
        for entry in (*part.tensors, *part.local):
            name = _group_name(entry.fqn, optimizers)
            group = groups.setdefault(name, Group(name))
            group.tensors += entry.fqn not in names
            names.add(entry.fqn)
            for chunk in shelf.placed(entry):
                _count(group, chunk, attempt, spots)
                if chunk.stored is not None:
                    needed |= closure([chunk.stored], known=needed)
    chain = max((node.chain for node in spots.values()), default=0)
    return tuple(groups[name] for name in sorted(groups)), Needs(sum(n.length for n in needed.values()), chain)


def _group_name(fqn: str, optimizers: Iterable[str]) -> str:
    for name in optimizers:
        if fqn.startswith(f"{name}."):
            return f"{name}.{fqn.rpartition('.')[2]}"
    return ".".join(fqn.split(".")[:2])


def _count(group: Group, chunk: Placed, attempt: str, spots: dict[Spot, Stored]) -> None:
    """Add a chunk to its group; ``spots`` are the places that were counted before."""
    way = group.ways.setdefault(_way(chunk, attempt), Way())
    group.nbytes += chunk.nbytes
    way.nbytes += chunk.nbytes
    way.chunks += 1
    if chunk.stored is not None and chunk.stored.spot not in spots:
        spots[chunk.stored.spot] = chunk.stored
        way.stored_bytes += chunk.stored.length
        group.stored_bytes += chunk.stored.length
        group.new_stored_bytes += chunk.stored.length if chunk.stored.pack.attempt == attempt else 0


def _way(chunk: Placed, attempt: str) -> str:
    if chunk.stored is None:
        return "inline"
    if chunk.stored.pack.attempt != attempt:
        return "clean"
    return _WAYS.get(chunk.stored.codec.split("/")[0], "predicted")
