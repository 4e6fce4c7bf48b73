"""The commit: wait for every rank's part, check that the plan is covered, publish manifest and log entry.

Only rank 0 runs this. It reads names, not parts: a part's name says its rank, its digest and the digest of the plan
that it followed, so a commit costs one listing and two small objects, whatever the size of the job.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gpumove.errors import ConfigError, GpumoveError, IntegrityError, ObjectNotFoundError, StoreError
from gpumove.format import keys
from gpumove.format.codec import digest
from gpumove.format.manifest import FORMAT, Checkpoint, LogEntry, Manifest, PartRef, Took, TraceRow, encode
from gpumove.format.probes import Probe
from gpumove.store.log import Log
from gpumove.store.view import View

_POLL_S = (0.02, 1.0)
_CHANCE = random.SystemRandom()  # python's global generator belongs to the training job, and is in its checkpoints


@dataclass(frozen=True)
class Order:
    """What rank 0 wants to see in the log."""

    attempt: str
    step: int
    plans: Sequence[str]
    """The plan digest of every rank."""
    state_bytes: int
    fingerprint: Mapping[str, Any]
    trace: Sequence[TraceRow]
    trace_after: str = ""
    health: Sequence[Mapping[str, Any]] = ()
    probes: Sequence[Probe] = ()
    pinned: bool = False


def wait_for_parts(log: Log, order: Order, *, timeout_s: float, cancelled: threading.Event) -> list[PartRef]:
    """Wait until the parts in the store cover the plan.

    Args:
        log: the run's log.
        order: the plan to cover.
        timeout_s: bound on the wait.
        cancelled: ends the wait.

    Raises:
        StoreError: a rank said that it failed, or did not answer in time; it is named.
        IntegrityError: a part follows another plan than the one that was agreed.
    """
    deadline = time.monotonic() + timeout_s
    pause = _POLL_S[0]
    while True:
        found, failed = _look(log, order)
        if missing := sorted(set(range(len(order.plans))) - set(found)):
            if failed:
                raise _failure(log, failed)
            if cancelled.is_set():
                raise StoreError(f"the save of step {order.step} was abandoned", code="store.abandoned")
            if time.monotonic() > deadline:
                raise StoreError(
                    f"the save of step {order.step} is incomplete after {timeout_s:.0f} s: no part of "
                    f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}. The newest committed "
                    "checkpoint stands; look at those ranks' logs, and whether all ranks write to one store",
                    code="store.missing_parts",
                )
            time.sleep(pause * _CHANCE.uniform(0.5, 1.0))
            pause = min(2 * pause, _POLL_S[1])
            continue
        return [found[rank] for rank in sorted(found)]


def _look(log: Log, order: Order) -> tuple[dict[int, PartRef], dict[int, str]]:
    found: dict[int, PartRef] = {}
    failed: dict[int, str] = {}
    for info in log.store.list(f"parts/{order.attempt}/"):
        receipt = keys.read_receipt(info.key)
        if receipt is None:
            if (rank := keys.failed_rank(info.key)) is not None:
                failed[rank] = info.key
            continue
        if receipt.rank >= len(order.plans) or not order.plans[receipt.rank].startswith(receipt.plan):
            raise IntegrityError(
                f"{log.store.url}/{info.key} follows another plan than the one agreed on: was it written twice?",
                code="integrity.plan",
            )
        found[receipt.rank] = receipt.ref(info.nbytes)
    return found, failed


def _failure(log: Log, failed: Mapping[int, str]) -> GpumoveError:
    rank = min(failed)
    code, text = "store.rank_failed", "it could not say why"
    try:
        record = msgspec.json.decode(log.store.get(failed[rank]))
        code, text = str(record["code"]), str(record["error"])
    except (ObjectNotFoundError, msgspec.DecodeError, KeyError, TypeError):
        pass
    kind = ConfigError if code.startswith("config") else StoreError
    return kind(f"rank {rank} could not write its part: {text}", code=code)


def commit(log: Log, order: Order, parts: Sequence[PartRef], *, took: Took | None = None) -> Checkpoint:
    """Publish: the manifest first, then the log entry that makes it a checkpoint.

    Args:
        log: the run's log.
        order: what is to be committed.
        parts: of every rank.
        took: what the save has cost so far.

    Raises:
        FencedError: another owner has claimed the run; nothing was committed.
    """
    epoch = log.epoch
    if epoch is None:
        raise ConfigError("only an owner may commit: claim the run first")
    if not order.attempt.startswith(keys.attempt_name(epoch, 0)[:9]):
        raise ConfigError(f"the attempt {order.attempt} is dead: this is epoch {epoch}", code="config.dead")
    new_bytes = sum(part.new_bytes for part in parts)
    plan = digest("".join(order.plans).encode())
    manifest = encode(
        Manifest(
            format=FORMAT, run=log.run, step=order.step, epoch=epoch, attempt=order.attempt,
            world_size=len(order.plans), time=time.time(), state_bytes=order.state_bytes, new_bytes=new_bytes,
            plan=plan, parts=tuple(parts), fingerprint=dict(order.fingerprint), trace=tuple(order.trace),
            health=tuple(dict(finding) for finding in order.health), took=took, trace_after=order.trace_after,
            probes=tuple(order.probes),
        )
    )  # fmt: skip
    name = digest(manifest)
    log.store.put(keys.manifest_key(order.attempt, name), manifest)

    def make(view: View, number: int) -> LogEntry:
        if any(c.attempt >= order.attempt for c in view.checkpoints):
            raise ConfigError(
                f"the attempt {order.attempt} is dead: a later one has been committed", code="config.dead"
            )
        return Checkpoint(
            format=FORMAT, number=number, epoch=epoch, writer=log.writer, time=time.time(), step=order.step,
            attempt=order.attempt, manifest=name, manifest_bytes=len(manifest), world_size=len(order.plans),
            state_bytes=order.state_bytes, new_bytes=new_bytes, pinned=order.pinned,
        )  # fmt: skip

    return log.append(make)  # type: ignore[return-value]


def wait_for_commit(log: Log, attempt: str, *, timeout_s: float) -> Checkpoint:
    """On other ranks: follow the log until this attempt is in it.

    Raises:
        StoreError: rank 0 said that it gave up, a later attempt is there instead, or nothing came in time.
        FencedError: another owner has claimed the run.
    """
    deadline = time.monotonic() + timeout_s
    pause = _POLL_S[0]
    while True:
        log.follow()
        for checkpoint in reversed(log.view.checkpoints):
            if checkpoint.attempt == attempt:
                return checkpoint
        if log.store.exists(keys.failed_key(attempt, 0)) is not None:
            raise _failure(log, {0: keys.failed_key(attempt, 0)})
        if any(checkpoint.attempt > attempt for checkpoint in log.view.checkpoints):
            raise StoreError(
                f"the attempt {attempt} is not in the log, and a later one is: it failed, or retention has removed it",
                code="store.superseded",
            )
        if time.monotonic() > deadline:
            raise StoreError(f"rank 0 did not commit the attempt {attempt} in {timeout_s:.0f} s", code="store.peers")
        time.sleep(pause * _CHANCE.uniform(0.5, 1.0))
        pause = min(2 * pause, _POLL_S[1])
