"""Cases that an attack on the core once won: each is a sequence of ordinary calls with a wrong end."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gpumove
from gpumove import retention, takeover
from gpumove.cadence import Cadence
from gpumove.config import Config
from gpumove.errors import ConfigError, FencedError
from gpumove.state.staging import Stager
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.jobs import new_job


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def test_an_operation_in_flight_while_the_copy_ends_is_noticed(url: str) -> None:
    """torch raises a version when the operation ends, which may be after copy, upload and all."""
    refused = torn = 0
    net = nn.Linear(4000, 4000, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with gpumove.Checkpointer(url, model=net, optimizer=optimizer, rng=False, on_save_error="warn") as ckpt:
        ckpt.restore()
        for step in range(1, 5):
            with torch.no_grad():
                net.weight.fill_(step)
            handle = ckpt.save(step)
            with torch.no_grad():
                net.weight.pow_(1.0001).erfinv_().nan_to_num_(0.5)  # slow, in place, and not an optimizer's
            handle.join(60)
            if handle.error is not None:
                refused += 1
                continue
            other = nn.Linear(4000, 4000, bias=False)
            gpumove.load(url, step, model=other)
            torn += not torch.equal(other.weight, torch.full_like(other.weight, step))
    assert torn == 0
    assert refused >= 1  # the first; from then on the tensor is copied at once


def test_memory_prepared_for_a_larger_layout_does_not_strand_the_old_views() -> None:
    stager = Stager(overlap=True)
    small, large = torch.full((1000,), 7.0), torch.ones(5_000_000)
    stager.stage([small], [True]).wait()
    stager.prepare([large])
    snapshot = stager.stage([small], [True])
    snapshot.wait()
    assert torch.equal(torch.frombuffer(bytearray(snapshot.view(0)), dtype=torch.float32), small)
    stager.close()


def test_a_copy_that_could_not_begin_holds_up_nobody(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(300, 300)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(1, 300)).sum().backward()
    with gpumove.Checkpointer(url, model=net, optimizer=optimizer) as ckpt:
        ckpt.restore()
        start = threading.Thread.start

        def refuse(self: threading.Thread) -> None:
            if self.name.startswith("gpumove-stage"):
                raise RuntimeError("can't start new thread")
            start(self)

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                ckpt.save(2)
        optimizer.step()
        assert ckpt.save(3).wait(30).step == 3


def test_a_job_that_forgets_restore_does_not_disturb_the_owner(url: str) -> None:
    owner = new_job()
    with gpumove.Checkpointer(url, **owner.parts()) as ckpt:
        ckpt.restore()
        ckpt.save(0).wait(30)
        with gpumove.Checkpointer(url, **new_job().parts()) as stray:
            for step in (1, 2):
                with pytest.raises(ConfigError, match=r"call restore\(\)"):
                    stray.step(step)
        owner.train(0, 2, ckpt)
        assert ckpt.save(2).wait(30).step == 2


def test_a_fenced_job_never_commits_again_and_sends_nothing_more(url: str) -> None:
    with gpumove.Checkpointer(url, **new_job().parts()) as old, gpumove.Checkpointer(url, **new_job().parts()) as new:
        old.restore()
        new.restore()
        with pytest.raises(FencedError):
            old.save(1).wait(30)
        before = list(Path(url).rglob("*.safetensors"))
        for _ in range(2):
            with pytest.raises(FencedError):
                old.save(1).wait(30)
        assert list(Path(url).rglob("*.safetensors")) == before
        assert new.save(1).wait(30).epoch == 2


def test_going_back_in_the_same_process_while_a_save_runs(url: str) -> None:
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), keep_last=1) as ckpt:
        ckpt.restore()
        ckpt.save(0).wait(30)
        job.train(0, 2, ckpt)
        handle = ckpt.save(2)
        step = ckpt.restore()  # settles the running save first: it is in the log, or it never will be
        assert step == (2 if handle.committed else 0)
        ckpt.save(step + 1).wait(30)
    with gpumove.Checkpointer(url, **new_job().parts()) as ckpt:
        assert ckpt.restore() == step + 1


def test_a_collection_while_an_older_step_is_read_does_not_take_it_away(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts()) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            ckpt.save(step).wait(30)
    genuine = takeover.fetch

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        log = Log(Store.open(url, Config()))
        log.read()
        collect(log, Retention(keep_last=1))
        return genuine(*args, **kwargs)

    job = new_job()
    with gpumove.Checkpointer(url, **job.parts()) as ckpt:
        with monkeypatch.context() as patched:
            patched.setattr(takeover, "fetch", meanwhile)
            assert ckpt.restore(step=1) == 1
        ckpt.save(2).wait(30)
    assert gpumove.verify(url, deep=True).sound


def test_extra_state_that_is_a_tensor_goes_through_its_own_methods(url: str) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.ones(3)), 0

        def get_extra_state(self) -> torch.Tensor:
            return torch.full((40,), float(self.seen))

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.seen = int(state[0])

    net = Counts()
    with gpumove.Checkpointer(url, model=net) as ckpt:
        ckpt.restore()
        for net.seen in (1, 2, 3):
            ckpt.save(net.seen).wait(30)
    other = Counts()
    gpumove.load(url, model=other)
    assert other.seen == 3


def test_a_parameter_whose_view_changed_in_place_is_saved_as_it_is_now(url: str) -> None:
    net = nn.Linear(4, 6, bias=False)
    with gpumove.Checkpointer(url, model=net) as ckpt:
        ckpt.restore()
        ckpt.save(1).wait(30)
        net.weight.data = net.weight.data.t()
        ckpt.save(2).wait(30)
    other = nn.Linear(6, 4, bias=False)
    gpumove.load(url, 2, model=other)
    assert torch.equal(other.weight, net.weight)


def test_a_fast_start_does_not_postpone_the_first_save_for_hours() -> None:
    cadence, now, step, saves = Cadence(Config(every_s=600.0), 0.0), 0.0, 0, []
    meeting = cadence.next_meeting(step, now)
    while now < 3 * 3600:
        step += 1
        now += 0.001 if step < 3 else 2.0  # launches only, then real steps
        if step >= meeting:
            if cadence.due(step, now):
                saves.append(now)
                cadence.took(step, now)
            meeting = cadence.next_meeting(step, now)
    assert saves[0] < 700
    assert max(b - a for a, b in itertools.pairwise(saves)) < 660


def test_steps_that_go_back_or_are_no_ints_are_refused(url: str) -> None:
    with gpumove.Checkpointer(url, **new_job().parts()) as ckpt:
        ckpt.restore()
        ckpt.step(5)
        for bad, words in ((4, "only grow"), (np.int64(6), "is an int"), (6.0, "is an int"), (1 << 60, "below")):
            with pytest.raises(ConfigError, match=words):
                ckpt.step(bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="one number"):
            ckpt.step(6, loss=torch.ones(3))


def test_a_rollback_in_process_begins_its_cadence_anew(url: str) -> None:
    with gpumove.Checkpointer(url, **new_job().parts(), every_steps=10) as ckpt:
        ckpt.restore()
        seen = []
        for step in range(1, 41):
            ckpt.step(step)
            if ckpt.last:
                ckpt.last.join(30)
        assert ckpt.restore(step=10) == 10
        for step in range(11, 31):
            ckpt.step(step)
            assert ckpt.last is not None
            ckpt.last.join(30)
            seen.append(ckpt.last.step)
    assert {20, 30} <= set(seen)


def test_a_failed_save_does_not_cost_the_next_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with gpumove.Checkpointer(url, **new_job().parts(), every_steps=10) as ckpt:
        ckpt.restore()
        with monkeypatch.context() as patched:
            patched.setattr("gpumove.runner.commit", lambda *_, **__: (_ for _ in ()).throw(OSError("injected")))
            ckpt.step(10)
            assert ckpt.last is not None
            ckpt.last.join(30)
        with pytest.raises(OSError, match="injected"):
            ckpt.step(20)
        ckpt.step(21)
        assert ckpt.last.wait(30).step == 21


def test_a_script_that_ends_without_close_still_commits(url: str) -> None:
    script = (
        "import sys, torch, gpumove\n"
        "net = torch.nn.Linear(2000, 2000)\n"
        "ckpt = gpumove.Checkpointer(sys.argv[1], model=net)\n"
        "ckpt.restore()\n"
        "ckpt.save(1)\n"
    )
    subprocess.run([sys.executable, "-c", script, url], check=True, timeout=100)
    assert [c.step for c in gpumove.checkpoints(url)] == [1]


def test_retention_does_not_hold_up_training(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, begun, go_on, ended = retention.collect, threading.Event(), threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        go_on.wait(20)
        ended.set()
        return genuine(*args, **kwargs)

    monkeypatch.setattr(retention, "collect", slow)
    net = nn.Linear(10, 10)
    with gpumove.Checkpointer(url, model=net, keep_last=1) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            ckpt.save(step).wait(30)
        net.register_buffer("more", torch.zeros(10))  # another layout: it is planned and prepared anew
        assert begun.wait(30)
        ckpt.step(3)
        saved = ckpt.save(4)
        assert not ended.is_set()
        go_on.set()
        assert saved.wait(30).step == 4


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.ParameterList([nn.Parameter(torch.ones(1).expand(5))]), "expanded"),
        (nn.ParameterList([nn.Parameter(torch.ones(5, device="meta"))]), "meta device"),
    ],
)
def test_tensors_that_cannot_come_back_are_refused_at_the_save(url: str, model: nn.Module, words: str) -> None:
    with gpumove.Checkpointer(url, model=model) as ckpt:
        ckpt.restore()
        with pytest.raises(ConfigError, match=words):
            ckpt.save(1)


def test_odd_values_are_refused_and_not_bent(url: str) -> None:
    for value in (np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]), torch.ones(3).to_sparse()):
        refused = pytest.raises(ConfigError, match=r"objects\.o\.v")
        with gpumove.Checkpointer(url, objects={"o": {"v": value}}) as ckpt, refused:
            ckpt.save(1)
    with pytest.raises(ConfigError, match=r"no torch\.optim\.Optimizer"):
        gpumove.Checkpointer(url, optimizer=object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="GPUMOVE_EVERY_STEP is no setting"):
        Config.from_env({"GPUMOVE_EVERY_STEP": "5"})
    # Whatever is wrong is said at once.
    with pytest.raises(ConfigError, match=r"EVERY_S='x' is not .*EVERY_STEP is no setting.*every_steps must be"):
        Config.from_env({"GPUMOVE_EVERY_S": "x", "GPUMOVE_EVERY_STEP": "5", "GPUMOVE_EVERY_STEPS": "-3"})
    for wrong in ({"every_steps": 2.0}, {"every_s": float("inf")}):
        with pytest.raises(ConfigError):
            Config(**wrong)  # type: ignore[arg-type]
