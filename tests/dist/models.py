"""A model with everything that makes resharding hard, every way to spread it over ranks, and what it holds in full."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

VOCABULARY, WIDTH, LENGTH = 301, 13, 5
RANKS = {"plain": 1, "fsdp1": 1, "ddp2": 2, "ddp4": 4, "fsdp2": 2, "fsdp4": 4, "hsdp4": 4, "tp2": 2, "fsdp_tp4": 4}
"""Layouts by name, with their number of ranks. A plain job has no process group."""


class Block(nn.Module):
    """Attention and a feed-forward layer, of widths that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 27), nn.Linear(27, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(self.norm(x)).chunk(3, dim=-1)
        x = x + self.drop(torch.softmax(q @ k.mT / WIDTH**0.5, dim=-1) @ v)
        fed: torch.Tensor = self.drop(self.down(nn.functional.gelu(self.up(x))))
        return x + fed


class Tiny(nn.Module):
    """Embedding and output tied, a frozen parameter, a BatchNorm, and a layer with fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH), requires_grad=False)
        self.blocks = nn.Sequential(Block(), Block())
        self.batch = nn.BatchNorm1d(WIDTH)
        self.few = nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.tokens(tokens) + self.places)
        x = self.batch(x.flatten(0, 1).float()).to(x.dtype).view_as(x)
        guess = self.head(x[:, :-1]).float()
        loss = nn.functional.cross_entropy(guess.flatten(0, 1), tokens[:, 1:].flatten())
        few: torch.Tensor = self.few(x)
        return loss + few.float().square().mean()


def build(layout: str, *, seed: int = 0, half: bool = False) -> nn.Module:
    """The model, spread as told; equal values on all ranks. ``half`` computes in bfloat16 (FSDP2 only)."""
    torch.manual_seed(seed)
    model = Tiny()
    if layout == "plain":
        return model
    if layout.startswith("ddp"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its successor is not in every torch that we support
            return DistributedDataParallel(model, broadcast_buffers=False)
    shape = {"hsdp4": (2, 2), "fsdp_tp4": (2, 2)}.get(layout, (RANKS[layout],))
    names = {"hsdp4": ("copy", "shard"), "fsdp_tp4": ("shard", "tensor"), "tp2": ("tensor",)}.get(layout, ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if "tensor" in names:
        # DTensors inside: a plain local output would make its receiver believe that both halves are equally wide.
        plan: dict[str, Any] = {}
        for n in range(2):
            plan[f"blocks.{n}.up"] = ColwiseParallel(use_local_output=False)
            plan[f"blocks.{n}.down"] = RowwiseParallel()
        parallelize_module(model, mesh["tensor"] if len(shape) > 1 else mesh, plan)
    if "shard" in names:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if half else MixedPrecisionPolicy()
        over = mesh["shard"] if "tensor" in names else mesh
        for block in model.blocks:
            fully_shard(block, mesh=over, mp_policy=policy)
        fully_shard(model.batch, mesh=over)  # in float32 always, as its statistics are
        fully_shard(model, mesh=over, mp_policy=policy)
    return model


def data_rank(layout: str, rank: int) -> tuple[int, int]:
    """The data-parallel rank and world size: ranks of one tensor-parallel group see the same samples."""
    if layout == "tp2":
        return 0, 1
    if layout == "fsdp_tp4":
        return rank // 2, 2
    return rank, RANKS[layout]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What optimizers take."""
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    """AdamW with two groups: matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in trainable(model) if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trainable(model) if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "foreach": lambda m: adamw(m, foreach=True),
    "fused": lambda m: adamw(m, fused=True),
    "loop": lambda m: adamw(m, foreach=False),
    "tensor_lr": lambda m: torch.optim.AdamW(trainable(m), lr=torch.tensor(1e-2), capturable=False),
    "sgd": lambda m: torch.optim.SGD(trainable(m), lr=1e-2, momentum=0.9),
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in full, on every rank (collective), as a copy."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the name that they have in the bare model."""
    return ((name.removeprefix("module."), p) for name, p in model.named_parameters())


def full_state(model: nn.Module, *optimizers: Optimizer) -> dict[str, torch.Tensor]:
    """Every parameter and every optimizer tensor in full, read from the live objects without any of gpumove's code."""
    found = {name: whole(p) for name, p in parameters(model)}
    for n, optimizer in enumerate(optimizers):
        for name, p in parameters(model):
            for key, value in sorted(optimizer.state.get(p, {}).items()):
                found[f"{n}/{name}/{key}"] = whole(value)
    return found


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's own buffers."""
    return {name.removeprefix("module."): b.detach().clone() for name, b in model.named_buffers()}


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names under which two states are not the same bit for bit."""
    odd = sorted(set(left) ^ set(right))
    return odd + [n for n in left if n in right and not _same(left[n], right[n])]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
