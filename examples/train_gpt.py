"""Train a small GPT, byte by byte, on the source of Python's standard library. Kill it when you like, start it again.

    python -m examples.train_gpt --url runs/gpt --out losses.jsonl
    torchrun --nproc-per-node 2 -m examples.train_gpt --url runs/gpt --ddp      (or --fsdp)

The five places that gpumove needs are numbered. All the rest is an ordinary training script.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import gpumove


class Text(torch.utils.data.Dataset[Tensor]):
    """Windows of real text. Sorted and bounded, so that every process sees the same data."""

    def __init__(self, context: int, *, max_bytes: int = 4 << 20) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda file: file.name)
        text = b"".join(file.read_bytes() for file in files)[:max_bytes]
        self.bytes, self.context = torch.frombuffer(bytearray(text), dtype=torch.uint8), context

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        # One byte more than the context: the targets are the inputs, moved by one.
        return self.bytes[index * self.context :][: self.context + 1].long()


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual path."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        drop = self.dropout if self.training else 0.0
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), drop)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), drop)


class GPT(nn.Module):
    """A decoder-only transformer over bytes; gives the loss of a batch of windows."""

    def __init__(self, *, context: int, layers: int, width: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for matrix in (p for p in self.parameters() if p.ndim == 2):
            nn.init.normal_(matrix, std=0.02)
        self.head.weight = self.tokens.weight  # tied: one tensor under two names, stored once

    def forward(self, windows: Tensor) -> Tensor:
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def make_optimizer(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW, with weight decay for matrices only; warm-up, then a cosine down to a tenth."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
    warm_up = max(1, steps // 20)

    def factor(done: int) -> float:
        return min((done + 1) / warm_up, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done / steps))))

    return optimizer, LambdaLR(optimizer, factor)


class Record:
    """One JSON line per event, on rank 0. Line-buffered: what a killed process has said stays said."""

    def __init__(self, path: str | None, rank: int) -> None:
        self._file = open(path, "a", buffering=1) if path and rank == 0 else None  # noqa: SIM115 - open until the end
        self._told: gpumove.SaveHandle | None = None

    def write(self, **what: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({**what, "at": time.time()}) + "\n")

    def save(self, save: gpumove.SaveHandle | None) -> None:
        """What the newest save has cost, once it is finished."""
        if save is not None and save.finished and save is not self._told:
            self._told = save
            self.write(saved=save.step, committed=save.committed, **asdict(save.stats))


def set_up(args: argparse.Namespace) -> tuple[torch.device, int]:
    """Determinism, device and process group. Losses are equal in every bit only with equal numbers of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Without these MKL promises equal sums to nobody: how it divides them depends on what else the machine does.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.precision)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if args.ddp or args.fsdp:
        dist.init_process_group()
    return device, dist.get_rank() if dist.is_initialized() else 0


def make_model(args: argparse.Namespace, device: torch.device, rank: int) -> nn.Module:
    torch.manual_seed(args.seed)  # the same first weights on every rank
    model = GPT(context=args.context, layers=args.layers, width=args.width, dropout=args.dropout).to(device)
    torch.manual_seed(args.seed + 1 + rank)  # and different dropout masks
    if args.fsdp:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for part in [*model.blocks, model]:
            fully_shard(part, mesh=mesh)
    return DistributedDataParallel(model) if args.ddp else model


def train(args: argparse.Namespace) -> None:
    device, rank = set_up(args)
    model = make_model(args, device, rank)
    optimizer, scheduler = make_optimizer(model, args.steps)
    # 1. A loader that knows its position. 2. Everything that makes up the job, the model as it is after wrapping.
    loader = gpumove.ElasticLoader(Text(args.context), args.batch, shuffle=True, seed=args.seed)
    record = Record(args.out, rank)
    with gpumove.Checkpointer(
        args.url, model=model, optimizer=optimizer, scheduler=scheduler, loader=loader, every_steps=args.every_steps
    ) as ckpt:
        step = ckpt.restore()  # 3. Go on from the newest checkpoint; 0 in a new run.
        record.write(resumed=step)
        batches = chain.from_iterable(repeat(loader))  # pass after pass, without end
        while step < args.steps:
            start, loss = loader.position, torch.zeros((), device=device)
            for _ in range(args.accumulate):
                part = model(next(batches).to(device)) / args.accumulate
                part.backward()
                loss += part.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # one number, on every rank
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if dist.is_initialized():
                dist.all_reduce(loss)
                loss /= dist.get_world_size()
            samples = blake2b(loader.indices(start, loader.position).tobytes(), digest_size=8).hexdigest()
            # In hexadecimal: every bit of the number.
            record.write(step=step, loss=float(loss).hex(), norm=float(norm).hex(), samples=samples)
            record.save(ckpt.last)
            # 4. The step is complete. Saves beside the training, when it is due.
            if ckpt.step(step, loss=loss, grad_norm=norm):
                break  # it has to leave, and what could be saved is saved
        else:
            ckpt.save(step, pinned=True).wait()  # 5. The end result: wait for it, and keep it for good.
        record.save(ckpt.last)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="where the checkpoints lie: a folder, s3://, gs:// or abfs://")
    parser.add_argument("--out", metavar="FILE", help="append one JSON line per step and per save")
    parser.add_argument("--ddp", action="store_true", help="under torchrun: DistributedDataParallel")
    parser.add_argument("--fsdp", action="store_true", help="under torchrun: FSDP2")
    sizes = {"steps": 600, "every-steps": 25, "batch": 8, "accumulate": 1, "context": 128, "layers": 4, "width": 128}
    for name, default in {**sizes, "threads": 1, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--dropout", type=float, default=0.1, help="default 0.1; 0 for the same losses at any number of ranks"
    )
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest", help="of products")
    return parser.parse_args(given)


if __name__ == "__main__":
    train(parse())
