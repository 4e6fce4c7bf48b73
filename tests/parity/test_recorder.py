"""What is recorded of every step, and that it is what really happened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import gpumove
from gpumove.errors import ConfigError
from gpumove.format.manifest import TraceRow
from gpumove.inspection.run import open_run
from gpumove.parity import recorder
from gpumove.parity.recorder import Recorder, told
from gpumove.parity.trace import number
from gpumove.state.capture import Job
from gpumove.store.records import read_manifest
from tests.jobs import new_job


def record(rows: list[tuple[int, Any, Any]], *, certify_steps: int = 20, **parts: Any) -> list[TraceRow]:
    """Steps, losses and gradient norms, as they come back from a manifest."""
    mine = Recorder(Job(**parts), rng=False, certify_steps=certify_steps)
    for step, loss, norm in rows:
        mine.record(step, loss, None, norm)
    return back(told(mine.since(-1)))


def back(rows: list[TraceRow]) -> list[TraceRow]:
    return msgspec.json.decode(msgspec.json.encode(rows), type=list[TraceRow])


def trace(url: str) -> dict[int, TraceRow]:
    """Of all checkpoints, by step."""
    with open_run(url) as log:
        return {row.step: row for c in log.read().checkpoints for row in read_manifest(log.store, c).trace}


def test_numbers_come_back_with_every_bit_and_those_that_json_lacks_come_back_too() -> None:
    values = [0.1, torch.tensor(1 / 3), torch.tensor(1 / 3, dtype=torch.bfloat16), np.float32(0.7), 5e-324, -0.0, 3]
    found = record([(n, value, value) for n, value in enumerate(values)])
    for row, value in zip(found, values):
        for name in ("loss", "grad_norm"):
            assert repr(number(row, name)) == repr(float(value))
    bad = record([(1, math.nan, math.inf), (2, torch.tensor(-math.inf), torch.tensor(math.nan)), (3, None, None)])
    assert [row.loss for row in bad] == [None, None, None]
    assert [row.facts for row in bad] == [{"loss": "nan", "grad_norm": "inf"}, {"loss": "-inf", "grad_norm": "nan"}, {}]
    assert math.isnan(number(bad[0], "loss") or 0.0)
    assert number(bad[1], "loss") == -math.inf
    assert number(bad[2], "loss") is None


def test_rows_of_two_columns_are_still_read() -> None:
    rows = msgspec.json.decode(b'[[690,3.21],[691,null],[692,1.5,{"s":0.25}],[693,1.0,{},"more"]]', type=list[TraceRow])
    assert rows == [TraceRow(690, 3.21), TraceRow(691), TraceRow(692, 1.5, {"s": 0.25}), TraceRow(693, 1.0)]


def test_what_is_recorded_is_the_value_of_that_moment() -> None:
    loss, mine = torch.tensor(1.0), Recorder(Job(), rng=False, certify_steps=5)
    ids = np.arange(4)
    mine.record(1, loss, None, loss, ids)
    loss += 1.0  # as a captured graph does
    ids += 1
    mine.record(2, loss, None, loss, ids)
    first, second = told(mine.since(0))
    assert (first.loss, second.loss) == (1.0, 2.0)
    assert (first.facts["grad_norm"], second.facts["grad_norm"]) == (1.0, 2.0)
    assert first.facts["rank_samples"] != second.facts["rank_samples"]


def test_a_loss_that_is_no_number_is_refused_at_once() -> None:
    for loss, norm in ((torch.zeros(2), None), (0.0, torch.zeros(2, 1))):
        with pytest.raises(ConfigError, match="recorded as one number"):
            record([(1, loss, norm)])


def test_only_the_steps_after_a_cut_are_recorded_closely_and_they_are_never_lost(monkeypatch: Any) -> None:
    monkeypatch.setattr(recorder, "_MOST", 50)
    model = torch.nn.Linear(1, 1)
    mine = Recorder(Job(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5)), rng=True, certify_steps=3)
    for step in range(1, 101):
        if step == 11:
            mine.cut()
        mine.record(step, 1.0, 0.25)
    rows = told(mine.since(10))
    assert [row.step for row in rows] == [11, 12, 13, *range(51, 101)]
    assert (
        {row.step for row in rows if "lr" in row.facts}
        == {row.step for row in rows if "rng" in row.facts}
        == {11, 12, 13}
    )
    assert all(row.facts["s"] == 0.25 for row in rows)


def test_samples_are_those_of_all_ranks_at_any_number_of_ranks_with_accumulation() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(40))

    def digests(batch: int, ranks: int, micro: int) -> list[Any]:
        loader = gpumove.ElasticLoader(dataset, batch, shuffle=True, seed=3, rank=0, world_size=ranks)
        mine = Recorder(Job(loader=loader), rng=False, certify_steps=20)
        batches = (b for _ in iter(int, 1) for b in loader)
        for step in range(1, 8):
            for _ in range(micro):
                next(batches)
            mine.record(step, 1.0, None)
        return [row.facts["samples"] for row in told(mine.since(0))]

    assert digests(8, 1, 1) == digests(4, 2, 1) == digests(2, 2, 2) == digests(1, 4, 2)
    assert len(set(digests(8, 1, 1))) == 7
    assert digests(8, 1, 1) != digests(4, 1, 1)


def test_ids_that_are_given_count_whatever_they_come_in() -> None:
    kinds = ([3, 1, 2], (3, 1, 2), np.array([3, 1, 2], dtype=np.int32), torch.tensor([3, 1, 2]))
    found = set()
    for ids in kinds:
        mine = Recorder(Job(), rng=False, certify_steps=1)
        mine.record(1, 1.0, None, None, ids)
        found.add(told(mine.since(0))[0].facts["rank_samples"])
    assert len(found) == 1
    mine = Recorder(Job(), rng=False, certify_steps=1)
    mine.record(1, 1.0, None, None, ["a", "b"])
    assert told(mine.since(0)) == [TraceRow(1, 1.0)]  # no ints: not known, and no harm


def test_a_run_tells_of_every_step_and_of_what_its_trace_goes_on_from(tmp_path: Path) -> None:
    url = str(tmp_path)
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), every_steps=None, every_s=None, certify_steps=2) as ckpt:
        ckpt.restore()
        job.train(0, 4, ckpt)
        ckpt.save(4).wait()
        job.train(4, 9, ckpt)
        ckpt.save(9).wait()
    again = new_job()
    with gpumove.Checkpointer(url, **again.parts(), every_s=None, certify_steps=2) as ckpt:
        assert ckpt.restore() == 9
        again.train(9, 12, ckpt)
        ckpt.save(12).wait()
    rows = trace(url)
    assert sorted(rows) == list(range(1, 13))
    assert {s: row.loss for s, row in rows.items()} == job.losses | again.losses
    assert {s for s, row in rows.items() if "rng" in row.facts} == {1, 2, 5, 6, 10, 11}
    assert {s for s, row in rows.items() if "s" in row.facts} == set(range(2, 10)) | {11, 12}
    with open_run(url) as log:
        first, second, third = log.read().checkpoints
        after = [read_manifest(log.store, c).trace_after for c in (first, second, third)]
    assert after == ["", first.attempt, second.attempt]


def test_a_run_without_losses_has_step_times_and_none_is_recorded_of_what_was_busy(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    with gpumove.Checkpointer(str(tmp_path), model=layer, every_s=None) as ckpt:
        ckpt.restore()
        for step in range(1, 5):
            if step == 3:
                with ckpt.busy():
                    pass
            ckpt.step(step)
        ckpt.save(4).wait()
    rows = trace(str(tmp_path))
    assert [number(rows[step], "s") is not None for step in range(1, 5)] == [False, True, False, True]
    assert all(number(row, "loss") is None for row in rows.values())


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_norm_that_others_have_a_part_in_is_refused_since_reading_it_is_a_collective(mesh: Any) -> None:
    whole = distribute_tensor(torch.tensor([2.0]), mesh, [Replicate()])
    assert number(record([(1, whole, whole)])[0], "grad_norm") == 2.0
    with pytest.raises(ConfigError, match="full_tensor"):
        record([(1, 1.0, distribute_tensor(torch.tensor([2.0]), mesh, [Shard(0)]))])
