"""Reading a checkpoint without owning the run: evaluation, serving, a second look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.restore import fill, read_contents
from gpumove.state.capture import Job
from gpumove.state.peers import process_rank
from gpumove.store.log import Log
from gpumove.store.objects import Store


def load(
    url: str,
    step: int | None = None,
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
        step: which checkpoint; the newest if None.
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
    store = Store.open(url, config, options=storage_options)
    rank = process_rank()
    try:
        log = Log(store)
        if not log.open(create=False):
            raise ConfigError(f"there is no gpumove run at {store.url}", code="config.no_run")
        found = log.read().find(step)
        if found is None:
            what = "no checkpoint yet" if step is None else f"no checkpoint of step {step}"
            raise ConfigError(f"the run at {store.url} has {what}", code="config.no_checkpoint")
        contents = read_contents(store, found, rank=rank, config=config)
        job = Job(model=model, optimizer=optimizer, objects=objects)
        targets = job.match(contents.saved, world_size=contents.saved.world_size, strict=False)
        fill(store, contents, targets, config=config)
        job.load(contents.saved, targets)
    finally:
        store.close()
    return found.step
