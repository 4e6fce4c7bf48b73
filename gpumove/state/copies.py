"""What one snapshot copies: in which order, and in pieces between which it can be given up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from gpumove.state.arena import PIECE_BYTES, Specs
from gpumove.state.snapshot import Snapshot


class Order(NamedTuple):
    """Which sources are copied before ``stage`` returns and which later; of the latter, whose changes can be seen, and
    which of these may be looked at instead of being copied."""

    at_once: Sequence[bool]
    specs: Specs
    now: list[int]
    later: list[int]
    watched: list[int]
    lookable: list[int]


@dataclass
class Work:
    """One snapshot in the making: ``copied`` are copied later in any case, ``looked`` only if they changed since the
    snapshot ``before``, which has the newest copy of everything."""

    snapshot: Snapshot
    before: Snapshot | None
    copies: Sequence[torch.Tensor]
    sources: Sequence[torch.Tensor]
    at_once: Sequence[bool]
    copied: list[int]
    looked: list[int]
    marks: dict[int, torch.Tensor] = field(default_factory=dict)
    """On the host once ``marked`` has happened."""
    marked: list[torch.cuda.Event] = field(default_factory=list)
    keep: list[torch.Tensor] = field(default_factory=list)


def pieces(work: Work, which: Iterable[int]) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Copies and sources on the host, some megabytes at a time."""
    into: list[torch.Tensor] = []
    from_: list[torch.Tensor] = []
    nbytes = 0
    for i in which:
        copy, source = work.copies[i], work.sources[i]
        if source.is_cuda:
            continue
        rows = max(1, PIECE_BYTES * len(copy) // copy.nbytes) if copy.dim() and copy.nbytes > PIECE_BYTES else 0
        for at in range(0, len(copy), rows) if rows else (0,):
            into.append(copy[at : at + rows] if rows else copy)
            from_.append(source[at : at + rows] if rows else source)
            nbytes += into[-1].nbytes
            if nbytes >= PIECE_BYTES:
                yield into, from_
                into, from_, nbytes = [], [], 0
    if into:
        yield into, from_


def is_small(tensor: torch.Tensor) -> bool:
    """Scalars such as step counters: copying them now is cheaper than watching them."""
    return tensor.numel() <= 16
