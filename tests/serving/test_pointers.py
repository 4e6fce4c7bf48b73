"""Named pointers: create-only, reversible, beside a training; of two publishers one wins; retention keeps up."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gpumove
from gpumove.config import Config
from gpumove.errors import ConfigError, FencedError, IntegrityError, ParityError
from gpumove.format.manifest import FORMAT, Pin
from gpumove.format.pointer import Pointer
from gpumove.inspection.run import open_run, verify
from gpumove.move.copier import Copier
from gpumove.move.replica import Replica
from gpumove.move.rounds import Rounds
from gpumove.serving import following
from gpumove.store.files import FileBackend
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.retry import in_thread
from tests.conftest import StoreAt
from tests.jobs import new_job

IDS = torch.arange(12).view(2, 6)
ONE = Retention(keep_last=1)


def make(
    url: str, steps: int, *, options: Mapping[str, Any] | None = None, probe: bool = True
) -> dict[int, torch.Tensor]:
    """A run with a checkpoint at every step; what the model gives at each."""
    job, outputs = new_job(), {}
    with gpumove.Checkpointer(url, **job.parts(), keep_last=None, every_s=None, storage_options=options) as ckpt:
        if probe:
            ckpt.probe(lambda: job.model(IDS))
        step = ckpt.restore()
        while step < steps:
            job.train(step, step + 1, ckpt)
            step += 1
            ckpt.save(step).wait(60)
            job.model.eval()
            outputs[step] = job.model(IDS).detach()
            job.model.train()
    return outputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, torch.Tensor]]:
    path = tmp_path_factory.mktemp("published") / "run"
    return path, make(str(path), 5)


@pytest.fixture
def url(made: tuple[Path, Any], tmp_path: Path) -> str:
    shutil.copytree(made[0], tmp_path / "run")
    return str(tmp_path / "run")


@pytest.fixture
def outputs(made: tuple[Path, dict[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    return made[1]


def steps(url: str) -> list[int]:
    return [c.step for c in gpumove.checkpoints(url)]


def gc(url: str, retention: Retention = ONE) -> list[int]:
    with open_run(url) as log:
        log.read()
        collect(log, retention)
    assert verify(url, deep=True).sound
    return steps(url)


# -------------------------------------------------------------------- names


def test_publish_promote_demote(url: str, outputs: dict[int, torch.Tensor]) -> None:
    first = gpumove.publish(url, 2, "canary", text="try it")
    assert (first.step, first.number, first.action, first.previous, first.gate) == (2, 1, "publish", None, {})
    assert gpumove.resolve(url, "canary") == first
    up = gpumove.promote(url, "canary", "production", outputs=outputs[2])
    assert (up.step, up.source, up.gate["verdict"]) == (2, "canary", "bitwise")
    gpumove.publish(url, 4, "canary", outputs=outputs[4])
    gpumove.promote(url, "canary", "production", outputs={"output": outputs[4] + 1e-5})
    assert gpumove.resolve(url, "production").gate["verdict"] == "within tolerance"
    gpumove.promote(url, "canary", "production", gate=False)  # the same again: a demote does not stop at it
    back = gpumove.demote(url, "production", text="slower than it was")
    assert (back.step, back.number, back.action, back.previous, back.gate) == (2, 4, "demote", None, up.gate)
    assert gpumove.resolve(url, "canary").step == 4
    with pytest.raises(ConfigError, match="stood for before production/4: there is nothing to go back to"):
        gpumove.demote(url, "production")
    assert [p.step for p in gpumove.pointers(url, "production")] == [2, 4, 4, 2]
    assert {p.name: p.step for p in gpumove.pointers(url)} == {"canary": 4, "production": 2}


def test_a_name_that_is_retired(url: str) -> None:
    gpumove.publish(url, 1, "canary")
    gpumove.publish(url, 2, "canary")
    gone = gpumove.demote(url, "canary", retire=True)
    assert (gone.step, gone.action, gone.previous) == (None, "retire", 2)
    with pytest.raises(ConfigError, match="canary stands for nothing") as caught:
        gpumove.resolve(url, "canary")
    assert caught.value.code == "config.no_pointer"
    assert gpumove.demote(url, "canary").step == 2
    assert gpumove.demote(url, "canary").step == 1
    gpumove.demote(url, "canary", retire=True)
    assert gc(url) == [5]
    with pytest.raises(ConfigError, match="step 1, which canary/7 names, is not a checkpoint"):
        gpumove.demote(url, "canary")


def test_what_is_refused(url: str, outputs: dict[int, torch.Tensor], tmp_path: Path) -> None:
    for bad in ("", "a/b", "..", ".x", "a b", "x" * 65, "ä"):
        with pytest.raises(ConfigError, match="is no name for a pointer"):
            gpumove.publish(url, 1, bad)
    with pytest.raises(ConfigError, match="no checkpoint of step 9"):
        gpumove.publish(url, 9, "canary")
    with pytest.raises(ConfigError, match="nothing is published as canary"):
        gpumove.promote(url, "canary", "production", outputs=outputs[1])
    with pytest.raises(ConfigError, match="nothing is published as canary"):
        gpumove.demote(url, "canary")
    with pytest.raises(ParityError) as wrong:
        gpumove.publish(url, 1, "canary", outputs=outputs[2])
    assert (wrong.value.exit_code, wrong.value.code) == (50, "parity.different")
    assert gpumove.pointers(url) == []
    gpumove.publish(url, 1, "canary")
    with pytest.raises(ConfigError, match="the gate is closed") as closed:
        gpumove.promote(url, "canary", "production")
    assert closed.value.code == "config.no_outputs"
    with pytest.raises(ParityError, match="differs by up to"):
        gpumove.promote(url, "canary", "production", outputs=outputs[5])
    save_file({"logits": outputs[1]}, tmp_path / "outputs.safetensors")
    assert gpumove.promote(url, "canary", "production", outputs=tmp_path / "outputs.safetensors").step == 1
    make(str(tmp_path / "plain"), 1, probe=False)
    gpumove.publish(str(tmp_path / "plain"), 1, "canary")
    with pytest.raises(ConfigError, match="has recorded no probe"):
        gpumove.promote(str(tmp_path / "plain"), "canary", "production", outputs=outputs[1])


def test_a_pointer_names_one_checkpoint_though_another_is_of_its_step(
    url: str, outputs: dict[int, torch.Tensor]
) -> None:
    pointer = gpumove.publish(url, 5, "canary", outputs=outputs[5])
    job = new_job(seed=9)
    with gpumove.Checkpointer(url, **job.parts(), keep_last=None, every_s=None) as ckpt:
        ckpt.probe(lambda: job.model(IDS))
        ckpt.restore(step=3)
        with torch.no_grad():
            job.model.mid.bias += 1.0
        job.train(3, 5, ckpt)
        ckpt.save(5).wait(60)
    other = new_job(seed=2).model
    assert gpumove.load(url, gpumove.resolve(url, "canary"), model=other) == 5
    other.eval()
    assert torch.equal(other(IDS), outputs[5])
    assert gpumove.check_probe(url, outputs[5], step=pointer).verdict == "bitwise"
    assert gpumove.check_probe(url, outputs[5], step=5).verdict == "different"


# -------------------------------------------------------------------- beside others


@pytest.mark.parametrize(
    "store_url",
    ["file", "s3", *(pytest.param(cloud, marks=pytest.mark.slow) for cloud in ("gs", "abfs"))],
    indirect=True,
)
def test_of_two_publishers_one_wins(store_url: StoreAt) -> None:
    url, options = store_url
    make(url, 2, options=options, probe=False)
    meeting = threading.Barrier(4)
    create = Store.create

    def together(self: Store, key: str, data: bytes) -> bool:
        if key.startswith("pointers/"):
            meeting.wait(60)
        return create(self, key, data)

    def one(step: int) -> Pointer | ConfigError:
        try:
            return gpumove.publish(url, step, "production", storage_options=options)
        except ConfigError as error:
            return error

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(Store, "create", together)
        found = list(pool.map(one, [1, 2, 1, 2]))
    (won,) = [f for f in found if isinstance(f, Pointer)]
    lost = [f for f in found if isinstance(f, ConfigError)]
    assert {error.code for error in lost} == {"config.raced"}
    assert "somebody else has published as production meanwhile, number 1" in str(lost[0])
    assert gpumove.resolve(url, "production", storage_options=options) == won
    assert gpumove.publish(url, 1, "production", storage_options=options).number == 2


def published_beside(url: str, name: str, at: Collection[int], *, until: int, keep_last: int) -> int:
    """Train from the beginning, save every step, publish some at once; how many saves have failed."""
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), keep_last=keep_last, every_s=None) as ckpt:
        ckpt.restore()
        for step in range(1, until + 1):
            job.train(step - 1, step, ckpt)
            ckpt.save(step).wait(60)
            if step in at:
                gpumove.publish(url, step, name)
        return ckpt.failed


def test_it_goes_on_beside_a_training_that_is_not_disturbed(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    assert published_beside(url, "canary", (2, 4, 6), until=12, keep_last=2) == 0
    assert set(steps(url)) & {2, 4, 6} == {4, 6}, "the newest, and what a demote goes back to"
    assert gpumove.demote(url, "canary").step == 4
    assert verify(url, deep=True).sound


# -------------------------------------------------------------------- retention


def test_a_name_that_stands_for_each_new_checkpoint_keeps_few(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    published_beside(url, "latest", range(1, 11), until=10, keep_last=1)
    assert len(steps(url)) <= 4
    assert gc(url) == [9, 10]


def test_retention_keeps_what_pointers_need_and_nothing_else(url: str) -> None:
    for step in (1, 2, 3):
        gpumove.publish(url, step, "canary")
    assert gc(url) == [2, 3, 5]
    gpumove.publish(url, 5, "canary")
    gpumove.publish(url, 2, "production")
    assert gc(url) == [2, 3, 5]
    gpumove.demote(url, "production", retire=True)
    assert gc(url) == [3, 5]
    with open_run(url) as log:
        log.read()
        log.pin(next(c for c in log.view.checkpoints if c.step == 3), pinned=True)
    gpumove.publish(url, 3, "other")
    with open_run(url) as log:
        log.read()
        log.pin(next(c for c in log.view.checkpoints if c.step == 3), pinned=False)
    assert gc(url) == [3, 5], "a pin that is taken back takes no pointer along"


def test_a_collection_between_the_mark_and_the_pointer_keeps_the_checkpoint(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create

    def late(self: Store, key: str, data: bytes) -> bool:
        if key.startswith("pointers/"):
            monkeypatch.setattr(Store, "create", create)
            assert gc(url) == [1, 5]
            assert gc(url) == [1, 5]
        return create(self, key, data)

    monkeypatch.setattr(Store, "create", late)
    gpumove.publish(url, 1, "canary")
    assert gc(url) == [1, 5]


def test_a_collection_before_the_mark_leaves_no_pointer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Log.append

    def late(self: Log, make: Any) -> Any:
        monkeypatch.setattr(Log, "append", append)
        assert gc(url) == [5]
        return append(self, make)

    monkeypatch.setattr(Log, "append", late)
    with pytest.raises(ConfigError, match="step 1, which canary/1 names, is not a checkpoint"):
        gpumove.publish(url, 1, "canary")
    assert gpumove.pointers(url) == []


def test_a_publisher_that_died_or_lost_keeps_nothing_for_long(url: str) -> None:
    def mark(step: int, pointer: str) -> None:
        with open_run(url) as log:
            log.read()
            found = next(c for c in log.view.checkpoints if c.step == step)
            log.append(
                lambda view, number: Pin(
                    format=FORMAT, number=number, epoch=view.epoch, writer=log.writer, time=0.0,
                    checkpoint=found.number, pinned=True, pointer=pointer,
                )
            )  # fmt: skip

    mark(1, "canary/1")  # and died
    mark(2, "canary/one")  # what an unknown future writes is kept
    assert gc(url) == [1, 2, 5]
    gpumove.publish(url, 5, "canary")
    assert gc(url) == [2, 5]


@pytest.mark.parametrize("how", ["damaged", "newest is a copy of another"])
def test_a_pointer_that_cannot_be_read(url: str, how: str, tmp_path: Path) -> None:
    for step in (1, 2):
        gpumove.publish(url, step, "canary")
    folder = tmp_path / "run" / "pointers" / "canary"
    newest = folder / f"{2:020d}.json"
    data = newest.read_bytes()
    newest.write_bytes(
        data.replace(b'"step":2', b'"step":3') if how == "damaged" else (folder / f"{1:020d}.json").read_bytes()
    )
    with pytest.raises(IntegrityError):
        gpumove.resolve(url, "canary")
    found = verify(url).damage
    assert [(d.object, d.code) for d in found] == [(f"pointers/canary/{2:020d}.json", found[0].code)]
    with open_run(url) as log:
        log.read()
        collect(log, ONE)
    assert steps(url) == [1, 2, 3, 4, 5], "what it needs is not known"
    assert gpumove.publish(url, 4, "canary").previous is None
    assert gc(url) == [4, 5]


def test_a_pointer_that_cannot_be_read_hides_no_other(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        gpumove.publish(url, step, "canary")
    gpumove.publish(url, 3, "production")
    (tmp_path / "run" / "pointers" / "canary" / f"{2:020d}.json").write_bytes(b"?")
    assert [p.mark for p in gpumove.pointers(url)] == ["production/1"]
    assert [p.mark for p in gpumove.pointers(url, "canary")] == ["canary/1"]
    assert sum("a pointer is left out" in r.getMessage() for r in caplog.records) == 2


# -------------------------------------------------------------------- elsewhere


def test_a_replica_and_a_run_that_was_moved_away(url: str, tmp_path: Path) -> None:
    there = str(tmp_path / "there")
    gpumove.publish(url, 5, "canary")
    gpumove.replicate(url, there)
    for refused in (lambda: gpumove.publish(there, 5, "production"), lambda: gpumove.demote(there, "canary")):
        with pytest.raises(FencedError, match=r"is a replica of .*: publish there"):
            refused()
    with open_run(url) as log:
        log.read()
        log.move("sealed", move="0" * 16, other="file:///elsewhere")
    for call in (lambda: gpumove.publish(url, 5, "x"), lambda: gpumove.demote(url, "canary", retire=True)):
        with pytest.raises(FencedError, match="was moved to file:///elsewhere: publish there"):
            call()
    assert gpumove.resolve(url, "canary").step == 5


# -------------------------------------------------------------------- following


def test_a_follower_sees_each_change_once(url: str) -> None:
    stop, seen, woken = threading.Event(), [], threading.Semaphore(0)

    def serve() -> None:
        for pointer in gpumove.follow(url, "production", every_s=0.01, stop=stop):
            seen.append(pointer.step)
            woken.release()

    server = threading.Thread(target=serve)
    server.start()
    for step in (1, 2):
        gpumove.publish(url, step, "production")
        assert woken.acquire(timeout=20)
    gpumove.publish(url, 2, "production")  # nothing new to serve
    gpumove.demote(url, "production", retire=True)
    gpumove.publish(url, 3, "production")
    assert woken.acquire(timeout=20)
    assert gpumove.demote(url, "production").step is None
    gpumove.publish(url, 1, "production")
    assert woken.acquire(timeout=20)
    stop.set()
    server.join(20)
    assert seen == [1, 2, 3, 1]


def test_a_follower_outlives_its_store(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpumove.publish(url, 1, "production")
    stop = threading.Event()
    followed = gpumove.follow(url, "production", every_s=0.01, stop=stop)
    assert next(followed).step == 1
    real, looks = following.numbers, []

    def broken(store: Store, name: str) -> Any:
        looks.append(name)
        if len(looks) < 4:
            raise gpumove.StoreError("the store is away")
        return real(store, name)

    gpumove.publish(url, 2, "production")
    monkeypatch.setattr(following, "numbers", broken)
    assert next(followed).step == 2
    assert [r.getMessage() for r in caplog.records if "the store is away" in r.getMessage()] == [
        "following production: the store is away; what is served stays"
    ]


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_follower_that_is_told_to_stop_waits_for_no_store(
    url: str, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpumove.publish(url, 1, "production")
    stop, away, back = threading.Event(), threading.Event(), threading.Event()
    patient = Config(retry_s=600.0, deadline_s=600.0)
    followed = gpumove.follow(url, "production", every_s=0.01, stop=stop, config=patient)
    assert next(followed).step == 1

    def page(self: FileBackend, prefix: str, token: str | None, seconds: float) -> Any:
        away.set()
        if how == "hangs":
            in_thread(lambda ticket: back.wait(seconds), seconds)
        raise ConnectionError("the store is away")

    monkeypatch.setattr(FileBackend, "page", page)
    end = threading.Thread(target=lambda: away.wait(60) and stop.set())
    end.start()
    assert list(followed) == []
    end.join()
    back.set()
    assert away.is_set()
    assert not [r for r in caplog.records if r.levelname == "WARNING"], "that nobody waits any more is no news"


def test_following_takes_a_time_between_looks(url: str) -> None:
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="every_s"):
            gpumove.follow(url, "production", every_s=bad)


def test_pointers_travel_with_their_checkpoints(url: str, tmp_path: Path) -> None:
    there = str(tmp_path / "there")
    gpumove.publish(url, 5, "canary")
    gpumove.publish(url, 2, "production")
    gpumove.replicate(url, there)
    assert {p.mark: p.step for p in gpumove.pointers(there)} == {"canary/1": 5}
    gpumove.replicate(url, str(tmp_path / "all"), step="all")
    assert gpumove.resolve(str(tmp_path / "all"), "production") == gpumove.resolve(url, "production")
    gpumove.publish(url, 4, "canary")
    gpumove.publish(url, 5, "canary")
    gpumove.replicate(url, there)
    newest = gpumove.resolve(there, "canary")
    assert (newest.number, newest.previous) == (3, 2)
    assert [p.number for p in gpumove.pointers(there, "canary")] == [1, 3]
    job = new_job()
    gpumove.load(there, newest, model=job.model)
    gpumove.replicate(url, there, keep_last=1)
    with open_run(there) as log:
        assert log.read().checkpoints[0].step == 5
    with open_run(there) as log:  # as a move ends
        log.read()
        log.move("handover", move="0" * 16, other=url)
    with pytest.raises(ConfigError, match="canary/2, which canary/3 would go back to, did not come along"):
        gpumove.demote(there, "canary")
    make_more(there, 8)
    assert gpumove.publish(there, 8, "canary").number == 4
    assert gc(there) == [5, 8]


def test_a_name_that_went_back_to_what_is_not_there_stays_behind(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpumove.publish(url, 2, "production")
    gpumove.publish(url, 5, "production")
    gpumove.demote(url, "production")
    gpumove.replicate(url, str(tmp_path / "there"))
    assert gpumove.pointers(str(tmp_path / "there")) == [], "or followers there would get what was taken back"
    assert any("production/3 stays behind: it stands for step 2" in r.getMessage() for r in caplog.records)
    gpumove.replicate(url, str(tmp_path / "all"), step="all")
    assert gpumove.resolve(str(tmp_path / "all"), "production").step == 2


def make_more(url: str, until: int) -> None:
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), keep_last=None, every_s=None) as ckpt:
        step = ckpt.restore()
        job.train(step, until, ckpt)
        ckpt.save(until).wait(60)


def test_rounds_bring_pointers_beside_what_they_copy(url: str, tmp_path: Path) -> None:
    there = str(tmp_path / "there")
    gpumove.publish(url, 5, "canary")
    with open_run(url) as log, closing(Store.open(there, Config())) as target:
        log.read()
        rounds = Rounds(Replica(log, Log(target), Copier(log.store, target)))
        assert rounds.once() is not None  # nothing was there to point at when it began
        assert rounds.once() is None
        wait_for(lambda: [p.mark for p in gpumove.pointers(there)] == ["canary/1"])
        gpumove.publish(url, 5, "production")
        rounds.once()  # not yet: it was looked just now
        with open_run(url) as other:
            other.read()
            other.move("sealed", move="0" * 16, other="file:///elsewhere")
        rounds.once()
        wait_for(lambda: [p.mark for p in gpumove.pointers(there)] == ["canary/1", "production/1"])


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)
