"""A small GPT with an output of its own, and low-rank adapters for it. Knows no training."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.workload import Block

INPUT = "tokens.weight"
"""The input embedding. Most of its rows get no gradient in a small batch, so "dense" totals leave it out."""
_RANK = 8
_SCALE = 2.0


class Gpt(nn.Module):
    """Tokens in, logits out. The output is not tied to the input, so that the two can be told apart."""

    def __init__(self, *, vocabulary: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Adapted(nn.Module):
    """A frozen linear layer and a low-rank product beside it that is trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(_RANK, linear.in_features) * 0.02)
        self.up = nn.Parameter(torch.zeros(linear.out_features, _RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + _SCALE * (x @ self.down.t()) @ self.up.t()


def adapt(model: Gpt) -> None:
    """Freeze everything, and give all linear layers of the blocks an adapter."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, Adapted(child))
