"""What once went wrong with differences, or nearly did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gpumove
from gpumove.errors import StoreError
from gpumove.store.gc import Retention, collect
from tests.save.jobs import WIDTH, Plain, adamw, same
from tests.save.test_deltas import SETTINGS, check, look, run, sent

TINY = {**SETTINGS, "max_restore_amplification": 2.0}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def test_an_attempt_that_never_committed_is_no_predecessor_in_a_new_epoch(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its objects are dead, so gc takes them: a reference to them would be a checkpoint that nobody can read."""
    job = Plain()
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}) as ckpt:
        ckpt.restore()
        with monkeypatch.context() as broken:
            broken.setattr("gpumove.runner.commit", lambda *_, **__: (_ for _ in ()).throw(StoreError("no commit")))
            with pytest.raises(StoreError):
                ckpt.save(1).wait(60)
        assert ckpt.restore() == 0
        collect(ckpt._log, Retention(1, None))
        ckpt.save(1).wait(60)
        truth = {1: job.state()}
    assert gpumove.verify(url, deep=True).sound
    check(url, Plain(seed=9), truth)


@pytest.mark.parametrize("value", [np.float32(1e-3), np.float64(1e-3), np.array(1e-3), torch.tensor(1e-3)])
def test_rates_of_any_type(url: str, value: Any) -> None:
    job = Plain()
    truth = {}
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}) as ckpt:
        ckpt.restore()
        for step in range(1, 5):
            job.step()
            job.optimizer.param_groups[0]["lr"] = value
            truth[step] = job.state()
            ckpt.save(step).wait(60)
    check(url, Plain(seed=9), truth)
    assert sent(url)[3] < 0.36


@pytest.mark.parametrize(
    "group", [{"lr": None}, {"betas": None}, {"betas": [0.9]}, {"eps": float("nan")}, {"eps": "x"}]
)
def test_hyper_parameters_that_are_no_numbers_cost_only_bytes(url: str, group: dict[str, Any]) -> None:
    job = Plain()
    truth = {}
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}) as ckpt:
        ckpt.restore()
        for step in range(1, 4):
            genuine = dict(job.optimizer.param_groups[0])
            job.step()
            job.optimizer.param_groups[0].update(group)
            truth[step] = job.state()
            ckpt.save(step).wait(60)
            job.optimizer.param_groups[0].update(genuine)
    check(url, Plain(seed=9), truth)


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -5.0, 1e30])
def test_step_counters_that_are_no_counters(url: str, step: float) -> None:
    job = Plain()
    truth = {}
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}) as ckpt:
        ckpt.restore()
        for number in range(1, 4):
            job.step()
            for entries in job.optimizer.state.values():
                entries["step"].fill_(step)
            truth[number] = job.state()
            ckpt.save(number).wait(60)
            for entries in job.optimizer.state.values():
                entries["step"].fill_(number)
    check(url, Plain(seed=9), truth)


def test_a_predecessor_dir_that_is_not_there_costs_only_the_differences(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth = run(url, Plain(), 3, predecessor_bytes=0, predecessor_dir=str(tmp_path / "absent"))
    assert [look(url, step).chain for step in truth] == [0, 0, 0]
    assert caplog.text.count("predecessor_dir cannot be used") == 1
    check(url, Plain(seed=9), truth)


def test_a_restore_succeeds_even_if_nothing_can_be_saved_after_it(url: str) -> None:
    class Odd:
        def __init__(self) -> None:
            self.value: Any = 1

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = object()

    job = Plain()
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}, objects={"odd": Odd()}) as ckpt:
        ckpt.restore()
        job.step()
        ckpt.save(1).wait(60)
        truth = job.state()
    job = Plain(seed=9)
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}, objects={"odd": Odd()}) as ckpt:
        assert ckpt.restore() == 1
    assert same(job.state(), truth)


def test_an_unchanged_parameter_does_not_keep_its_moments_from_differences(url: str) -> None:
    job = Plain()
    truth = {}
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts(), "max_chain": 3}) as ckpt:
        ckpt.restore()
        for step in range(1, 13):
            job.step()
            if step == 4:
                job.scheduler = torch.optim.lr_scheduler.LambdaLR(job.optimizer, lambda _: 0.0)
                job.optimizer.param_groups[0]["weight_decay"] = 0.0
            truth[step] = job.state()
            ckpt.save(step).wait(60)
    check(url, Plain(seed=9), truth)
    assert sorted(sent(url)[8:])[1] < 0.4, "moments go on being predicted from each other"


