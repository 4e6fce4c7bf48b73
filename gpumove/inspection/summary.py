"""What a run and a checkpoint are made of, as plain data for people and programs. No torch, and no writing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpumove.config import Config
from gpumove.format.dtypes import item_bytes
from gpumove.format.manifest import Checkpoint, Manifest, Part, PartRef, TensorEntry
from gpumove.format.pack import shape_bytes
from gpumove.inspection.condition import explain
from gpumove.inspection.groups import Group, tally
from gpumove.parity.trace import number
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import read_manifest, read_parts
from gpumove.store.view import Broken, View


@dataclass(frozen=True)
class Row:
    """One checkpoint of a run. ``damage`` is what is known without reading it, or None."""

    entry: int
    step: int
    time: float
    epoch: int
    world_size: int
    state_bytes: int
    new_bytes: int
    pinned: bool
    damage: str | None


@dataclass(frozen=True)
class Resume:
    """What ``restore()`` would take now. ``step`` is 0 and ``entry`` None if it began anew, or not at all."""

    step: int
    entry: int | None
    why: str


@dataclass(frozen=True)
class Overview:
    """A run: who owns it, what it holds, what would be resumed."""

    url: str
    run: str
    head: int
    epoch: int
    host: str
    writer: str
    now: float
    checkpoints: tuple[Row, ...]
    broken: tuple[Broken, ...]
    """Log entries that cannot be read; what they said is lost."""
    resume: Resume
    condition: str
    """Where the run is moved, or was, in words; "" if it is not."""


def overview(log: Log) -> Overview:
    """Read a run's log, and one listing that tells whether the manifests are there.

    Raises:
        IntegrityError: the log is damaged.
    """
    view = log.read()
    sizes = {found.key: found.nbytes for found in log.store.list("manifests/")}
    rows = tuple(_row(log.store, view, c, sizes.get(c.manifest_key)) for c in view.checkpoints)
    return Overview(
        url=log.store.url, run=log.run, head=view.head, epoch=view.epoch, host=view.host, writer=view.writer,
        now=time.time(), checkpoints=rows, broken=view.broken, resume=_resume(view, rows),
        condition=explain(view, log.store.url),
    )  # fmt: skip


def _row(store: Store, view: View, checkpoint: Checkpoint, nbytes: int | None) -> Row:
    if nbytes is None and (info := store.exists(checkpoint.manifest_key)) is not None:
        nbytes = info.nbytes  # a listing is no snapshot
    damage = None
    if checkpoint.number in view.damaged:
        damage = "a restore could not read it"
    elif nbytes is None:
        damage = "its manifest is missing"
    elif nbytes != checkpoint.manifest_bytes:
        damage = f"its manifest has {nbytes} bytes instead of {checkpoint.manifest_bytes}"
    return Row(
        entry=checkpoint.number, step=checkpoint.step, time=checkpoint.time, epoch=checkpoint.epoch,
        world_size=checkpoint.world_size, state_bytes=checkpoint.state_bytes, new_bytes=checkpoint.new_bytes,
        pinned=checkpoint.pinned, damage=damage,
    )  # fmt: skip


def _resume(view: View, rows: Sequence[Row]) -> Resume:
    """The newest checkpoint that nothing is known to be wrong with, as restore() goes through them, where it may."""
    if why := view.refusal():
        return Resume(0, None, f"nothing, here: {why}")
    rows = sorted(rows, key=lambda row: row.entry not in view.abandoned)  # stable: abandoned ones are tried last
    if not rows:
        return Resume(0, None, "no checkpoint has been committed yet, so training begins at step 0")
    skipped: list[str] = []
    for row in reversed(rows):
        if row.damage is None:
            why = "it is the newest committed checkpoint"
            if row.entry == view.resumed and row.entry != view.checkpoints[-1].number:
                why = "the run went on from it last, and nothing was committed after that"
            if skipped:
                why = f"newer ones are damaged: {'; '.join(skipped)}"
            return Resume(row.step, row.entry, why)
        skipped.append(f"step {row.step} (entry {row.entry}): {row.damage}")
    return Resume(0, None, f"every checkpoint is damaged, so restore() fails: {'; '.join(skipped)}")


@dataclass(frozen=True)
class PartRow:
    """What one rank wrote."""

    rank: int
    key: str
    nbytes: int
    new_bytes: int
    tensors: int
    local: int
    packs: int
    older_packs: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """The losses recorded since the checkpoint before; None where they were not finite."""

    count: int
    first: tuple[int, float | None]
    last: tuple[int, float | None]
    lowest: float | None
    highest: float | None


@dataclass(frozen=True)
class TensorRow:
    """One tensor. ``rank`` is set for those that belong to one rank."""

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: int
    rank: int | None


@dataclass(frozen=True)
class Detail:
    """One checkpoint."""

    url: str
    run: str
    entry: int
    step: int
    epoch: int
    attempt: str
    time: float
    pinned: bool
    world_size: int
    manifest: str
    state_bytes: int
    new_bytes: int
    stored_bytes: int
    older_stored_bytes: int
    restore_bytes: int
    """What a restore of everything fetches: the stored bytes, and those of older chunks that they are decoded from."""
    chain: int
    """Most earlier saves that a chunk is decoded through."""
    fingerprint: dict[str, Any]
    values: tuple[str, ...]
    groups: tuple[Group, ...]
    parts: tuple[PartRow, ...]
    trace: Trace | None
    health: tuple[dict[str, Any], ...]
    """What was found to be wrong with the training, oldest first (docs/health.md)."""
    tensors: tuple[TensorRow, ...] | None
    condition: str
    """Of the run, as in :class:`Overview`."""


def detail(log: Log, checkpoint: Checkpoint, *, config: Config, tensors: bool = False) -> Detail:
    """Read a checkpoint's manifest and parts.

    Args:
        log: its run.
        checkpoint: the log entry.
        config: bounds.
        tensors: list every tensor too.

    Raises:
        IntegrityError: a record is missing or damaged.
    """
    manifest = read_manifest(log.store, checkpoint)
    parts = read_parts(log.store, manifest.parts, concurrency=config.concurrency)
    groups, needs = tally(parts, manifest.attempt)
    stored, new = sum(g.stored_bytes for g in groups), sum(g.new_stored_bytes for g in groups)
    return Detail(
        url=log.store.url,
        run=manifest.run,
        entry=checkpoint.number,
        step=manifest.step,
        epoch=manifest.epoch,
        attempt=manifest.attempt,
        time=manifest.time,
        pinned=checkpoint.pinned,
        world_size=manifest.world_size,
        manifest=checkpoint.manifest_key,
        state_bytes=manifest.state_bytes,
        new_bytes=manifest.new_bytes,
        stored_bytes=stored,
        older_stored_bytes=stored - new,
        restore_bytes=needs.nbytes,
        chain=needs.chain,
        fingerprint=manifest.fingerprint,
        values=tuple(sorted({name for part in parts for name in part.values})),
        groups=groups,
        parts=tuple(_part_row(ref, part) for ref, part in zip(manifest.parts, parts)),
        trace=_trace(manifest),
        health=manifest.health,
        tensors=_tensor_rows(parts) if tensors else None,
        condition=explain(log.view, log.store.url),
    )


def _part_row(ref: PartRef, part: Part) -> PartRow:
    return PartRow(
        rank=ref.rank,
        key=ref.key,
        nbytes=ref.nbytes,
        new_bytes=ref.new_bytes,
        tensors=len(part.tensors),
        local=len(part.local),
        packs=len(part.packs),
        older_packs=sum(pack.attempt != part.attempt for pack in part.packs),
        values=tuple(part.values),
    )


def _trace(manifest: Manifest) -> Trace | None:
    rows = [row for row in manifest.trace if number(row, "loss") is not None]
    if not rows:
        return None
    losses = [row.loss for row in rows if row.loss is not None]
    return Trace(
        count=len(rows),
        first=(rows[0].step, rows[0].loss),
        last=(rows[-1].step, rows[-1].loss),
        lowest=min(losses, default=None),
        highest=max(losses, default=None),
    )


def _tensor_rows(parts: Iterable[Part]) -> tuple[TensorRow, ...]:
    rows: list[TensorRow] = []
    chunks: Counter[str] = Counter()
    shared: dict[str, TensorEntry] = {}
    for part in parts:
        for entry in part.tensors:
            shared[entry.fqn] = entry
            chunks[entry.fqn] += len(entry.chunks)
        rows += [_tensor_row(entry, len(entry.chunks), part.rank) for entry in part.local]
    rows += [_tensor_row(entry, chunks[fqn], None) for fqn, entry in shared.items()]
    return tuple(sorted(rows, key=lambda r: (r.fqn, -1 if r.rank is None else r.rank)))


def _tensor_row(entry: TensorEntry, chunks: int, rank: int | None) -> TensorRow:
    nbytes = shape_bytes(entry.shape, item_bytes(entry.dtype))
    return TensorRow(entry.fqn, entry.dtype, entry.shape, nbytes, chunks, rank)
