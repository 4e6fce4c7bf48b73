"""Runs to look at: made by a Checkpointer, or rank by rank without processes; and ways to harm them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gpumove
from gpumove.commit import Order, commit, wait_for_parts
from gpumove.config import Config
from gpumove.format.boxes import Box
from gpumove.format.keys import attempt_name
from gpumove.format.manifest import Checkpoint
from gpumove.save.request import Request
from gpumove.save.writer import PartWriter
from gpumove.state.plan import Item
from gpumove.state.values import dtype_name
from gpumove.store.log import Log
from gpumove.store.objects import Store


class Net(nn.Module):
    """A frozen layer (its bytes never change), a trained one, a tied head, and buffers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.frozen = nn.Linear(48, 48).requires_grad_(False)
        self.embed = nn.Embedding(40, 48)
        self.norm = nn.BatchNorm1d(48)
        self.head = nn.Linear(48, 40, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        kinds = {
            "bf16": torch.randn(5, 7, generator=generator).bfloat16(),
            "fp8": torch.randn(9, 11, generator=generator).to(torch.float8_e4m3fn),
            "mask": torch.rand(13, 17, generator=generator) > 0.5,
            "empty": torch.empty(0, 4),
            "nothing": torch.tensor(7, dtype=torch.int64),
            "zeros": torch.zeros(96, 96),
            "wide": torch.randn(6, 6, generator=generator, dtype=torch.float64),
            "pairs": torch.randn(40, generator=generator, dtype=torch.complex64),
        }
        for name, value in kinds.items():
            self.register_buffer(name, value)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.scale * self.head(self.norm(self.frozen(self.embed(ids))))


def train(url: str, steps: Sequence[int], *, pinned: Sequence[int] = (), **settings: Any) -> dict[int, dict[str, Any]]:
    """Train and save at these steps; the model's state at each, copied."""
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    truth = {}
    settings = {"every_s": None, "keep_last": None, "chunk_bytes": 4096, "pack_bytes": 8192, **settings}
    with gpumove.Checkpointer(url, model=model, optimizer=optimizer, **settings) as ckpt:
        step = ckpt.restore()
        while step < max(steps):
            loss = model(torch.randint(0, 40, (8,))).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            ckpt.step(step, loss=loss.detach())
            if step in steps:
                truth[step] = {k: v.detach().clone() for k, v in model.state_dict().items()}
                ckpt.save(step, pinned=step in pinned).wait(60)
    return truth


class Shard(NamedTuple):
    """What one rank holds of a tensor."""

    fqn: str
    whole: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    local: bool = False


class _Bytes:
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._data = [t.contiguous().reshape(-1).view(torch.uint8).numpy().data for t in tensors]

    def view(self, index: int) -> memoryview:
        return self._data[index]


def write_sharded(
    url: str, step: int, ranks: Sequence[Sequence[Shard]], *, values: Mapping[str, Any] | None = None, **settings: Any
) -> Checkpoint:
    """A checkpoint of several ranks, written by the real writers one after the other in this process."""
    config = Config(chunk_bytes=4096, pack_bytes=8192, **settings)
    store = Store.open(url, config)
    log = Log(store)
    run = log.open(create=True)
    log.read()
    attempt = attempt_name(log.claim().epoch, 1)
    plans = [f"{rank:032x}" for rank in range(len(ranks))]
    nbytes = 0
    for rank, shards in enumerate(ranks):
        cut = [s.whole[tuple(slice(o, o + n) for o, n in zip(s.offset, s.shape))] for s in shards]
        items = [
            Item(s.fqn, dtype_name(s.whole.dtype), tuple(s.whole.shape), Box(s.offset, s.shape),
                 s.whole.element_size(), n, s.local)
            for n, s in enumerate(shards)
        ]  # fmt: skip
        request = Request(run, attempt, rank, len(ranks), step, plans[rank], items, dict(values or {}))
        writer = PartWriter(store, config)
        _, stats = writer.write(request, _Bytes(cut))
        writer.close()
        nbytes += stats.state_bytes
    order = Order(attempt, step, plans, nbytes, {}, [])
    entry = commit(log, order, wait_for_parts(log, order, timeout_s=10, cancelled=request.cancelled))
    store.close()
    return entry


def flip(path: Path, at: int, bit: int = 3) -> None:
    """Harm one bit; ``at`` may count from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def objects(url: Path) -> dict[str, bytes]:
    """Everything that lies at a file URL."""
    return {str(p.relative_to(url)): p.read_bytes() for p in sorted(url.rglob("*")) if p.is_file()}
