"""A small but honest training job for the tests: dropout, batch norm, shuffled data, warm-up, clipping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import gpumove
from gpumove.format.codec import digest


class Net(nn.Module):
    """Embedding tied to the head, dropout, batch norm, an odd width."""

    def __init__(self, width: int = 26) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.norm = nn.BatchNorm1d(width)
        self.mid = nn.Linear(width, width)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).mean(1)
        return self.head(self.drop(torch.relu(self.mid(self.norm(x)))))


def dataset(length: int = 96) -> torch.utils.data.TensorDataset:
    g = torch.Generator().manual_seed(5)
    return torch.utils.data.TensorDataset(
        torch.randint(0, 32, (length, 6), generator=g), torch.randint(0, 32, (length,), generator=g)
    )


@dataclass
class TrainingJob:
    """Live objects and the losses seen so far, by step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: gpumove.ElasticLoader
    losses: dict[int, float] = field(default_factory=dict)

    def parts(self) -> dict[str, Any]:
        """What a Checkpointer is given."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }

    def batches(self) -> Any:
        """The data, epoch after epoch."""
        while True:
            yield from self.loader

    def train(self, start: int, stop: int, ckpt: gpumove.Checkpointer | None = None) -> None:
        """Steps ``start + 1`` to ``stop``."""
        step = start
        if step >= stop:
            return
        for ids, target in self.batches():
            loss = nn.functional.cross_entropy(self.model(ids), target)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            step += 1
            self.losses[step] = float(loss.detach())
            if ckpt is not None:
                ckpt.step(step, loss=loss.detach())
            if step >= stop:
                return

    def fingerprint(self) -> str:
        """A digest of every tensor and number that continuing depends on."""
        rows = [f"{k}:{_bytes(v)}" for k, v in self.model.state_dict().items()]
        for index, entries in self.optimizer.state_dict()["state"].items():
            rows += [f"{index}.{k}:{_bytes(v) if isinstance(v, torch.Tensor) else v!r}" for k, v in entries.items()]
        rows += [repr(self.scheduler.state_dict()), repr(self.loader.state_dict()), _bytes(torch.get_rng_state())]
        return digest("\n".join(rows).encode())


def _bytes(tensor: torch.Tensor) -> str:
    return digest(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def new_job(*, seed: int = 1, optimizer: str = "adamw", batch_size: int = 8) -> TrainingJob:
    """The same job every time."""
    torch.manual_seed(seed)
    model = Net()
    made: dict[str, Any] = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=1e-2),
        "adamw_fused": lambda: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
        "adamw_loop": lambda: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9, nesterov=True),
        "adafactor": lambda: torch.optim.Adafactor(model.parameters(), lr=1e-2),
        "rmsprop": lambda: torch.optim.RMSprop(model.parameters(), lr=1e-3, centered=True),
    }
    chosen = made[optimizer]()
    scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda n: min(1.0, (n + 1) / 10))
    loader = gpumove.ElasticLoader(dataset(), batch_size, seed=7, shuffle=True)
    return TrainingJob(model, chosen, scheduler, loader)
