"""What a replicator may write to: a log's view in, an error or nothing out. Pure; it reads no store."""

from __future__ import annotations

from gpumove.errors import ConfigError
from gpumove.store.view import View


def check_target(view: View, source: View, *, here: str, there: str) -> None:
    """Refuse a log that a replicator must not write to.

    Args:
        view: what the target's log says.
        source: what the source's says.
        here: the target's URL.
        there: the source's.

    Raises:
        ConfigError: a job owns it, or may; it was moved away; it has gone on by itself; or that cannot be told.
    """
    if view.sealed not in ("", there):
        raise ConfigError(f"{here} is not to be written to: {view.refusal()}", code="config.sealed")
    if view.epoch and not view.follows and not view.sealed:
        raise ConfigError(
            f"{here} is no replica: a job may own the run there, and its checkpoints would be mixed with those of "
            f"{there}. Use another URL, or gpumove move to hand the run over",
            code="config.owned",
        )
    if view.broken:
        raise ConfigError(
            f"{here}: log entry {view.broken[-1].number} cannot be read and may have been a handover: nothing is "
            "written there. If no job runs there, drop the entry with gpumove gc --yes, or use another URL",
            code="config.broken",
        )
    known = {c.attempt: c for c in source.checkpoints}
    last = max(known, default="")
    for checkpoint in view.checkpoints:
        same = known.get(checkpoint.attempt)
        other = same is not None and same.manifest != checkpoint.manifest
        if other or (checkpoint.attempt > last and not source.broken):
            raise ConfigError(
                f"{here} has a checkpoint of step {checkpoint.step} (attempt {checkpoint.attempt}) that {there} "
                "never had: the run has gone on there by itself. Use another URL, or replicate the other way round",
                code="config.fork",
            )