def test_one_frozen_parameter_does_not_switch_prediction_off(url: str) -> None:
    job = Plain()
    truth = {}
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}) as ckpt:
        ckpt.restore()
        for step in range(1, 9):
            job.model[0].weight.requires_grad_(step < 3 or step > 6)
            job.step()
            truth[step] = job.state()
            ckpt.save(step).wait(60)
    check(url, Plain(seed=9), truth)
    assert max(sent(url)[3:6]) < 0.36 * 0.6, "half of the state is clean, the rest is predicted"
    assert max(sent(url)[6:]) < 0.36, "and each parameter counts its own steps"


def test_tied_low_precision_weights_are_stored_once(url: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(1500, WIDTH)
            self.head = nn.Linear(WIDTH, 1500, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    low, high = Tied().bfloat16(), Tied()
    high.load_state_dict(low.state_dict())
    optimizer = adamw(high.parameters())
    settings = {**SETTINGS, "chunk_bytes": 1 << 18, "pack_bytes": 1 << 20, "overlap": False}
    with gpumove.Checkpointer(
        url, model={"live": low, "master": high}, optimizer=optimizer, rng=False, **settings
    ) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            for p in high.parameters():
                p.grad = torch.randn_like(p).bfloat16().float()
            optimizer.step()
            with torch.no_grad():
                low.embed.weight.copy_(high.embed.weight)
            ckpt.save(step).wait(60)
    groups = {g.name: g for g in look(url).groups}
    assert groups["live.embed" if "live.embed" in groups else "model.live"].stored_bytes < 200
    fresh = {"live": Tied().bfloat16(), "master": Tied()}
    gpumove.load(url, model=fresh)
    assert torch.equal(fresh["live"].head.weight, low.head.weight)
    assert torch.equal(fresh["master"].embed.weight, high.embed.weight)


def test_the_bound_on_a_restore_is_kept_and_not_only_aimed_at(url: str) -> None:
    job = Plain()
    with gpumove.Checkpointer(url, **{**TINY, **job.parts()}) as ckpt:
        ckpt.restore()
        for step in range(1, 13):
            for _ in range(1 if step % 5 else 7):  # now and then a difference is far larger than those before
                job.step()
            ckpt.save(step).wait(60)
    for step in range(1, 13):
        found = look(url, step)
        assert found.restore_bytes <= 2.0 * found.state_bytes


def test_memory_that_is_kept_is_given_back_when_it_does_not_fit_any_more(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Plain()
    grown: dict[str, Any] = {"values": torch.zeros(1)}
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}, objects={"grown": grown}) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            job.step()
            grown["values"] = torch.zeros(step * 10)  # grows a little: nothing is decided anew
            ckpt.save(step).wait(60)
            assert ckpt._stager._kept is not None
        both = ckpt._stager.nbytes
        monkeypatch.setattr("gpumove.runner.keeps_in_memory", lambda *_, **__: False)
        grown["values"] = torch.zeros(1_000_000)
        ckpt.save(4).wait(60)
        assert ckpt._stager._kept is None
        ckpt.save(5).wait(60)
        assert ckpt._stager.nbytes < both + 6_000_000 - both // 2 + 100_000


def test_chains_over_a_store_with_latency_are_read_side_by_side(url: str) -> None:
    """A group's ranges are asked for at once: not one after the other for every link of the chain."""
    import threading

    from gpumove.store.objects import Store

    truth = run(url, Plain(), 8, max_restore_amplification=20.0)
    at_once, most = 0, 0
    lock, enough = threading.Lock(), threading.Event()
    genuine = Store.get_ranges

    def slow(self: Store, *arguments: Any, **more: Any) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
            if at_once == 4:
                enough.set()
        enough.wait(5)
        try:
            return genuine(self, *arguments, **more)
        finally:
            with lock:
                at_once -= 1

    job = Plain(seed=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "get_ranges", slow)
        gpumove.load(url, 8, model=job.model, optimizer=job.optimizer)
    assert most >= 4
    assert same(job.state(), truth[8])
