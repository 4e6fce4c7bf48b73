"""The store dies, or loses its answer, at the k-th call, for every k of a restore, of saves and of a gc.

After each: the log is whole, every checkpoint in it is complete, the newest restores to the exact state of its step, no
durability was claimed falsely, training goes on, and the next gc leaves nothing behind that nobody needs.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gpumove
from gpumove.config import Config
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import reachable
from tests.jobs import new_job
from tests.store.faults import Crash, FaultyStore, Mode

SETTINGS: dict[str, Any] = {
    "chunk_bytes": 4096, "pack_bytes": 8192, "budget_bytes": 65536, "concurrency": 1, "workers": 1,
    "keep_last": 1, "every_s": None, "retry_s": 5.0,
}  # fmt: skip
CONFIG = Config(**SETTINGS)
LAST = 5


@pytest.fixture(scope="module")
def truth() -> dict[int, str]:
    """The state's fingerprint after each step of a run that nothing happens to."""
    job, seen = new_job(), {}
    for step in range(LAST + 2):
        seen[step] = job.fingerprint()
        job.train(step, step + 1)
    return seen


def train(url: str, store: Any, until: int, claims: list[int]) -> None:
    """Restore, then save every step; ``claims`` gets the steps of which the handle said that they are durable."""
    job = new_job()
    genuine, Store.open = Store.open, classmethod(lambda *_, **__: store)  # type: ignore[method-assign,assignment]
    try:
        ckpt = gpumove.Checkpointer(url, **job.parts(), **SETTINGS)
    finally:
        Store.open = genuine  # type: ignore[method-assign]
    try:
        step = ckpt.restore()
        while step < until:
            job.train(step, step + 1, ckpt)
            step += 1
            ckpt.save(step).wait(30)
            claims.append(step)
    finally:
        with contextlib.suppress(BaseException):
            ckpt.close()


def check(url: str, truth: dict[int, str], claims: list[int]) -> None:
    """Everything that must hold after a crash."""
    store = Store.open(url, CONFIG)
    log = Log(store)
    run = log.open(create=False)
    view = log.read() if run else log.view
    for checkpoint in view.checkpoints:
        for key, nbytes in reachable(store, checkpoint).items():
            info = store.exists(key)
            assert info is not None, f"{key} is missing"
            assert info.nbytes == nbytes
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS) as ckpt:
        step = ckpt.restore()
        assert step >= max(claims, default=0), "durability was claimed falsely"
        assert job.fingerprint() == truth[step]
        job.train(step, step + 1, ckpt)
        ckpt.save(step + 1).wait(30)
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS) as ckpt:
        assert ckpt.restore() == step + 1
        assert job.fingerprint() == truth[step + 1]
    log.read()
    collect(log, Retention(keep_last=1))
    needed = {key for c in log.view.checkpoints for key in reachable(store, c)}
    left = {o.key for room in ("packs/", "parts/", "manifests/") for o in store.list(room)}
    assert left == needed
    store.close()


def copy(source: str, target: str) -> None:
    """Everything that is there."""
    with (
        contextlib.closing(Store.open(source, CONFIG)) as there,
        contextlib.closing(Store.open(target, CONFIG)) as here,
    ):
        for info in there.list(""):
            here.put(info.key, there.get(info.key))


def every_call(mode: Mode, first: int, truth: dict[int, str], new_url: Callable[[], str], stride: int = 1) -> int:
    """Crash a run that begins with ``first`` committed steps at each of its calls; how many there were."""
    at, begun = 0, new_url()
    if first:
        train(begun, Store.open(begun, CONFIG), first, [])
    while True:
        at += stride
        url = new_url()
        copy(begun, url)
        faulty = FaultyStore(Store.open(url, CONFIG), at=at, mode=mode)
        claims: list[int] = []
        try:
            train(url, faulty, LAST, claims)
        except Crash:
            pass
        else:
            assert claims[-1] == LAST
        finally:
            faulty.close()
        try:
            check(url, truth, claims)
        except BaseException as error:
            error.add_note(f"mode {mode}, call {at}: {faulty.trail[at - 1 : at]}")
            raise
        if faulty.calls < at:
            return faulty.calls


def memory_url() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.mark.parametrize("mode", ["before", "after", "torn", "lost"])
def test_at_every_call_of_a_resumed_run(mode: Mode, truth: dict[int, str]) -> None:
    calls = every_call(mode, LAST - 2, truth, memory_url)
    assert calls > 40, "the run made fewer calls than a restore, two saves and their gc need"


@pytest.mark.parametrize("mode", ["before", "after"])
def test_at_every_call_of_a_new_run(mode: Mode, truth: dict[int, str]) -> None:
    assert every_call(mode, 0, truth, memory_url, stride=3) > 60


@pytest.mark.parametrize("mode", ["torn"])
def test_on_a_real_directory(mode: Mode, truth: dict[int, str], tmp_path: Path) -> None:
    every_call(mode, LAST - 1, truth, lambda: str(tmp_path / uuid.uuid4().hex), stride=4)
