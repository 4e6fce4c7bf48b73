"""One rank fails, in every way that it can: all ranks learn of it, nobody hangs, and the last checkpoint stands."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gpumove import Checkpointer, GpumoveError
from gpumove.store.files import FileBackend
from tests.dist.harness import LOST, kill_self, run
from tests.dist.jobs import SETTINGS, equal_linear, make, url_of

PEER_S = 5.0


def on_put(act: Any, *kinds: str) -> None:
    """Call ``act`` before every object of these kinds is written by this process."""
    put = FileBackend.put

    def hooked(self: FileBackend, key: str, data: Sequence[memoryview], seconds: float) -> None:
        if key.startswith(kinds):
            act()
        put(self, key, data, seconds)

    FileBackend.put = hooked  # type: ignore[method-assign]


def refuse() -> None:
    raise PermissionError(13, "the directory is read-only")


def caught(work: Any) -> tuple[str, str, str] | None:
    """What a call raised, as plain values."""
    try:
        work()
    except GpumoveError as error:
        return type(error).__name__, error.code, str(error)
    return None


# ---------------------------------------------------------------- a rank is lost


def lose_rank_1(rank: int, url: str) -> dict[str, Any]:
    job = make("fsdp2", rank)
    ckpt = job.checkpointer(url, peer_s=PEER_S)
    ckpt.restore()
    job.train(ckpt, 0, 2)
    ckpt.save(2).wait()
    job.train(ckpt, 2, 3)
    if rank == 1:
        on_put(kill_self, "parts/")  # its packs are up, its part is not
    began = time.monotonic()
    handle = ckpt.save(3)
    failure = caught(handle.wait)
    return {"failure": failure, "seconds": time.monotonic() - began}


def look(rank: int, url: str, layout: str) -> tuple[int, dict[str, Any]]:
    job = make(layout, rank, seed=1)
    with job.checkpointer(url) as ckpt:
        step = ckpt.restore()
        state = job.state()
        job.train(ckpt, step, step + 1)
        assert ckpt.save(step + 1).wait().step == step + 1
    return step, state


def test_a_rank_killed_in_mid_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    survivor, lost = run(lose_rank_1, 2, url, lost=[1])
    kind, code, text = survivor["failure"]
    assert lost is LOST
    assert (kind, code) == ("StoreError", "store.missing_parts")
    assert "no part of rank 1." in text
    assert PEER_S <= survivor["seconds"] < SETTINGS["peer_s"]
    assert [step for step, _ in run(look, 2, url, "fsdp2")] == [2, 2]


def late(rank: int, url: str, where: str) -> tuple[str, str, str] | None:
    """Rank 1 does not come; what rank 0 is told."""
    ckpt = Checkpointer(url, model=equal_linear(), **{**SETTINGS, "peer_s": 3.0})
    for name, call in (("restore", ckpt.restore), ("save", lambda: ckpt.save(1))):
        if name == where and rank == 0:
            return caught(call)
        if name == where:
            time.sleep(4.5)
            return None
        call()
    return None


@pytest.mark.parametrize(("where", "place"), [("restore", "the claim of the run"), ("save", "the meeting at step 1")])
def test_a_rank_that_does_not_come_is_named(where: str, place: str, tmp_path: Path) -> None:
    found = run(late, 2, url_of(tmp_path), where)[0]
    assert found is not None
    assert found[:2] == ("StoreError", "store.peers")
    assert found[2].startswith(f"not all ranks reached {place}: ")
    assert "Ranks 1 failed to pass" in found[2]


# ---------------------------------------------------------------- a rank's store fails


def break_store(rank: int, url: str, broken: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """One rank cannot write for a while: what every rank is told, and how often."""
    job = make("ddp2", rank)
    put = FileBackend.put
    failures: dict[int, tuple[str, str, str]] = {}
    with job.checkpointer(url, every_steps=2, peer_s=PEER_S) as ckpt:
        ckpt.restore()
        job.train(ckpt, 0, 3)
        assert ckpt.last is not None
        ckpt.last.wait()
        if rank == broken:
            on_put(refuse, *kinds)
        for step in range(4, 9):
            job.train(None, step - 1, step)
            if (failure := caught(partial(ckpt.step, step))) is not None:
                failures[step] = failure
                FileBackend.put = put  # type: ignore[method-assign]
            ckpt.last.join(None)
        last = ckpt.last.wait()
    return {"failures": failures, "last": last.step, "why": job.losses}


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("kinds", [("packs/",), ("packs/", "parts/")], ids=["speaks", "mute"])
def test_a_rank_that_cannot_write_is_an_error_once_on_every_rank(
    broken: int, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    found = run(break_store, 2, url_of(tmp_path), broken, kinds)
    for told in found:
        # Step 4 was due and failed; step 6 is the next meeting; step 8 is saved again, and close() says nothing more.
        assert list(told["failures"]) == [6]
        assert told["last"] == 8
    texts = {told["failures"][6] for told in found}
    assert len(texts) == 1, "the same error on all ranks"
    kind, code, text = texts.pop()
    if broken == 1 and "parts/" in kinds:
        assert (kind, code) == ("StoreError", "store.missing_parts")
        assert "no part of rank 1" in text
    else:
        assert (kind, code) == ("StoreError", "store.denied")
        assert "read-only" in text
        assert ("rank 1 could not write its part" in text) == (broken == 1)


def fail_at_the_end(rank: int, url: str) -> tuple[str, str, str] | None:
    """The last save fails on rank 1, and there is no meeting any more."""
    ckpt = Checkpointer(url, model=equal_linear(), **{**SETTINGS, "peer_s": 3.0})
    ckpt.restore()
    if rank == 1:
        on_put(refuse, "parts/")
    ckpt.save(1)
    return caught(ckpt.close)


def test_close_tells_rank_0_and_the_rank_that_failed(tmp_path: Path) -> None:
    boss, culprit, bystander = run(fail_at_the_end, 3, url_of(tmp_path))
    assert boss is not None
    assert "no part of rank 1" in boss[2]
    assert culprit is not None
    assert culprit[1] == "store.denied"
    assert bystander is None


# ---------------------------------------------------------------- a rank sees damage


def save_twice(rank: int, url: str) -> list[dict[str, Any]]:
    job = make("fsdp2", rank)
    states = []
    with job.checkpointer(url) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            job.train(ckpt, step - 1, step)
            ckpt.save(step).wait()
            states.append(job.state())
    return states


def damage_of_rank_1(folder: Path) -> None:
    """Flip a byte in every pack that only rank 1 of the newest attempt has written, and so only it will read."""
    newest = sorted((folder / "run/packs").iterdir())[-1]
    parts = sorted((folder / "run/parts" / newest.name).glob("000001-*.json"))
    assert len(parts) == 1
    text = parts[0].read_text()
    packs = [pack for pack in newest.iterdir() if pack.stem in text]
    assert packs
    for pack in packs:
        data = bytearray(pack.read_bytes())
        data[-200] ^= 1
        pack.write_bytes(data)


def test_damage_that_one_rank_sees_sends_all_ranks_to_the_checkpoint_before(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    before = run(save_twice, 2, url)
    damage_of_rank_1(tmp_path)
    for (step, state), states in zip(run(look, 2, url, "fsdp2"), before):
        assert step == 1
        assert all(torch.equal(state["full"][name], tensor) for name, tensor in states[0]["full"].items())
        assert state["rng"] == states[0]["rng"]
        assert state["position"] == states[0]["position"]
    # Noted in the log: the next one does not even try, and goes on from what was saved since.
    assert [step for step, _ in run(look, 2, url, "fsdp2")] == [2, 2]


def everything_damaged(rank: int, url: str) -> tuple[str, str, str] | None:
    job = make("fsdp2", rank, seed=1)
    with job.checkpointer(url) as ckpt:
        return caught(ckpt.restore)


def test_if_every_checkpoint_is_damaged_all_ranks_say_so(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    run(save_twice, 2, url)
    for pack in (tmp_path / "run/packs").rglob("*.safetensors"):
        pack.write_bytes(pack.read_bytes()[:-200])
    for failure in run(everything_damaged, 2, url):
        assert failure is not None
        assert failure[0] == "IntegrityError"
