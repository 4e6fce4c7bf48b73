"""The object in the loop, in one process: exact continuation, cadence, errors, and what bad input gets."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpumove
from gpumove.errors import ConfigError, FencedError, IntegrityError, LayoutError, StoreError
from gpumove.store.objects import Store
from tests.jobs import new_job


def run(url: str, *, until: int, start_over: bool = False, **settings: Any) -> tuple[int, Any]:
    """Train a fresh job from its newest checkpoint to a step; the step it began at, and the job."""
    job = new_job(optimizer=settings.pop("optimizer", "adamw"))
    with gpumove.Checkpointer(url, **job.parts(), **settings) as ckpt:
        start = ckpt.restore()
        job.train(start, until, ckpt)
        if ckpt.last is not None and not ckpt.last.finished:
            ckpt.last.wait(60)
    return start, job


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused", "adamw_loop", "sgd", "adafactor", "rmsprop"])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_stopped_run_goes_on_bit_for_bit(url: str, optimizer: str, *, overlap: bool) -> None:
    whole = new_job(optimizer=optimizer)
    whole.train(0, 40)
    job = new_job(optimizer=optimizer)
    with gpumove.Checkpointer(url, **job.parts(), overlap=overlap) as ckpt:
        job.train(ckpt.restore(), 17, ckpt)
        ckpt.save(17)
        job.train(17, 21, ckpt)  # goes on while the save runs; these steps are lost
        assert ckpt.last is not None
        ckpt.last.wait(60)
    torch.manual_seed(999)  # nothing of this process's own randomness may matter
    start, again = run(url, until=40, optimizer=optimizer)
    assert start == 17
    assert {s: whole.losses[s] for s in again.losses} == again.losses
    assert again.fingerprint() == whole.fingerprint()


def test_saving_changes_nothing_in_training(url: str) -> None:
    plain = new_job()
    plain.train(0, 30)
    _, saved = run(url, until=30, every_steps=1)
    assert saved.losses == plain.losses
    assert saved.fingerprint() == plain.fingerprint()


def test_a_save_before_the_first_step_does_not_step_the_optimizer(url: str) -> None:
    plain = new_job()
    plain.train(0, 5)
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts()) as ckpt:
        ckpt.restore()
        ckpt.save(0).wait(60)
        assert not job.optimizer.state
        job.train(0, 5, ckpt)
    assert job.losses == plain.losses
    _, again = run(url, until=5)
    assert again.fingerprint() == plain.fingerprint()


def test_restoring_an_older_step_and_going_on_from_there(url: str) -> None:
    whole = new_job()
    whole.train(0, 12)
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts()) as ckpt:
        start = ckpt.restore()
        for stop in (4, 8):
            job.train(start, stop, ckpt)
            ckpt.save(stop).wait(60)
            start = stop
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts()) as ckpt:
        assert ckpt.restore(step=4) == 4
        job.train(4, 12, ckpt)
    assert job.fingerprint() == whole.fingerprint()
    with gpumove.Checkpointer(url, **new_job().parts()) as ckpt, pytest.raises(ConfigError, match="of step 5"):
        ckpt.restore(step=5)


def test_going_back_survives_a_crash_before_the_next_commit(url: str) -> None:
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts()) as ckpt:
        start = ckpt.restore()
        for stop in (2, 4, 6):
            job.train(start, stop, ckpt)
            ckpt.save(stop).wait(60)
            start = stop
    with gpumove.Checkpointer(url, **new_job().parts()) as ckpt:
        assert ckpt.restore(step=2) == 2  # and then the process dies
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts()) as ckpt:
        assert ckpt.restore() == 2
        job.train(2, 3, ckpt)
        ckpt.save(3).wait(60)
    with gpumove.Checkpointer(url, **new_job().parts()) as ckpt:
        assert ckpt.restore() == 3


def test_a_submodule_may_be_called_extra_beside_extra_state(url: str) -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.extra, self.seen = nn.BatchNorm1d(3), torch.zeros(20)

        def get_extra_state(self) -> object:
            return {"seen": self.seen, "n": 3}

        def set_extra_state(self, state: Any) -> None:
            self.seen = state["seen"]

    net = Extra()
    net.extra(torch.randn(5, 3))
    net.seen = torch.arange(20.0)
    with gpumove.Checkpointer(url, model=net) as ckpt:
        ckpt.restore()
        ckpt.save(1).wait(60)
    other = Extra()
    with gpumove.Checkpointer(url, model=other) as ckpt:
        assert ckpt.restore() == 1
    assert torch.equal(other.extra.running_mean, net.extra.running_mean)
    assert torch.equal(other.seen, net.seen)


def test_tensors_of_every_kind_and_values_come_back_exactly(url: str) -> None:
    g = torch.Generator().manual_seed(3)

    class Odd(nn.Module):
        def __init__(self, fill: bool) -> None:
            super().__init__()
            for name in ("float64", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "complex64", "complex128"):
                dtype = getattr(torch, name)
                bits = torch.randint(0, 2 if name == "bool" else 256, (5, 3, 16), dtype=torch.uint8, generator=g)
                self.register_buffer(f"t_{name}", bits.view(dtype) if fill else torch.zeros_like(bits.view(dtype)))
            for name in ("float8_e4m3fn", "float8_e5m2"):
                bits = torch.randint(0, 256, (7, 9), dtype=torch.uint8, generator=g)
                self.register_buffer(f"t_{name}", (bits if fill else torch.zeros_like(bits)).view(getattr(torch, name)))
            value = [float("nan"), -0.0, float("inf"), 1e-45] if fill else [0.0] * 4
            self.special = nn.Parameter(torch.tensor(value))
            self.scalar = nn.Parameter(torch.tensor(2.5 if fill else 0.0))
            self.empty = nn.Parameter(torch.empty(0, 4))
            self.transposed = nn.Parameter(torch.arange(5000.0).view(50, 100).t() * fill)
            self.view = nn.Parameter(torch.arange(4000.0)[1000:1010] * fill)

    values = {"best": 0.25, "nested": {"a": (1, 2, {3}), "b": [None, True, 2**70, b"x", float("-inf")]}}
    stateful_rng = torch.Generator().manual_seed(9)
    torch.rand(3, generator=stateful_rng)
    with gpumove.Checkpointer(url, model=Odd(True), objects={"values": dict(values), "g": stateful_rng}) as ckpt:
        ckpt.restore()
        ckpt.save(1).wait(60)
    expected_next = torch.rand(3, generator=stateful_rng)
    g.manual_seed(3)
    live, expected, taken, other_rng = Odd(False), None, {"best": 9}, torch.Generator()
    g.manual_seed(3)
    expected = Odd(True)
    with gpumove.Checkpointer(url, model=live, objects={"values": taken, "g": other_rng}) as ckpt:
        assert ckpt.restore() == 1
    for (name, a), b in zip(live.state_dict().items(), expected.state_dict().values()):
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)), name
    assert taken == values
    assert torch.equal(torch.rand(3, generator=other_rng), expected_next)


def test_the_second_save_sends_only_what_changed_also_after_a_restore(url: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 8))
        net[0].requires_grad_(False)
        return net

    net = model()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    with gpumove.Checkpointer(url, model=net, optimizer=optimizer) as ckpt:
        ckpt.restore()
        first = ckpt.save(0)
        first.wait(60)
        net(torch.randn(4, 512)).sum().backward()
        optimizer.step()
        second = ckpt.save(1)
        second.wait(60)
    assert first.stats.new_bytes > 800_000
    assert second.stats.clean_bytes >= 512 * 512 * 4
    assert second.stats.new_bytes < 100_000
    net = model()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    with gpumove.Checkpointer(url, model=net, optimizer=optimizer) as ckpt:
        ckpt.restore()
        third = ckpt.save(2)
        third.wait(60)
    assert third.stats.new_bytes < 20_000


def test_tied_weights_are_stored_once(url: str) -> None:
    embed, head = nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False)
    head.weight = embed.weight
    with gpumove.Checkpointer(url, model=nn.Sequential(embed, head), rng=False) as ckpt:
        ckpt.restore()
        handle = ckpt.save(1)
        handle.wait(60)
    assert handle.stats.new_bytes < 1.1 * 1000 * 64 * 4


# ------------------------------------------------------------------ cadence and errors


class SlowStore:
    """A store whose puts wait until they are let go."""

    def __init__(self, inner: Store) -> None:
        self._inner, self.gate = inner, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, key: str, data: Any) -> None:
        self.gate.wait(30)
        self._inner.put(key, data)


def wrap_store(monkeypatch: pytest.MonkeyPatch, wrapper: Any) -> list[Any]:
    """Every store that is opened from here on is wrapped."""
    made: list[Any] = []
    genuine = Store.open

    def opened(*args: Any, **kwargs: Any) -> Any:
        made.append(wrapper(genuine(*args, **kwargs)))
        return made[-1]

    monkeypatch.setattr(Store, "open", opened)
    return made


def test_a_due_save_is_skipped_and_counted_while_one_is_running(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = wrap_store(monkeypatch, SlowStore)
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), every_steps=2) as ckpt:
        job.train(ckpt.restore(), 9, ckpt)
        assert ckpt.last is not None
        assert (ckpt.last.step, ckpt.last.staged, ckpt.last.finished, ckpt.skipped) == (2, True, False, 3)
        stores[0].gate.set()
        ckpt.last.wait(30)
        job.train(9, 10, ckpt)
        assert ckpt.last.step == 10


def test_saves_every_n_steps_land_on_multiples(url: str) -> None:
    job = new_job()
    seen = []
    with gpumove.Checkpointer(url, **job.parts(), every_steps=4, every_s=None) as ckpt:
        step = ckpt.restore()
        for stop in range(1, 14):
            job.train(step, stop, ckpt)
            step = stop
            if ckpt.last is not None:
                ckpt.last.wait(30)
                seen.append(ckpt.last.step)
    assert sorted(set(seen)) == [4, 8, 12]


def test_saves_every_t_seconds() -> None:
    """Where the machine pauses, a step is as long as the pause, and no save can come in it."""
    job = new_job()
    with gpumove.Checkpointer("memory://every-half-a-second", **job.parts(), every_s=0.5) as ckpt:
        step, seen, steady_s = ckpt.restore(), set(), 0.0
        began = now = time.monotonic()
        while steady_s < 2.6:
            time.sleep(0.01)
            job.train(step, step + 1, ckpt)
            step += 1
            if ckpt.last is not None:
                seen.add(ckpt.last.step)
            steady_s += min(time.monotonic() - now, 0.05)
            now = time.monotonic()
    assert steady_s / 0.9 <= len(seen) <= (now - began) / 0.45


class BrokenStore(SlowStore):
    """A store that refuses puts while it is told to."""

    broken = False

    def put(self, key: str, data: Any) -> None:
        if self.broken:
            raise StoreError("the disk is full", code="store.no_space")
        self._inner.put(key, data)


def test_a_failed_save_is_raised_once_in_the_training_thread_and_the_next_one_works(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = wrap_store(monkeypatch, BrokenStore)
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), every_steps=1) as ckpt:
        job.train(ckpt.restore(), 2, ckpt)
        assert ckpt.last is not None
        ckpt.last.wait(30)
        stores[0].broken = True
        job.train(2, 3, ckpt)
        ckpt.last.join(30)
        stores[0].broken = False
        with pytest.raises(StoreError, match="disk is full"):
            job.train(3, 4, ckpt)
        job.train(4, 5, ckpt)
        assert ckpt.last.wait(30).step == 5


def test_warn_counts_and_goes_on(url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stores = wrap_store(monkeypatch, BrokenStore)
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), every_steps=1, on_save_error="warn") as ckpt:
        step = ckpt.restore()
        stores[0].broken = True
        job.train(step, 1, ckpt)
        assert ckpt.last is not None
        ckpt.last.join(30)
        stores[0].broken = False
        job.train(1, 2, ckpt)
        assert ckpt.failed == 1
        assert ckpt.last.wait(30).step == 2
    assert "the save of step 1 failed: the disk is full" in caplog.text


def test_close_raises_an_error_that_nobody_has_seen(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = wrap_store(monkeypatch, BrokenStore)
    job = new_job()
    ckpt = gpumove.Checkpointer(url, **job.parts())
    ckpt.restore()
    stores[0].broken = True
    ckpt.save(1)
    with pytest.raises(StoreError, match="disk is full"):
        ckpt.close()
    ckpt.close()
    with pytest.raises(ConfigError, match="closed"):
        ckpt.save(2)


def test_a_second_job_on_the_same_url_fences_the_first(url: str) -> None:
    first, second = new_job(), new_job()
    with gpumove.Checkpointer(url, **first.parts()) as a:
        first.train(a.restore(), 3, a)
        a.save(3).wait(30)
        with gpumove.Checkpointer(url, **second.parts()) as b:
            assert b.restore() == 3
            first.train(3, 5, a)
            with pytest.raises(FencedError, match="stop this process"):
                a.save(5).wait(30)
            second.train(3, 4, b)
            assert b.save(4).wait(30).step == 4
    assert [c.step for c in gpumove_steps(url)] == [3, 4]


def gpumove_steps(url: str) -> Any:
    from gpumove.config import Config
    from gpumove.store.log import Log

    store = Store.open(url, Config())
    try:
        return Log(store).read().checkpoints
    finally:
        store.close()


def test_saving_into_an_existing_run_without_restore_is_refused(url: str) -> None:
    run(url, until=2, every_steps=1)
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts()) as ckpt, pytest.raises(ConfigError, match=r"call restore\(\)"):
        ckpt.save(1)


# ------------------------------------------------------------------ tensors changed under the copy


def big_job() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Linear(3000, 3000, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(2, 3000)).sum().backward()
    optimizer.step()
    return net, optimizer


def test_an_optimizer_step_right_after_save_cannot_tear_it(url: str) -> None:
    net, optimizer = big_job()
    with gpumove.Checkpointer(url, model=net, optimizer=optimizer) as ckpt:
        ckpt.restore()
        for n in range(1, 8):
            expected = net.weight.detach().clone()
            handle = ckpt.save(n)
            optimizer.step()
            optimizer.step()
            handle.wait(60)
            other = nn.Linear(3000, 3000, bias=False)
            assert gpumove.load(url, n, model=other) == n
            assert torch.equal(other.weight, expected)


def test_a_change_outside_the_optimizer_is_never_committed(url: str, caplog: pytest.LogCaptureFixture) -> None:
    net, optimizer = big_job()
    with gpumove.Checkpointer(url, model=net, optimizer=optimizer, every_steps=1) as ckpt:
        ckpt.restore()
        ckpt.step(1)
        with torch.no_grad():
            for _ in range(50):
                net.weight.add_(1.0)  # by hand, right after the call returned
        assert ckpt.last is not None
        ckpt.last.join(60)
        expected = net.weight.detach().clone()
        ckpt.step(2)
        with torch.no_grad():
            net.weight.add_(1.0)
        handle = ckpt.last
        torn = ckpt.failed
        handle.wait(60)
    other = nn.Linear(3000, 3000, bias=False)
    assert gpumove.load(url, 2, model=other) == 2
    assert torch.equal(other.weight, expected)
    if torn:  # the first copy may have been quicker than the first change
        assert "weight changed outside of an optimizer step" in caplog.text


def test_parameters_that_forward_changes_are_copied_at_once(url: str) -> None:
    torch.manual_seed(0)
    net = nn.Embedding(20000, 64, max_norm=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with gpumove.Checkpointer(url, model=net, optimizer=optimizer) as ckpt:
        ckpt.restore()
        expected = net.weight.detach().clone()
        handle = ckpt.save(1)
        net(torch.arange(20000))  # renormalises in place
        assert not torch.equal(net.weight, expected)
        handle.wait(60)
    other = nn.Embedding(20000, 64)
    gpumove.load(url, model=other)
    assert torch.equal(other.weight, expected)


# ------------------------------------------------------------------ what does not fit


def test_all_differences_are_listed_at_once(url: str) -> None:
    with gpumove.Checkpointer(url, model=nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)), rng=False) as ckpt:
        ckpt.restore()
        ckpt.save(1).wait(30)
    other = nn.ModuleDict({"0": nn.Linear(4, 7), "2": nn.Linear(5, 6)}).double()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with gpumove.Checkpointer(url, model=other, rng=False) as ckpt, pytest.raises(LayoutError) as caught:
        ckpt.restore()
    text = str(caught.value)
    for expected in (
        "model.0.weight is float32[5, 4] in the checkpoint and float64[7, 4] here",
        "the checkpoint lacks model.2.bias",
        "the checkpoint lacks model.2.weight",
        "the live objects lack model.1.bias",
        "the live objects lack model.1.weight",
    ):
        assert expected in text
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_state_that_nobody_takes_is_named_unless_not_strict(url: str) -> None:
    run(url, until=2, every_steps=2)
    job = new_job()
    with gpumove.Checkpointer(url, model=job.model) as ckpt:
        with pytest.raises(LayoutError, match="also holds loader, optimizer, scheduler"):
            ckpt.restore()
        assert ckpt.restore(strict=False) == 2
    with (
        gpumove.Checkpointer(url, **job.parts(), objects={"more": {}}) as ckpt,
        pytest.raises(LayoutError, match=r"holds no state of objects\.more"),
    ):
        ckpt.restore()


def test_optimizer_groups_must_fit(url: str) -> None:
    net = nn.Linear(2, 2)
    with gpumove.Checkpointer(url, model=net, optimizer=torch.optim.SGD(net.parameters())) as ckpt:
        ckpt.restore()
        ckpt.save(1).wait(30)
    groups = [{"params": [net.weight]}, {"params": [net.bias]}]
    with (
        gpumove.Checkpointer(url, model=net, optimizer=torch.optim.SGD(groups)) as ckpt,
        pytest.raises(LayoutError, match="has 2 parameter groups, and the checkpoint 1"),
    ):
        ckpt.restore()


def test_a_value_that_cannot_be_encoded_names_its_path(url: str) -> None:
    with gpumove.Checkpointer(url, objects={"meta": {"deep": [1, object()]}}) as ckpt:
        ckpt.restore()
        with pytest.raises(ConfigError, match=r"'objects\.meta\.deep\.1' is a builtins\.object"):
            ckpt.save(1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every_steps": 0}, "every_steps"),
        ({"codec": "gzip"}, "codec must be one of"),
        ({"budget_bytes": 1}, "budget_bytes"),
        ({"nonsense": 1}, "unknown settings"),
        ({"objects": {"a.b": {}}}, "words without dots"),
        ({"objects": {"a": 3}}, "objects.a is a int"),
    ],
)
def test_wrong_arguments(url: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gpumove.Checkpointer(url, **settings)


def test_load_reads_without_claiming(url: str) -> None:
    run(url, until=2, every_steps=2)
    _, job = run(url, until=4, every_steps=2)
    other = new_job(seed=2)
    assert gpumove.load(url, model=other.model, optimizer=other.optimizer) == 4
    for a, b in zip(job.model.state_dict().values(), other.model.state_dict().values()):
        assert torch.equal(a, b)
    store = Store.open(url, gpumove.Config())
    entries = [o.key for o in store.list("log/")]
    store.close()
    assert gpumove.load(url, 2, model=other.model) == 2
    with pytest.raises(ConfigError, match="no checkpoint of step 3"):
        gpumove.load(url, 3, model=other.model)
    with pytest.raises(ConfigError, match="no gpumove run"):
        gpumove.load(url + "-other", model=other.model)
    store = Store.open(url, gpumove.Config())
    assert [o.key for o in store.list("log/")] == entries
    store.close()


def test_damage_is_named_and_the_checkpoint_before_is_taken(url: str, caplog: pytest.LogCaptureFixture) -> None:
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts()) as ckpt:
        start = ckpt.restore()
        for stop in (3, 6):
            job.train(start, stop, ckpt)
            ckpt.save(stop).wait(30)
            start = stop
    newest = max((Path(url) / "packs").iterdir())
    pack = next(newest.iterdir())
    data = bytearray(pack.read_bytes())
    data[int.from_bytes(data[:8], "little") + 8 + 5] ^= 1  # in the first tensor
    pack.write_bytes(data)
    whole = new_job()
    whole.train(0, 10)
    start, again = run(url, until=10)
    assert start == 3
    assert again.fingerprint() == whole.fingerprint()
    assert "step 6 is damaged and is skipped" in caplog.text
    assert pack.name in caplog.text
    only = gpumove_steps(url)
    assert [c.step for c in only] == [3, 6]
    with pytest.raises(IntegrityError, match=rf"{pack.name} is damaged at bytes \d+ to \d+"):
        gpumove.load(url, 6, model=again.model, optimizer=again.optimizer)
