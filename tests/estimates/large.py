"""A run of some size, quickly made."""

from __future__ import annotations

from pathlib import Path

import torch

import gpumove

_PARAMETERS = 6_000_000


def large_run(url: Path) -> None:
    """One checkpoint of 72 MB: a parameter and two moments."""
    torch.manual_seed(0)
    model = torch.nn.ParameterList([torch.randn(_PARAMETERS)])
    optimizer = torch.optim.AdamW(model.parameters())
    model[0].grad = torch.randn(_PARAMETERS)
    optimizer.step()
    with gpumove.Checkpointer(str(url), model=model, optimizer=optimizer, every_s=None, codec="raw") as ckpt:
        ckpt.restore()
        ckpt.save(1).wait(60)
