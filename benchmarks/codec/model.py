"""Low-rank adapters for the model that is trained. Knows no training."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.workload import Decoder

INPUT = "tokens.weight"
"""The input embedding. Most of its rows get no gradient in a small batch, so "dense" totals leave it out."""
_RANK = 8
_SCALE = 2.0


class Adapted(nn.Module):
    """A frozen linear layer and a low-rank product beside it that is trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(_RANK, linear.in_features) * 0.02)
        self.up = nn.Parameter(torch.zeros(linear.out_features, _RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + _SCALE * (x @ self.down.t()) @ self.up.t()


def adapt(model: Decoder) -> None:
    """Freeze everything, and give all linear layers of the blocks an adapter."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, Adapted(child))
