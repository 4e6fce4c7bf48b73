"""What runs say of themselves: real ones, short ones, ones that were started twice, damaged ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch

import gpumove
from gpumove.config import Config
from gpumove.environment.fingerprint import Environment
from gpumove.estimates import facts
from gpumove.estimates.facts import Facts, Speed, read_facts
from gpumove.estimates.interval import Range
from gpumove.format.manifest import FORMAT, Checkpoint, Manifest, Took, TraceRow
from gpumove.inspection.run import open_run
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import reachable, read_manifest
from tests.jobs import new_job
from tests.runs import Shard, train, write_sharded


def facts_of(url: Path) -> Facts:
    with open_run(str(url)) as log:
        return read_facts(log)


def stored(url: Path) -> int:
    return sum(
        f.stat().st_size for name in ("packs", "parts", "manifests") for f in (url / name).rglob("*") if f.is_file()
    )


def test_a_run(tmp_path: Path) -> None:
    train(str(tmp_path), [1, 2, 3, 4], codec="raw", delta=False)
    found = facts_of(tmp_path)
    with open_run(str(tmp_path)) as log:
        line = log.read().checkpoints
    assert (found.step, found.ranks, found.state_bytes) == (4, 1, line[-1].state_bytes)
    assert found.delta_bytes is not None
    assert found.every_s is not None
    assert found.step_s is not None
    with open_run(str(tmp_path)) as log:
        needed = reachable(log.store, line[-1])
    records = sum(nbytes for key, nbytes in needed.items() if not key.startswith("packs/"))
    assert found.packs == sum(key.startswith(f"packs/{line[-1].attempt}/") for key in needed) > 0
    sizes = sorted(c.new_bytes + records for c in line[1:])
    assert found.delta_bytes == Range(sizes[0], sizes[1], sizes[2])
    gaps = sorted(b.time - a.time for a, b in pairwise(line))
    assert found.every_s == Range(gaps[0], gaps[1], gaps[2])
    with open_run(str(tmp_path)) as log:
        (row,) = read_manifest(log.store, line[-1]).trace
    assert found.step_s == Range.exact(row.facts["s"])
    assert "speeds" not in found.unknown
    assert found.full_bytes is not None
    assert found.full_bytes <= stored(tmp_path)


def test_a_last_step_that_is_committed_once_more_is_no_commit_of_its_own(tmp_path: Path) -> None:
    job = new_job()
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), every_s=None) as ckpt:
        ckpt.restore()
        for step in (3, 6, 9):
            job.train(step - 3, step, ckpt)
            ckpt.save(step).wait(60)
        once = facts_of(tmp_path)
        ckpt.save(9, pinned=True).wait(60)
    again = facts_of(tmp_path)
    assert once.every_s is not None
    assert (again.every_s, again.step_s, again.unknown) == (once.every_s, once.step_s, {})
    assert again.speeds[0].how == facts._TIMED
    assert again.delta_bytes is not None
    assert again.delta_bytes.low > 0.5 * again.delta_bytes.high


def test_where_steps_were_not_timed_commits_are_counted(tmp_path: Path) -> None:
    silent_train(tmp_path, [1, 2, 4])
    found = facts_of(tmp_path)
    with open_run(str(tmp_path)) as log:
        a, b, c = log.read().checkpoints
    each = sorted([b.time - a.time, (c.time - b.time) / 2])
    assert found.step_s is not None
    assert (found.step_s.low, found.step_s.high) == (each[0], each[1])
    assert "commits were counted" in found.unknown["speeds"]


def silent_train(url: Path, steps: Sequence[int]) -> None:
    """A job that saves, and never tells of a step."""
    job = new_job()
    with gpumove.Checkpointer(str(url), **job.parts(), every_s=None) as ckpt:
        done = ckpt.restore()
        for step in steps:
            job.train(done, step)
            ckpt.save(step).wait(60)
            done = step


def test_what_a_first_copy_brings_is_all_that_the_newest_checkpoint_needs(tmp_path: Path) -> None:
    train(str(tmp_path), [1])
    assert facts_of(tmp_path).full_bytes == stored(tmp_path)


def test_one_checkpoint_tells_no_delta_and_no_pace(tmp_path: Path) -> None:
    train(str(tmp_path), [1])
    found = facts_of(tmp_path)
    assert (found.delta_bytes, found.every_s, found.step_s) == (None, None, None)
    assert set(found.unknown) == {"delta_bytes", "every_s", "speeds"}
    assert "only one checkpoint" in found.unknown["delta_bytes"]


def test_no_checkpoint(tmp_path: Path) -> None:
    with closing(Store.open(str(tmp_path), Config())) as store:
        Log(store).open(create=True)
    found = facts_of(tmp_path)
    assert (found.full_bytes, found.speeds) == (None, ())
    assert "no checkpoint yet" in found.unknown["full_bytes"]


def test_the_time_that_a_job_was_away_does_not_count(tmp_path: Path) -> None:
    there_s = []
    for steps in ([1, 2], [3, 4]):
        began = time.monotonic()
        train(str(tmp_path), steps)
        there_s.append(time.monotonic() - began)
        time.sleep(1.0)
    found = facts_of(tmp_path)
    assert found.every_s is not None
    assert found.every_s.high < max(there_s)
    assert [speed.ranks for speed in found.speeds] == [1, 1]
    assert all(speed.step_s.high < max(there_s) for speed in found.speeds)


def test_a_start_with_one_commit_tells_no_pace(tmp_path: Path) -> None:
    train(str(tmp_path), [1, 2])
    train(str(tmp_path), [3])
    found = facts_of(tmp_path)
    assert found.delta_bytes is not None
    assert found.every_s is None
    assert "since the job was started last" in found.unknown["every_s"]
    assert len(found.speeds) == 1  # the start before told


def test_what_steps_took_on_other_devices_is_not_what_they_take_now() -> None:
    a100 = Speed(Range.exact(2.0), 8, "NVIDIA A100-SXM4-80GB", "measured")
    assert Facts(ranks=8, device=a100.device, speeds=(a100,)).step_s == Range.exact(2.0)
    assert Facts(ranks=8, device="NVIDIA H200", speeds=(a100,)).step_s is None
    assert Facts(ranks=16, device=a100.device, speeds=(a100,)).step_s is None


def test_a_damaged_record_takes_its_own_number_only(tmp_path: Path) -> None:
    train(str(tmp_path), [1, 2, 3])
    max((tmp_path / "manifests").iterdir()).unlink()
    found = facts_of(tmp_path)
    assert found.full_bytes is None
    assert "is missing" in found.unknown["full_bytes"]
    assert found.every_s is not None


def test_what_a_job_has_told_a_move_is_known(tmp_path: Path) -> None:
    write_sharded(str(tmp_path), 1, [[Shard("w", torch.ones(4), (0,), (4,))]])  # its manifest does not tell
    assert facts_of(tmp_path).save_s is None
    with open_run(str(tmp_path)) as log:
        log.read()
        log.move("begin", move="0123456789abcdef", other="memory://there", facts={"job": {"save_s": 1.5}})
    assert facts_of(tmp_path).save_s == Range.exact(1.5)


def test_what_saves_took_is_in_the_manifests(tmp_path: Path) -> None:
    job = new_job()
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), every_s=None) as ckpt:
        took = []
        for step in range(1, 7):
            job.train(step - 1, step)
            handle = ckpt.save(step)
            handle.wait(60)
            took.append(handle.stats)
    with open_run(str(tmp_path)) as log:
        told = [read_manifest(log.store, c).took for c in log.read().checkpoints]
    for stats, words in zip(took, told):
        assert words is not None
        known = (words.stall_s, words.staged_s, words.uploaded_s, words.ready_s)
        assert known[:3] == tuple(round(s, 6) for s in (stats.stall_s, stats.staged_s or 0.0, stats.uploaded_s or 0.0))
        assert (stats.uploaded_s or 9.0) <= (words.ready_s or 0.0) < (stats.committed_s or 0.0)
    found = facts_of(tmp_path).save_s
    assert found is not None
    assert found.low <= max(s.committed_s or 0.0 for s in took[2:])
    assert found.value == pytest.approx(sorted(s.committed_s or 0.0 for s in took[2:])[1], abs=0.2)


def test_what_the_last_starts_took_to_restore_is_in_the_manifests(tmp_path: Path) -> None:
    train(str(tmp_path), [1, 2])
    assert facts_of(tmp_path).restore_s is None
    there_s = []
    for steps in ([3, 4], [5, 6]):
        began = time.perf_counter()
        train(str(tmp_path), steps)
        there_s.append(time.perf_counter() - began)
    found = facts_of(tmp_path).restore_s
    assert found is not None
    assert 0 < found.low < found.high < max(there_s)
    assert found.value == pytest.approx((found.low + found.high) / 2)


def test_a_lazy_restore_tells_nothing_of_one_that_is_waited_for(tmp_path: Path) -> None:
    job = new_job()
    for steps in ((1, 2), (3, 4)):
        with gpumove.Checkpointer(str(tmp_path), **job.parts(), every_s=None) as ckpt:
            assert ckpt.restore(lazy=True) == steps[0] - 1
            for step in steps:
                job.train(step - 1, step)
                ckpt.save(step).wait(60)
    assert facts_of(tmp_path).restore_s is None


def test_the_wait_for_the_training_thread_is_no_part_of_a_save_as_the_job_leaves() -> None:
    line = [checkpoint(n, 100.0) for n in (1, 2)]
    read = lambda c: manifest(time=99.0, took=Took(ready_s=5.0, sight_s=2.0))  # noqa: E731
    assert facts._saved_s(line, line[0], read) == Range(4.0, 5.0, 6.0)


def test_the_commit_is_reckoned_from_its_first_half_and_the_first_save_of_all_does_not_count() -> None:
    line = [checkpoint(n, 100.0 * n) for n in range(1, 4)]
    records = {1: manifest(time=90.0, took=Took(ready_s=50.0)), 2: manifest(time=199.5, took=Took(ready_s=4.0)),
               3: manifest(time=301.0, took=Took(ready_s=6.0))}  # fmt: skip
    read = lambda c: records.get(c.number)  # noqa: E731
    assert facts._saved_s(line, line[0], read) == Range(4.5, 5.5, 6.0), "a clock that was set back adds nothing"
    assert facts._saved_s(line[:1], line[0], read) == Range(60.0, 70.0, 80.0)
    assert facts._saved_s(line[1:2], line[0], lambda c: None) is None
    assert facts._saved_s(line[1:2], line[0], lambda c: manifest(took=Took(stall_s=1.0))) is None


def checkpoint(number: int, at: float) -> Checkpoint:
    return Checkpoint(
        format=FORMAT, number=number, epoch=1, writer="w", time=at, step=number, attempt=f"{number}", manifest="m",
        manifest_bytes=1, world_size=1, state_bytes=1, new_bytes=1,
    )  # fmt: skip


def manifest(**fields: object) -> Manifest:
    found = Manifest(
        format=FORMAT, run="r", step=1, epoch=1, attempt="a", world_size=1, time=0.0, state_bytes=1, new_bytes=1,
        plan="p", parts=(),
    )  # fmt: skip
    return msgspec.structs.replace(found, **fields)


def test_step_times_of_a_trace_are_measured_ones() -> None:
    rows = [(1, 0.5, {"s": 0.2}), (2, 0.4, {"s": 0.3}), (3, None, {"lr": 0.1}), (4, 0.3), (5, 0.2, {"s": 0.7})]
    assert facts._timed(manifest(trace=tuple(TraceRow(*row) for row in rows))) == Range(0.2, 0.3, 0.7)
    assert facts._timed(manifest(trace=(TraceRow(1, 0.5), TraceRow(2, 0.4)))) is None
    assert facts._timed(None) is None


def test_the_peak_of_the_newest_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [{"device_bytes": 7, "host_bytes": 9}, None, {}, {"device_bytes": 0}, {"device_bytes": "7"}, ...]
    known = []
    for step, peak in enumerate(peaks, 1):
        told = {} if peak is ... else {"peak": peak}
        monkeypatch.setattr(Environment, "now", lambda self, told=told, **given: told)
        train(str(tmp_path / "run"), [step])
        known.append(facts_of(tmp_path / "run").peak_bytes)
    assert known == [7, None, None, None, None, None]


@pytest.mark.parametrize(
    ("fingerprint", "device"),
    [
        ({"devices": ["NVIDIA H200", "NVIDIA H200"]}, "NVIDIA H200"),
        ({"devices": [{"model": "NVIDIA H200", "memory": 1}]}, "NVIDIA H200"),
        ({"devices": []}, None), ({}, None), ({"devices": [7]}, None), ({"devices": 7}, None),
    ],
)  # fmt: skip
def test_the_device_of_a_manifest(fingerprint: dict[str, object], device: str | None) -> None:
    assert facts.device_of(fingerprint) == device
