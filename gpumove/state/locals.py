"""A rank's own part of a tensor. All that most of this room has to know of DTensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

import torch
from torch.distributed.tensor import DTensor

from gpumove.format.codec import digest

# to_local() wraps in autograd and costs six times as much; the attribute exists in torch 2.6 to 2.15.
_LOCAL: Callable[[DTensor], torch.Tensor] = (
    attrgetter("_local_tensor") if hasattr(DTensor, "_local_tensor") else DTensor.to_local
)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; no communication, no copy."""
    return _LOCAL(tensor) if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor | None:
    """All of a tensor as this rank has it, without communication; None if others have a part in it."""
    if not isinstance(tensor, DTensor):
        return tensor
    return _LOCAL(tensor) if all(p.is_replicate() for p in tensor.placements) else None


def local_tensors(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The same of many, without a call for each."""
    return [_LOCAL(t) if isinstance(t, DTensor) else t for t in tensors]


def probes(tensors: Sequence[torch.Tensor]) -> list[str]:
    """A digest of up to 256 elements spread over each plain tensor ("" for others); one way to the host for all."""
    samples: dict[torch.device, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, DTensor) and (numel := tensor.numel()):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: numel // 256] if numel >= 512 else flat
            samples[tensor.device].append((number, sample.contiguous().view(torch.uint8)))
    found = [""] * len(tensors)
    for some in samples.values():
        data = torch.cat([sample for _, sample in some]).cpu().numpy().data
        at = 0
        for number, sample in some:
            found[number] = digest(data[at : at + sample.numel()])[:16]
            at += sample.numel()
    return found
