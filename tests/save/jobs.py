"""Jobs whose state is large enough to be stored as differences, in several precisions, with any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

WIDTH = 192


def state_of(*owners: Any) -> dict[str, torch.Tensor]:
    """Copies of all tensors of modules and optimizers."""
    found = {}
    for number, owner in enumerate(owners):
        if isinstance(owner, nn.Module):
            found.update({f"{number}.{k}": v.detach().clone() for k, v in owner.state_dict().items()})
            continue
        for index, entries in owner.state_dict()["state"].items():
            tensors = {k: v for k, v in entries.items() if isinstance(v, torch.Tensor)}
            found.update({f"{number}.{index}.{k}": v.detach().clone() for k, v in tensors.items()})
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, NaN payloads and signs of zero included."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and _bits(a[k]) == _bits(b[k]) for k in a
    )


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The usual one."""
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


class Plain:
    """fp32 throughout, with a schedule that changes the rate at every step."""

    def __init__(self, optimizer: Optimizers = adamw, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1.0 / (1 + 0.1 * n))

    def parts(self) -> dict[str, Any]:
        """What a Checkpointer is given."""
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def step(self) -> None:
        """One step of training."""
        x = torch.randn(32, WIDTH)
        nn.functional.mse_loss(self.model(x), x.roll(1, 1)).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything there is."""
        return state_of(self.model, self.optimizer)


class Mixed:
    """A bf16 model, its fp32 masters as a second model with the optimizer, gradients in bf16."""

    def __init__(self, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.master = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).bfloat16()
        self.optimizer = adamw(self.master.parameters())
        self._copy()

    def _copy(self) -> None:
        with torch.no_grad():
            for low, high in zip(self.model.parameters(), self.master.parameters()):
                low.copy_(high)

    def parts(self) -> dict[str, Any]:
        """What a Checkpointer is given. The copy is not the optimizer's to change, so there is no overlap."""
        models = {"live": self.model, "master": self.master}
        return {"model": models, "optimizer": self.optimizer, "overlap": False}

    def step(self) -> None:
        """One step of training."""
        x = torch.randn(32, WIDTH).bfloat16()
        nn.functional.mse_loss(self.model(x), x.roll(1, 1)).backward()
        for low, high in zip(self.model.parameters(), self.master.parameters()):
            high.grad, low.grad = low.grad.float() if low.grad is not None else None, None
        self.optimizer.step()
        self._copy()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything there is."""
        return state_of(self.model, self.master, self.optimizer)
