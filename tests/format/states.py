"""Chunks to encode: every dtype, awkward values, and what real optimizers of torch make of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from gpumove.format.codec import decode, digest
from gpumove.format.coding import Coded, Field, Hyper, Rule

DTYPES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1, "int64": 8,
    "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip


def view(array: np.ndarray) -> memoryview:
    """Its bytes."""
    return memoryview(array.tobytes())


def values(dtype: str, count: int, kind: str, seed: int = 0) -> memoryview:
    """Bytes of ``count`` elements: "bits" are random, so also NaN of every payload, infinities, denormals."""
    rng = np.random.default_rng([seed, count, len(kind)])
    size = DTYPES[dtype]
    if kind == "bits":
        return memoryview(rng.bytes(count * size))
    if kind == "same":
        return memoryview(rng.bytes(size) * count)
    if kind == "runs":
        return memoryview(
            np.repeat(rng.integers(0, 256, (max(1, count // 100), size), np.uint8), 100, 0)
            .tobytes()[: count * size]
            .ljust(count * size, b"\1")
        )
    if kind == "edges":
        edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38, 1.0], np.float32)
        wide = edges[rng.integers(0, len(edges), count * max(1, size // 4))]
    else:
        wide = (rng.standard_normal(count * max(1, size // 4)) * 0.02).astype(np.float32)
    if size < 4:
        wide = wide.view(np.uint32) >> (32 - 8 * size)
        return view(wide.astype(f"<u{size}"))
    return view(wide)


def nudged(data: memoryview, kind: str, seed: int = 1) -> memoryview:
    """A base for a chunk."""
    rng = np.random.default_rng([seed, len(data)])
    if kind == "random":
        return memoryview(rng.bytes(len(data)))
    array = np.frombuffer(data, np.uint8).copy()
    if kind == "near" and array.size:
        array[:: 1 + array.size // 50] += 1
    return memoryview(array.tobytes())


def bases_of(fields: Sequence[Field], coded: Coded) -> list[memoryview]:
    """What its decoder is given."""
    return [fields[s.field].base if s.old else fields[s.field].new for s in coded.bases]  # type: ignore[misc]


def decoded(fields: Sequence[Field], coded: Coded, n: int) -> bytes:
    """The bytes again."""
    out = bytearray(len(fields[n].new))
    decode(
        coded.codec,
        memoryview(coded.stored),
        memoryview(out),
        bases=bases_of(fields, coded),
        expected=digest(fields[n].new),
    )
    return bytes(out)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Of a tensor, also of bfloat16."""
    return memoryview(tensor.detach().contiguous().view(torch.uint8).reshape(-1).numpy().tobytes())


def stepped(
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    *,
    steps: int = 1,
    count: int = 50_021,
    dtype: torch.dtype = torch.float32,
    gradients: torch.dtype = torch.float32,
    rows: float = 1.0,
) -> list[Field]:
    """The family of one parameter, 20 steps into a run and ``steps`` later. ``rows``: the share that has a gradient."""
    generator = torch.Generator().manual_seed(7)
    parameter = torch.nn.Parameter((torch.randn(count, generator=generator) * 0.02).to(dtype))
    optimizer = make([parameter])
    scale, taken = torch.rand(count, generator=generator), []
    active = torch.arange(count) < rows * count
    for n in range(20 + steps):
        noise = torch.randn(count, generator=generator) * 1e-3 * scale
        if n >= 20:
            noise = noise * active
        parameter.grad = noise.to(gradients).to(dtype)
        optimizer.step()
        if n in (19, 19 + steps):
            state = {k: v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v) and v.ndim}
            taken.append({k: tensor_bytes(v) for k, v in {"parameter": parameter, **state}.items()})
    old, new = taken
    return [Field(role, str(dtype).removeprefix("torch."), new[role], old[role]) for role in new]


def rule(optimizer: torch.optim.Optimizer, steps: int = 1) -> Rule:
    """Its rule, ``steps`` after the 20th step."""
    group = optimizer.param_groups[0]
    if "betas" in group:
        beta1, beta2 = group["betas"]
        decoupled = isinstance(optimizer, torch.optim.AdamW)
        hyper = Hyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], decoupled, 20 + steps)
        return Rule("adam", steps, (hyper,))
    hyper = Hyper(
        group["lr"],
        momentum=group["momentum"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        step=20 + steps,
    )
    return Rule("momentum", steps, (hyper,))
