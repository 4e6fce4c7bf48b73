"""A job's state as one flat dict of tensors, for peers that take nothing else; and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.workload import Job


def flatten(job: Job) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state by name; shared tensors once."""
    return {name: tensor.detach() for name, tensor in job.tensors()}


def load(job: Job, found: Mapping[str, torch.Tensor]) -> None:
    """Copy into the live parameters; the optimizer takes its state by ``load_state_dict``."""
    names = {parameter: name for name, parameter in job.model.named_parameters()}
    parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(found[name])
    for index, parameter in enumerate(parameters):
        prefix = names[parameter] + "."
        state[index] = {key: found[prefix + key] for key in ("exp_avg", "exp_avg_sq", "step") if prefix + key in found}
    job.optimizer.load_state_dict({**job.optimizer.state_dict(), "state": state})
