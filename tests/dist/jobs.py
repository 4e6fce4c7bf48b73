"""A whole training job around the model: optimizer, warm-up, elastic data, and the loop that users write."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gpumove import Checkpointer, ElasticLoader
from tests.dist import models

SAMPLES = 101
SETTINGS: dict[str, Any] = {"every_s": None, "peer_s": 30.0, "chunk_bytes": 4096, "pack_bytes": 1 << 16}
"""Small chunks, so that even this model has several per tensor; explicit saves only."""


class Tokens:
    """A dataset whose samples say which ones they are."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.tensor([(index * (k + 3) + k * k) % models.VOCABULARY for k in range(models.LENGTH)])


@dataclass
class Job:
    """The live objects of one rank."""

    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[LambdaLR]
    loader: ElasticLoader
    scaler: Any = None
    losses: dict[int, str] = field(default_factory=dict)
    """Loss of every step, exactly."""
    samples: list[int] = field(default_factory=list)
    """What this rank has seen."""

    def checkpointer(self, url: str, **settings: Any) -> Checkpointer:
        """Everything in it, small chunks, and saves only when asked for, unless told otherwise."""
        return Checkpointer(
            url,
            model=self.model,
            optimizer=self.optimizers if len(self.optimizers) > 1 else self.optimizers[0],
            scheduler=self.schedulers if len(self.schedulers) > 1 else self.schedulers[0],
            scaler=self.scaler,
            loader=self.loader,
            **{**SETTINGS, **settings},
        )

    def train(
        self,
        checkpointer: Checkpointer | None,
        step: int,
        until: int,
        *,
        after: Callable[[int], None] = lambda step: None,
    ) -> int:
        """The loop that users write, up to step ``until``."""
        while step < until:
            for indices, tokens in self.loader:
                self.samples += indices.tolist()
                loss = self.forward_and_step(tokens)
                step += 1
                self.losses[step] = loss.hex()
                if checkpointer is not None:
                    checkpointer.step(step, loss=loss)
                after(step)
                if step == until:
                    break
        return step

    def forward_and_step(self, tokens: torch.Tensor) -> float:
        """One step."""
        loss = self.model(tokens)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for optimizer in self.optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
            optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler.update()
        for scheduler in self.schedulers:
            scheduler.step()
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """All that must come back, in full, taken without gpumove's code."""
        return {
            "full": models.full_state(self.model, *self.optimizers),
            "buffers": models.buffers(self.model),
            "lr": [float(g["lr"]) for o in self.optimizers for g in o.param_groups],
            "scheduler": copy.deepcopy([s.state_dict() for s in self.schedulers]),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "position": self.loader.position,
            "rng": generators(),
        }


def make(
    layout: str,
    rank: int,
    *,
    kind: str = "foreach",
    seed: int = 0,
    half: bool = False,
    batch_size: int = 3,
    scaler: bool = False,
    split: bool = False,
) -> Job:
    """Build a job.

    Args:
        layout: a name of ``models.RANKS``.
        rank: this process's.
        kind: a name of ``models.OPTIMIZERS``.
        seed: of the initial weights and of the generators, so that a resumed job begins with other ones.
        half: compute in bfloat16 under FSDP2.
        batch_size: samples of a rank.
        scaler: scale the loss.
        split: two optimizers: AdamW for matrices, SGD with momentum for vectors.
    """
    model = models.build(layout, seed=seed, half=half)
    if split:
        matrices = [p for p in models.trainable(model) if p.dim() > 1]
        vectors = [p for p in models.trainable(model) if p.dim() < 2]
        optimizers: list[Optimizer] = [torch.optim.AdamW(matrices), torch.optim.SGD(vectors, lr=0.01, momentum=0.9)]
    else:
        # Plain tensors and DTensors, or DTensors of two meshes, do not go into one foreach call of torch.
        optimizers = [models.OPTIMIZERS["loop" if "tp" in layout else kind](model)]
    replica, replicas = models.data_rank(layout, rank)
    loader = ElasticLoader(Tokens(), batch_size, shuffle=True, seed=5, rank=replica, world_size=replicas)
    schedulers = [LambdaLR(o, lambda n: min(1.0, (n + 1) / 8)) for o in optimizers]
    # Ranks of one tensor-parallel group must draw the same dropout masks, all others different ones.
    stream = 1000 * seed + replica
    random.seed(stream)
    np.random.seed(stream)
    torch.manual_seed(stream)
    return Job(model, optimizers, schedulers, loader, torch.amp.GradScaler("cpu", init_scale=8.0) if scaler else None)


def generators() -> dict[str, Any]:
    """Where the global generators stand, without moving them."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": (
            numpy["state"]["key"].tolist(),
            {k: v for k, v in numpy.items() if k != "state"},
            numpy["state"]["pos"],
        ),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def url_of(folder: Any) -> str:
    """A fresh run in a folder."""
    return f"file://{folder}/run"


def equal_linear(width: int = 5) -> nn.Linear:
    """A small model that is the same on all ranks."""
    layer = nn.Linear(width, width)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
