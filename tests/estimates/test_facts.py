"""What runs say of themselves: real ones, short ones, ones that were started twice, damaged ones."""

from __future__ import annotations

import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from gpumove.config import Config
from gpumove.estimates import facts
from gpumove.estimates.facts import Facts, Speed, read_facts
from gpumove.estimates.interval import Range
from gpumove.format.manifest import FORMAT, Manifest
from gpumove.inspection.run import open_run
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import reachable
from tests.runs import train


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
    sizes = sorted(c.new_bytes + records for c in line[1:])
    assert found.delta_bytes == Range(sizes[0], sizes[1], sizes[2])
    gaps = sorted(b.time - a.time for a, b in pairwise(line))
    assert found.every_s == Range(gaps[0], gaps[1], gaps[2])
    assert found.step_s == found.every_s  # a commit for each step
    assert "commits were counted" in found.unknown["speeds"]
    assert found.full_bytes is not None
    assert found.full_bytes <= stored(tmp_path)


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
    train(str(tmp_path), [1, 2])
    time.sleep(1.0)
    train(str(tmp_path), [3, 4])
    found = facts_of(tmp_path)
    assert found.every_s is not None
    assert found.every_s.high < 0.9
    assert [speed.ranks for speed in found.speeds] == [1, 1]
    assert all(speed.step_s.high < 0.9 for speed in found.speeds)


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
    train(str(tmp_path), [1, 2])
    assert facts_of(tmp_path).save_s is None
    with open_run(str(tmp_path)) as log:
        log.read()
        log.move("begin", move="0123456789abcdef", other="memory://there", facts={"job": {"save_s": 1.5}})
    assert facts_of(tmp_path).save_s == Range.exact(1.5)


def manifest(**fields: object) -> Manifest:
    found = Manifest(
        format=FORMAT, run="r", step=1, epoch=1, attempt="a", world_size=1, time=0.0, state_bytes=1, new_bytes=1,
        plan="p", parts=(),
    )  # fmt: skip
    return msgspec.structs.replace(found, **fields)


def test_step_times_of_a_trace_are_measured_ones() -> None:
    rows = [(1, 0.5, {"s": 0.2}), (2, 0.4, {"s": 0.3}), (3, None, {"lr": 0.1}), (4, 0.3), (5, 0.2, {"s": 0.7})]
    assert facts._timed(manifest(trace=tuple(rows))) == Range(0.2, 0.3, 0.7)
    assert facts._timed(manifest(trace=((1, 0.5), (2, 0.4)))) is None
    assert facts._timed(None) is None


@pytest.mark.parametrize(
    ("fingerprint", "device"),
    [
        ({"devices": ["NVIDIA H200", "NVIDIA H200"]}, "NVIDIA H200"),
        ({"devices": [{"model": "NVIDIA H200", "memory": 1}]}, "NVIDIA H200"),
        ({"devices": []}, None), ({}, None), ({"devices": [7]}, None),
    ],
)  # fmt: skip
def test_the_device_of_a_manifest(fingerprint: dict[str, object], device: str | None) -> None:
    assert facts._device_of(manifest(fingerprint=fingerprint)) == device
