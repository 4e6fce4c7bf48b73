"""The three kinds of training whose moves are measured: their state is real, their gradients are drawn. No checkpoints.

Forward and backward are left out: a move sees the state and the time between two steps, and two cores that train have
none left for both ends of a move. What a difference of two steps costs depends on the gradients' bits, on the rate over
the size of the weights, and on torch's own optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.workload import digest_of

NAMES = ("lora", "mixed", "fp32")
_POOL = 1 << 24
_WARM_STEPS = 20
"""Until then the second moments still grow, and differences are not those of a training that has run for a while."""
_BYTES = {"fp32": 12, "mixed": 14}
"""Per parameter: the parameter, two moments; and for mixed precision its copy in bf16."""
_RANK = 8


class State:
    """The objects of one job, and one step of it."""

    def __init__(self, name: str, megabytes: float) -> None:
        self.name, self._pool = name, _pool(bf16=name == "mixed")
        large = megabytes >= 400
        self.models = _lora(megabytes, 4096 if large else 1024) if name == "lora" else _dense(name, megabytes, large)
        held = [p for p in self.models["model" if name != "mixed" else "master"].parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(held, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
        for parameter in held:
            parameter.grad = torch.empty_like(parameter)

    def warm_up(self) -> None:
        """Some steps, which nobody counts."""
        for step in range(-_WARM_STEPS, 0):
            self.train(step)

    def train(self, step: int) -> None:
        """One step; the same whenever and wherever it is done."""
        chance = torch.Generator().manual_seed(step + 1000)
        for parameter in self._held():
            at = int(torch.randint(_POOL - parameter.numel(), (), generator=chance))
            assert parameter.grad is not None
            parameter.grad.copy_(self._pool[at : at + parameter.numel()].view(parameter.shape))
        self.optimizer.step()
        if self.name == "mixed":
            with torch.no_grad():
                for low, master in zip(self.models["model"].parameters(), self._held()):
                    low.copy_(master)

    def _held(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of it, by name."""
        for name, model in self.models.items():
            yield from ((f"{name}.{key}", p.detach()) for key, p in model.named_parameters())
        for index, parameter in enumerate(self._held()):
            yield from ((f"{index}.{key}", v) for key, v in sorted(self.optimizer.state[parameter].items()))

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return sum(t.nbytes for _, t in self.tensors())

    def digest(self) -> str:
        """One number for the whole."""
        return digest_of(self.tensors)


def _pool(*, bf16: bool) -> torch.Tensor:
    """Numbers to draw gradients from, heavier in the tails than a normal distribution, as gradients are."""
    chance = torch.Generator().manual_seed(7)
    found = torch.randn(_POOL, generator=chance) * torch.randn(_POOL, generator=chance).exp() * 1e-3
    return found.bfloat16().float() if bf16 else found


def _dense(name: str, megabytes: float, large: bool) -> dict[str, nn.Module]:
    """Square matrices, all of which change at every step."""
    width = 1024 if large else 256
    count = math.ceil(megabytes * 1e6 / (_BYTES[name] * width**2))
    torch.manual_seed(0)
    model = nn.ParameterList(torch.randn(width, width) * 0.02 for _ in range(count))
    if name == "fp32":
        return {"model": model}
    low = nn.ParameterList(nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in model)
    return {"model": low, "master": model}


def _lora(megabytes: float, width: int) -> dict[str, nn.Module]:
    """Frozen matrices in bf16, and adapters of a low rank in fp32 beside each."""
    rank = _RANK * width // 4096
    count = math.ceil(megabytes * 1e6 / (2 * width**2 + 24 * rank * width))
    torch.manual_seed(0)
    model = nn.ParameterDict()
    for index in range(count):
        frozen = torch.empty(width, width, dtype=torch.bfloat16).normal_(std=0.02)
        model[f"{index}_base"] = nn.Parameter(frozen, requires_grad=False)
        model[f"{index}_down"] = nn.Parameter(torch.randn(rank, width) * 0.02)
        model[f"{index}_up"] = nn.Parameter(torch.zeros(width, rank))
    return {"model": model}
