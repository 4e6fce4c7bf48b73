"""Snapshots are exact whatever happens after the call, cost no growth, and notice what they cannot prevent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import gpumove
from gpumove.errors import ConfigError
from gpumove.state.staging import Stager


@pytest.fixture
def stager() -> Iterator[Stager]:
    made = Stager(overlap=True)
    yield made
    made.close()


def taken(snapshot: object, index: int, like: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(snapshot.view(index)), dtype=like.dtype).view(like.shape)  # type: ignore[attr-defined]


def test_copies_are_row_major_whatever_the_source(stager: Stager) -> None:
    base = torch.arange(600.0)
    sources = [
        base.view(20, 30).t(),
        base[7:90:3],
        base[5],
        base[:0],
        base.view(2, 3, 100).permute(2, 0, 1),
        base.bool(),
    ]
    snapshot = stager.stage(sources, [False] * len(sources))
    snapshot.wait()
    for index, source in enumerate(sources):
        assert torch.equal(taken(snapshot, index, source) if source.numel() else source, source)


def test_the_optimizer_step_waits_for_the_copy_and_not_the_call(
    stager: Stager, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.ones(1000)
    gate, genuine = threading.Event(), stager._copy

    def slow(into: list[torch.Tensor], from_: list[torch.Tensor]) -> None:
        if threading.current_thread() is not threading.main_thread():
            gate.wait(10)
        genuine(into, from_)

    monkeypatch.setattr(stager, "_copy", slow)
    snapshot = stager.stage([p.detach()], [False])
    assert not snapshot.done
    threading.Timer(0.2, gate.set).start()
    began = time.perf_counter()
    optimizer.step()
    assert time.perf_counter() - began > 0.15
    assert 0.15 < snapshot.fence_s < 5
    snapshot.wait()
    assert torch.equal(taken(snapshot, 0, p), torch.ones(1000))
    assert torch.equal(p.detach(), torch.zeros(1000))


def test_urgent_sources_are_copied_before_the_call_returns(stager: Stager) -> None:
    source = torch.ones(100_000)
    snapshot = stager.stage([source], [True])
    source.zero_()
    snapshot.wait()
    assert torch.equal(taken(snapshot, 0, source), torch.ones(100_000))


def test_a_source_changed_by_hand_is_noticed(stager: Stager, monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.ones(100_000)
    gate, genuine = threading.Event(), stager._copy

    def slow(into: list[torch.Tensor], from_: list[torch.Tensor]) -> None:
        if threading.current_thread() is not threading.main_thread():
            gate.wait(10)
        genuine(into, from_)

    monkeypatch.setattr(stager, "_copy", slow)
    snapshot = stager.stage([torch.zeros(100), source], [False, False])
    source.add_(1)
    gate.set()
    with pytest.raises(ConfigError) as caught:
        snapshot.wait()
    assert caught.value.code == "config.torn"
    assert snapshot.changed == [1]


def test_without_overlap_nothing_is_left_to_wait_for() -> None:
    stager = Stager(overlap=False)
    source = torch.ones(100_000)
    snapshot = stager.stage([source], [False])
    assert snapshot.done
    source.zero_()
    assert torch.equal(taken(snapshot, 0, source), torch.ones(100_000))
    stager.close()


def test_the_arena_is_kept_and_grows_only_if_it_must(stager: Stager) -> None:
    small, large = torch.ones(1000), torch.ones(3_000_000)
    stager.stage([small], [True]).wait()
    first = stager.nbytes
    for _ in range(5):
        stager.stage([small], [True]).wait()
    assert stager.nbytes == first
    snapshot = stager.stage([small, large], [True, True])
    assert stager.nbytes >= 12_000_000
    assert torch.equal(taken(snapshot, 1, large), large)


def test_preparing_touches_the_memory_that_the_first_snapshot_needs(stager: Stager) -> None:
    sources = [torch.ones(2_000_000)]
    stager.prepare(sources)
    size = stager.nbytes
    assert size >= 8_000_000
    stager.stage(sources, [False]).wait()
    assert stager.nbytes == size


def test_a_closed_stager_leaves_no_hook_behind() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    before = len(_global_optimizer_pre_hooks)
    stager = Stager(overlap=True)
    assert len(_global_optimizer_pre_hooks) == before + 1
    stager.close()
    assert len(_global_optimizer_pre_hooks) == before


def test_a_copy_that_nobody_wants_ends_early_and_the_next_is_whole() -> None:
    stager = Stager(overlap=True, skip="host")
    sources, at_once = [torch.randn(1 << 22) for _ in range(40)], [False] * 40  # 640 MB
    steady = frozenset(range(40))
    given_up = stager.stage(sources, at_once, steady=steady)
    stager.give_up()
    with pytest.raises(ConfigError, match="given up"):
        given_up.wait()
    snapshot = stager.stage(sources, at_once, steady=steady)
    snapshot.wait()
    assert not snapshot.unchanged_since(given_up.serial)
    assert all(bytes(snapshot.view(i)) == t.numpy().tobytes() for i, t in enumerate(sources))
    stager.close()


def test_large_tensors_are_copied_in_pieces_and_whole() -> None:
    stager = Stager(overlap=True)
    sources = [torch.randn(7, 3 << 20), torch.randn(9 << 20), torch.randn(1, 9 << 20), torch.randn(3, 5).t()]
    snapshot = stager.stage(sources, [False] * 4)
    snapshot.wait()
    assert all(bytes(snapshot.view(i)) == t.contiguous().numpy().tobytes() for i, t in enumerate(sources))
    stager.close()


def test_closing_right_after_a_restore_does_not_wait_for_the_copy(tmp_path: Path) -> None:
    """The restored state is copied for the first difference; who only reads must not wait for new memory."""
    model = nn.Linear(4096, 8192, bias=False)  # 134 MB
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for life in range(3):
        ckpt = gpumove.Checkpointer(str(tmp_path), model=model, optimizer=optimizer, every_s=None)
        ckpt.restore()
        if not life:
            ckpt.save(1).wait(60)
        ckpt.close()
    assert gpumove.load(str(tmp_path), model=model) == 1
