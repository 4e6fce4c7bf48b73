"""The trainings that are compared: W1 dense fp32, W2 adapters on a frozen bf16 model, W3 many small tensors."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from benchmarks.workload import Decoder, Job, decoder, gpt, next_token_loss

SIZES_MB = {"W1": 1500.0, "W2": 1500.0, "W3": 30.0}
"""State of each at full size: W1 is GPT-2 small, W3 has 10,000 tensors."""
LABELS = {
    "W1": "dense fp32, AdamW",
    "W2": "bf16, 90 % of the bytes frozen, AdamW on adapters",
    "W3": "10,000 tensors of 4 KB, AdamW",
}
_SMALL = 32
_BYTES_PER_SMALL = 12 * _SMALL * _SMALL
_FROZEN_PER_TRAINED = 27.0  # parameters: 2 bytes each against 2 + 2 + 2, and nine times the bytes
_SHARDED_TOKENS = 4


def make_job(workload: str, size_mb: float, *, seed: int, sharded: bool) -> Job:
    """One of them at any size; ``sharded`` over all ranks of the default process group."""
    if workload == "W1":
        return _sharded(size_mb, seed) if sharded else gpt(size_mb, seed=seed)
    if sharded:
        raise ValueError("only W1 is sharded")
    return _adapted(size_mb, seed) if workload == "W2" else _small(size_mb, seed)


class Adapted(nn.Module):
    """A frozen linear layer and a trained difference of low rank."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        # Not zero, as LoRA has it: with a zero on one side the other one's gradient is zero, and nothing changes.
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.normal_(self.up.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _adapted(size_mb: float, seed: int) -> Job:
    torch.manual_seed(seed)
    frozen = 0.9 * size_mb * 1e6 / 2
    model = decoder(frozen * 12 / 1e6).requires_grad_(requires_grad=False)
    _adapt(model, sum(p.numel() for p in model.parameters()) / _FROZEN_PER_TRAINED)
    model.to(torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    return Job(model, optimizer, partial(next_token_loss, model, model.tokens.num_embeddings, 4))


def _adapt(model: Decoder, wanted: float) -> None:
    """Adapters of about so many parameters on all linear layers of the blocks."""
    names = ("qkv", "out", "up", "down")
    linears = [getattr(block, name) for block in model.blocks for name in names]
    rank = max(1, round(wanted / sum(linear.in_features + linear.out_features for linear in linears)))
    for block in model.blocks:
        for name in names:
            setattr(block, name, Adapted(getattr(block, name), rank))


class Small(nn.Module):
    """Many small matrices side by side."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(_SMALL, _SMALL, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(functional.linear(x, torch.cat([part.weight for part in self.parts])))


def _small(size_mb: float, seed: int) -> Job:
    torch.manual_seed(seed)
    model = Small(max(4, round(size_mb * 1e6 / _BYTES_PER_SMALL / 0.977)))  # at 30 MB: 2,500, with 4 tensors each
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return Job(model, optimizer, lambda: (model(torch.randn(64, _SMALL)) - 0.1).square().mean())


def _sharded(size_mb: float, seed: int) -> Job:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = decoder(size_mb)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # Two gloo rounds per block and step are what a step costs here: four blocks at a time.
    for first in range(0, len(model.blocks), 4):
        fully_shard(list(model.blocks[first : first + 4]), mesh=mesh, reshard_after_forward=False)
    vocabulary = model.tokens.num_embeddings
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(seed + 1 + dist.get_rank())
    return Job(model, optimizer, partial(next_token_loss, model, vocabulary, _SHARDED_TOKENS))
