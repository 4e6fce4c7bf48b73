"""Looking at live modules without changing the training: what runs inside ``aside`` leaves no trace in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gpumove.errors import ConfigError
from gpumove.state import rng
from gpumove.state.locals import local_tensor


@contextmanager
def aside(modules: Sequence[nn.Module]) -> Iterator[None]:
    """In eval mode and without gradients; then flags, generators and buffers are put back as they were.

    Raises:
        ConfigError: what ran inside has changed parameters, which cannot be put back.
    """
    parts = [part for module in modules for part in module.modules()]
    flags = [part.training for part in parts]
    generators = rng.capture()
    weights = _versions(p for module in modules for p in module.parameters())
    buffers = [local_tensor(b).detach() for module in modules for b in module.buffers() if not b.is_inference()]
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        # The flags alone, and not eval(): a module that overrides train() may merge weights there.
        for part in parts:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, flag in zip(parts, flags):
            part.training = flag
        rng.restore(generators)
        with torch.no_grad():
            for buffer, value in kept:  # versions do not tell: batch norm changes its own without counting
                if buffer.device.type != "cpu" or not torch.equal(buffer, value):
                    buffer.copy_(value)
        for part in parts:
            if isinstance(part, FSDPModule):
                part.reshard()  # after a forward without backward FSDP2 leaves some parameters whole
    if weights != _versions(p for module in modules for p in module.parameters()):
        raise ConfigError(
            "it has changed parameters of the model, and they stay so: a probe only looks. It is not run again",
            code="config.probe_writes",
        )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all ranks; all of them call this alike."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _versions(tensors: Iterator[torch.Tensor]) -> list[int]:
    return [_version(tensor) for tensor in tensors]


def _version(tensor: torch.Tensor) -> int:
    local = local_tensor(tensor)
    return 0 if local.is_inference() else local._version
