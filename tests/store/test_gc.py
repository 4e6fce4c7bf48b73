"""Collection: only what gpumove wrote and nothing needs, whatever is damaged; and the log outlives its gc entries."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import gpumove
from gpumove.config import Config
from gpumove.errors import FencedError, IntegrityError
from gpumove.format import keys
from gpumove.store.gc import Retention, collect, plan
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import reachable
from tests.jobs import new_job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with five checkpoints."""
    path, job = tmp_path_factory.mktemp("gc") / "run", new_job()
    with gpumove.Checkpointer(str(path), **job.parts(), keep_last=None) as ckpt:
        step = ckpt.restore()
        while step < 5:
            job.train(step, step + 1, ckpt)
            step += 1
            ckpt.save(step).wait(60)
    return path


@pytest.fixture
def log(made: Path, tmp_path: Path) -> Log:
    shutil.copytree(made, tmp_path / "run")
    opened = Log(Store.open(str(tmp_path / "run"), Config()))
    opened.open(create=False)
    opened.read()
    return opened


def everything(log: Log) -> set[str]:
    return {o.key for o in log.store.list("")}


def test_a_plan_changes_nothing(log: Log) -> None:
    before = everything(log)
    found = plan(log.store, log.view, Retention(keep_last=2), reach=lambda c: reachable(log.store, c))
    assert [c.step for c in found.kept] == [4, 5]
    assert found.doomed
    assert everything(log) == before


def test_what_gpumove_did_not_write_is_never_touched(log: Log) -> None:
    foreign = [
        "notes.txt", "packs/readme", "packs/00000001-00000001/mine.txt", "packs/00000001-00000001/mine.safetensors",
        "manifests/00000001-00000001-notes.txt", "parts/00000001-00000001/0.json", "log/notes.json", "other/x",
    ]  # fmt: skip
    for key in foreign:
        log.store.put(key, b"mine")
    collect(log, Retention(keep_last=1))
    assert set(foreign) <= everything(log)


def test_what_is_left_is_what_the_kept_ones_need(log: Log) -> None:
    collect(log, Retention(keep_last=2))
    needed = {k for c in log.view.checkpoints for k in reachable(log.store, c)}
    rest = {k for k in everything(log) if not k.startswith("log/")} - {"format.json"}
    assert rest == needed
    assert [c.step for c in log.view.checkpoints] == [4, 5]


def test_a_running_attempt_is_left_alone_and_a_dead_one_is_not(log: Log) -> None:
    running, dead = (f"packs/{keys.attempt_name(*a)}/{'a' * 32}.safetensors" for a in ((1, 6), (1, 4)))
    log.store.put(running, b"x")
    log.store.put(dead, b"x")
    collect(log, Retention(keep_last=1))
    assert running in everything(log)
    assert dead not in everything(log)
    log.claim()  # a new epoch: nobody can commit that attempt any more
    collect(log, Retention(keep_last=1))
    assert running not in everything(log)


def test_a_damaged_checkpoint_that_is_kept_does_not_stop_collection_of_newer_garbage(log: Log) -> None:
    second = log.view.checkpoints[1]
    log.pin(second, pinned=True)
    log.store.delete([second.manifest_key])
    before = everything(log)
    done = collect(log, Retention(keep_last=1))
    assert [c.step for c in done.unreadable] == [2]
    gone = before - everything(log)
    attempts = {keys.attempt_of(k) for k in gone if not k.startswith("log/")}
    # Nothing as old as the damaged one, whose needs are not known; all that is newer and not needed.
    assert attempts == {"00000001-00000003", "00000001-00000004"}


def test_when_the_newest_gc_entry_rots_the_log_can_still_be_read(log: Log) -> None:
    collect(log, Retention(keep_last=3))
    entry = collect(log, Retention(keep_last=2))
    assert [c.step for c in entry.kept] == [4, 5]
    head = keys.entry_key(log.view.head)
    data = bytearray(log.store.get(head))
    data[30] ^= 1
    log.store.put(head, bytes(data))
    fresh = Log(log.store)
    view = fresh.read()
    assert [b.number for b in view.broken] == [log.view.head]
    assert [c.step for c in view.checkpoints] == [3, 4, 5]
    job = new_job(seed=2)
    assert gpumove.load(log.store.url, model=job.model, optimizer=job.optimizer) == 5


def test_old_entries_go_with_the_second_gc(log: Log) -> None:
    collect(log, Retention(keep_last=3))
    assert keys.entry_key(1) in everything(log)
    collect(log, Retention(keep_last=3))
    assert keys.entry_key(1) not in everything(log)
    assert [c.step for c in log.read().checkpoints] == [3, 4, 5]
    # With both generations gone and something after them, it is a hole: an error, never a shorter history.
    head = log.view.head
    log.store.put(keys.entry_key(head + 1), b"rubbish")
    log.store.delete([keys.entry_key(n) for n in range(1, head + 1)])
    with pytest.raises(IntegrityError, match="hole"):
        log.read()


def test_who_owns_the_run_is_known_after_its_claim_is_collected(log: Log) -> None:
    owner = (log.view.writer, log.view.host)
    assert all(owner)
    for keep_last in (3, 2):  # the second one takes the claim away, and has not seen it
        log.read()
        collect(log, Retention(keep_last=keep_last))
    assert log.read().first > 1
    assert (log.view.writer, log.view.host) == owner


def test_a_collector_that_has_lost_the_run_stops_deleting(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumove.store.gc._BATCH", 1)
    log.claim(resumed=log.view.checkpoints[-1].number)
    doomed = plan(log.store, log.view, Retention(keep_last=1), reach=lambda c: reachable(log.store, c)).doomed
    assert len(doomed) > 3
    delete, gone = log.store.delete, []  # type: ignore[var-annotated]

    def meanwhile(names: Sequence[str]) -> None:
        delete(names)
        gone.extend(names)
        if len(gone) == 2:
            other = Log(log.store)
            other.read()
            other.claim()

    monkeypatch.setattr(log.store, "delete", meanwhile)
    with pytest.raises(FencedError):
        collect(log, Retention(keep_last=1))
    assert gone == list(doomed[:2])
    assert set(doomed[2:]) <= everything(log)
