"""Reading a checkpoint without owning the run: evaluation, serving, a second look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gpumove.config import Config
from gpumove.format.pointer import Pointer
from gpumove.inspection.run import open_run, pick
from gpumove.restore import fill, read_contents
from gpumove.state.capture import Job
from gpumove.state.peers import process_rank


def load(
    url: str,
    step: int | Pointer | None = None,
    *,
    model: nn.Module | Mapping[str, nn.Module] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None = None,
    objects: Mapping[str, Any] | None = None,
    config: Config | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> int:
    """Fill live objects from a checkpoint. The run is not claimed and its owner is not disturbed.

    Every rank calls it for itself, with its own shards; what the checkpoint holds beyond the given objects is left out.

    Args:
        url: the run.
        step: which checkpoint: its step, a pointer, or the newest if None.
        model: as for :class:`gpumove.Checkpointer`.
        optimizer: likewise.
        objects: likewise, by the names that they were saved under.
        config: bounds; by default from the environment.
        storage_options: for fsspec.

    Returns:
        The checkpoint's step.

    Raises:
        ConfigError: there is no run, or no such checkpoint.
        IntegrityError: the checkpoint is damaged; nothing else is tried.
        LayoutError: it does not fit the objects.
    """
    config = Config.from_env() if config is None else config
    with open_run(url, config=config, storage_options=storage_options) as log:
        found = pick(log.read(), step, url=log.store.url)
        contents = read_contents(log.store, found, rank=process_rank(), config=config)
        job = Job(model=model, optimizer=optimizer, objects=objects)
        targets = job.match(contents.saved, world_size=contents.saved.world_size, strict=False)
        fill(log.store, contents, targets, config=config)
        job.load(contents.saved, targets)
    return found.step
