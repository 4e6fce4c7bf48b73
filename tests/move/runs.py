"""Small real runs to replicate, and what a copy of one must be."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import gpumove
from gpumove.config import Config
from gpumove.format import keys
from gpumove.format.codec import digest
from gpumove.format.manifest import FORMAT, Checkpoint, Manifest, Pack, Part, encode
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.jobs import TrainingJob, new_job

SETTINGS: dict[str, Any] = {
    "chunk_bytes": 4096, "pack_bytes": 8192, "budget_bytes": 1 << 20, "every_s": None, "retry_s": 20.0,
    "keep_last": None,
}  # fmt: skip
CONFIG = Config(**SETTINGS)


@dataclass(frozen=True)
class Place:
    """Where a run lies or is to lie."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def open(self, config: Config = CONFIG) -> Iterator[Store]:
        with contextlib.closing(Store.open(self.url, config, options=self.options)) as store:
            yield store

    @contextlib.contextmanager
    def log(self) -> Iterator[Log]:
        with self.open() as store:
            log = Log(store)
            log.open(create=False)
            log.read()
            yield log

    def keys(self, prefix: str = "") -> dict[str, int]:
        with self.open() as store:
            return {info.key: info.nbytes for info in store.list(prefix)}

    def steps(self) -> list[int]:
        with self.log() as log:
            return [c.step for c in log.view.checkpoints]


def memory() -> Place:
    return Place(f"memory://{uuid.uuid4().hex}")


def train(
    place: Place, until: int, *, each: Callable[[int, TrainingJob], None] = lambda step, job: None, **settings: Any
) -> dict[int, str]:
    """Resume or begin, save every step; what the weights were after each."""
    job, seen = new_job(), {}
    given = {**SETTINGS, **settings}
    with gpumove.Checkpointer(place.url, **job.parts(), storage_options=place.options, **given) as ckpt:
        step = ckpt.restore()
        while step < until:
            job.train(step, step + 1, ckpt)
            step += 1
            ckpt.save(step).wait(60)
            seen[step] = weights(job)
            each(step, job)
    return seen


def weights(job: TrainingJob) -> str:
    """A digest of the model and of the optimizer's state."""
    tensors = [*job.model.state_dict().values()]
    for entries in job.optimizer.state_dict()["state"].values():
        tensors += [entries[name] for name in sorted(entries)]
    return digest(b"".join(t.detach().contiguous().cpu().numpy().tobytes() for t in tensors))


def read(place: Place, step: int | None = None) -> tuple[int, str]:
    """A checkpoint, read without owning the run: its step and its weights."""
    job = new_job(seed=99)
    job.train(0, 1)  # the optimizer has its state then
    found = gpumove.load(
        place.url, step, model=job.model, optimizer=job.optimizer, config=CONFIG, storage_options=place.options
    )
    return found, weights(job)


def check(place: Place, truth: Mapping[int, str], steps: list[int]) -> None:
    """The copy has these checkpoints, whole, and each is what was trained."""
    assert place.steps() == steps
    found = gpumove.verify(place.url, deep=True, storage_options=place.options, config=CONFIG)
    assert found.sound, found.damage
    for step in steps:
        assert read(place, step) == (step, truth[step])


def commit(log: Log, serial: int, packs: list[Pack], size: int, at: float) -> None:
    """A checkpoint of packs whose bytes mean nothing."""
    attempt = keys.attempt_name(log.epoch or 0, serial)
    data = os.urandom(size)
    packs.append(Pack(attempt, digest(data), size))
    log.store.put(packs[-1].key, data)
    common = {"format": FORMAT, "run": log.run, "attempt": attempt, "step": serial, "world_size": 1}
    part = encode(Part(**common, rank=0, packs=tuple(packs)))  # type: ignore[arg-type]
    key = keys.part_key(attempt, rank=0, digest=digest(part), plan="0" * 16, new_bytes=size)
    log.store.put(key, part)
    receipt = keys.read_receipt(key)
    assert receipt is not None
    manifest = encode(
        Manifest(
            **common, epoch=log.epoch or 0, time=at, state_bytes=size, new_bytes=size, plan=digest(b""),  # type: ignore[arg-type]
            parts=(receipt.ref(len(part)),),
        )
    )  # fmt: skip
    log.store.put(keys.manifest_key(attempt, digest(manifest)), manifest)
    log.append(
        lambda view, number: Checkpoint(
            format=FORMAT, number=number, epoch=log.epoch or 0, writer=log.writer, time=at, step=serial,
            attempt=attempt, manifest=digest(manifest), manifest_bytes=len(manifest), world_size=1, state_bytes=size,
            new_bytes=size,
        )
    )  # fmt: skip


def replicate(source: Place, target: Place, **more: Any) -> Any:
    return gpumove.replicate(
        source.url, target.url, from_options=source.options, to_options=target.options,
        **{"config": CONFIG, "in_flight": 4, **more},
    )  # fmt: skip
