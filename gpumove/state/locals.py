"""A rank's own part of a tensor. All that most of this room has to know of DTensor."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; no communication, no copy."""
    if isinstance(tensor, DTensor):
        # to_local() wraps in autograd and costs six times as much; the attribute exists in torch 2.6 to 2.15.
        local = getattr(tensor, "_local_tensor", None)
        return local if local is not None else tensor.to_local()
    return tensor
