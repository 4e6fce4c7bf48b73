"""A job that waits for its run: started first, warm when it arrives, and gone without a trace when told to leave."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import gpumove
from gpumove.config import Config
from gpumove.errors import ConfigError, FencedError, GpumoveError, LayoutError, StoreError
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.waiting import Waiting
from tests.jobs import Net, TrainingJob, new_job
from tests.road import MOVE, Road
from tests.runs import objects

SETTINGS: dict[str, Any] = {"every_s": None, "keep_last": None, "chunk_bytes": 4096, "pack_bytes": 8192}
LAST = 8
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A run with checkpoints of steps 3 and 4, left there."""
    url = str(tmp_path / "source")
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS, codec="small") as ckpt:
        job.train(ckpt.restore(), 3, ckpt)
        ckpt.save(3).wait(60)
        job.train(3, 4, ckpt)
        ckpt.save(4).wait(60)
    return url


@pytest.fixture
def straight() -> TrainingJob:
    """The run that never moved."""
    job = new_job()
    job.train(0, LAST)
    return job


class Listener(logging.Handler):
    """Waits for what the library says."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[str] = []
        self._more = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._more:
            self._said.append(record.getMessage())
            self._more.notify_all()

    def hear(self, words: str) -> None:
        with self._more:
            assert self._more.wait_for(lambda: any(words in text for text in self._said), 20), (words, self._said)


@pytest.fixture
def listener() -> Iterator[Listener]:
    logger, found = logging.getLogger("gpumove"), Listener()
    before = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(found)
    yield found
    logger.removeHandler(found)
    logger.setLevel(before)


@pytest.fixture
def others() -> Iterator[ThreadPoolExecutor]:
    """What others do while the job waits in the main thread, where signals are."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize("lazy", [False, True])
def test_the_run_arrives_while_the_job_waits(
    lazy: bool, source: str, straight: TrainingJob, tmp_path: Path, listener: Listener, others: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    target = str(tmp_path / "target")
    read: dict[bool, int] = {False: 0, True: 0}
    moved = threading.Event()
    ranges = Store.get_ranges

    def counted(self: Store, key: str, spans: Any, *rest: Any) -> Any:
        if self.url == ckpt._store.url:
            read[moved.is_set()] += sum(stop - start for start, stop in spans)
        return ranges(self, key, spans, *rest)

    def bring_it() -> None:
        listener.hear("there is no run yet")
        road = Road(source, target)
        road.bring(3)
        listener.hear("waiting for")
        listener.hear("this is a replica of")
        listener.hear("taking it up takes")
        moved.set()
        road.bring(4)
        road.hand_over()
        road.close()

    monkeypatch.setattr(Store, "get_ranges", counted)
    job = new_job(seed=9)
    with gpumove.Checkpointer(target, **job.parts(), **SETTINGS) as ckpt:
        bringing = others.submit(bring_it)
        assert ckpt.restore(wait=True, lazy=lazy) == 4
        bringing.result(20)
        job.train(4, LAST, ckpt)
    assert job.fingerprint() == straight.fingerprint()
    assert job.losses == {step: loss for step, loss in straight.losses.items() if step > 4}
    if not lazy:  # what a small model has late is less than the gaps between it
        cold = sum(len(data) for name, data in objects(Path(source)).items() if name.startswith("packs/"))
        assert 0 < read[True] < cold / 2


def test_reading_ahead_gives_way_to_the_handover(
    source: str, straight: TrainingJob, tmp_path: Path, others: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was being fetched is given up half done; what was done of it stays."""
    road = Road(source, str(tmp_path / "target"))
    road.bring(4)
    begun = threading.Event()
    waiting: list[Waiting] = []
    abandoned: list[str] = []
    ranges = Store.get_ranges

    def held_up(self: Store, key: str, *rest: Any) -> Any:
        if self.url == ckpt._store.url and not begun.is_set():
            begun.set()
            assert waiting[0]._stop.wait(20), "the handover was not seen while this was under way"
        try:
            return ranges(self, key, *rest)
        except StoreError as error:
            abandoned.append(error.code)
            raise

    def hand_over() -> None:
        assert begun.wait(20)
        road.hand_over()

    run = Waiting.run

    def noted(self: Waiting) -> Any:
        waiting.append(self)
        return run(self)

    monkeypatch.setattr(Waiting, "run", noted)
    monkeypatch.setattr(Store, "get_ranges", held_up)
    job = new_job(seed=9)
    with gpumove.Checkpointer(str(tmp_path / "target"), **job.parts(), **SETTINGS) as ckpt:
        handing = others.submit(hand_over)
        assert ckpt.restore(wait=True) == 4
        handing.result(20)
        job.train(4, LAST, ckpt)
    assert "store.abandoned" in abandoned
    assert job.fingerprint() == straight.fingerprint()
    road.close()


def test_the_source_is_fenced_when_the_target_has_it(
    source: str, tmp_path: Path, listener: Listener, others: ThreadPoolExecutor
) -> None:
    target = str(tmp_path / "target")

    def bring_it() -> None:
        road = Road(source, target)
        road.bring(4)
        listener.hear("step 4 is here")
        road.hand_over()
        road.close()

    job = new_job(seed=9)
    with gpumove.Checkpointer(target, **job.parts(), **SETTINGS, wait=True) as ckpt:  # as gpumove run --wait says it
        bringing = others.submit(bring_it)
        assert ckpt.restore() == 4
        bringing.result(20)
    with pytest.raises(FencedError), gpumove.Checkpointer(source, **new_job().parts(), **SETTINGS) as back:
        back.restore()


def test_a_run_that_may_be_claimed_is_not_waited_for(source: str) -> None:
    with gpumove.Checkpointer(source, **new_job(seed=9).parts(), **SETTINGS) as ckpt:
        assert ckpt.restore(wait=True) == 4
        assert ckpt.restore(3, wait=True) == 3


def test_without_waiting_a_replica_is_refused(source: str, tmp_path: Path) -> None:
    road = Road(source, str(tmp_path / "target"))
    road.bring(3)
    road.close()
    parts = new_job(seed=9).parts()
    with (
        gpumove.Checkpointer(str(tmp_path / "target"), **parts, **SETTINGS) as ckpt,
        pytest.raises(FencedError, match="replica"),
    ):
        ckpt.restore()


def test_a_notice_ends_the_wait_and_the_job_at_its_first_step(
    tmp_path: Path, listener: Listener, others: ThreadPoolExecutor
) -> None:
    job = new_job(seed=9)
    with gpumove.Checkpointer(str(tmp_path / "run"), **job.parts(), **SETTINGS) as ckpt:

        def ask() -> None:
            listener.hear("there is no run yet")
            ckpt.request_leave(in_s=20)

        asked = others.submit(ask)
        assert ckpt.restore(wait=True) == 0
        asked.result(20)
        assert ckpt.leaving
        with pytest.raises(ConfigError, match="before the run was its own"):
            ckpt.save(0)
        left = ckpt.step(1)
        assert left
        assert ckpt.notice is not None
        assert ckpt.notice.outcome is not None
        assert not ckpt.notice.outcome.durable
        with pytest.raises(ConfigError, match="before the run was its own"):
            ckpt.save(1)
    assert objects(tmp_path) == {}, "nothing was written"


def test_a_job_that_ends_without_a_step_says_so_too(
    tmp_path: Path, listener: Listener, others: ThreadPoolExecutor
) -> None:
    with gpumove.Checkpointer(str(tmp_path / "run"), **new_job().parts(), **SETTINGS) as ckpt:

        def ask() -> None:
            listener.hear("there is no run yet")
            ckpt.request_leave(in_s=20)

        others.submit(ask)
        assert ckpt.restore(wait=True) == 0
    assert ckpt.notice is not None
    assert ckpt.notice.outcome is not None
    assert not ckpt.notice.outcome.finished
    assert objects(tmp_path) == {}


def test_what_does_not_fit_is_said_before_the_run_is_handed_over(source: str, tmp_path: Path) -> None:
    road = Road(source, str(tmp_path / "target"))
    road.bring(3)
    with (
        gpumove.Checkpointer(str(tmp_path / "target"), model=Net(width=30), **SETTINGS) as ckpt,
        pytest.raises(LayoutError, match=r"model.mid.weight is float32\[26, 26\] in the checkpoint"),
    ):
        ckpt.restore(wait=True)
    road.hand_over()  # nobody has claimed it
    road.close()


def outage(broken: threading.Event, read: Callable[..., Any]) -> Callable[..., Any]:
    def follow(self: Log) -> Any:
        if broken.is_set():
            raise StoreError("the network is gone", code="store.unavailable")
        return read(self)

    return follow


def test_an_outage_does_not_end_the_wait(
    source: str, tmp_path: Path, listener: Listener, others: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    road = Road(source, str(tmp_path / "target"))
    road.bring(4)
    broken = threading.Event()
    broken.set()
    job = new_job(seed=9)
    with gpumove.Checkpointer(str(tmp_path / "target"), **job.parts(), **SETTINGS) as ckpt:
        monkeypatch.setattr(ckpt._log, "follow", outage(broken, Log.follow).__get__(ckpt._log))

        def mend() -> None:
            listener.hear("the wait goes on: the network is gone")
            broken.clear()
            road.hand_over()

        mended = others.submit(mend)
        assert ckpt.restore(wait=True) == 4
        mended.result(20)
    road.close()


def test_a_store_that_refuses_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StoreError("access denied", code="store.denied")

    with gpumove.Checkpointer(str(tmp_path / "run"), **new_job().parts(), **SETTINGS) as ckpt:
        monkeypatch.setattr(ckpt._log, "open", refuse)
        with pytest.raises(GpumoveError, match="access denied"):
            ckpt.restore(wait=True)


def test_config_knows_it_from_the_environment() -> None:
    assert Config.from_env({"GPUMOVE_WAIT": "1"}).wait
    with pytest.raises(ConfigError, match="wait must be True or False"):
        Config(wait="yes")  # type: ignore[arg-type]


def test_a_run_that_is_taken_back_just_before_the_claim_is_waited_for_again(
    source: str, straight: TrainingJob, tmp_path: Path, listener: Listener, others: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    target = str(tmp_path / "target")
    road = Road(source, target)
    road.bring(4)
    road.hand_over()
    claim, claims = Log.claim, []

    def late(self: Log, **more: Any) -> Any:
        """Between the last look at the log and the claim the run is sealed again, towards where it came from."""
        if self.store.url == ckpt._store.url:
            claims.append(self.view.refusal())
            if len(claims) == 1:
                road.target.move("sealed", move=MOVE, other=road.source.store.url)
        return claim(self, **more)

    def hand_over_again() -> None:
        listener.hear("the wait goes on")
        listener.hear("was moved to")
        road.target.move("handover", move=MOVE, other=road.source.store.url)
        road.close()

    monkeypatch.setattr(Log, "claim", late)
    job = new_job(seed=9)
    with gpumove.Checkpointer(target, **job.parts(), **SETTINGS) as ckpt:
        again = others.submit(hand_over_again)
        assert ckpt.restore(wait=True) == 4
        again.result(20)
        job.train(4, LAST, ckpt)
        ckpt.save(LAST).wait(60)
    assert claims == ["", ""], "both times it could be claimed as far as was known"
    assert job.fingerprint() == straight.fingerprint()


def test_after_news_the_log_is_looked_at_more_often(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handover follows the last checkpoint: the less of the blackout passes until it is seen."""
    target, naps = str(tmp_path / "target"), []  # type: ignore[var-annotated]
    road = Road(source, target)
    road.bring(3)

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 5:
            road.bring(4)
        if len(naps) == 12:
            road.hand_over()

    monkeypatch.setattr("gpumove.waiting.time.sleep", nap)
    job = new_job(seed=9)
    with gpumove.Checkpointer(target, **job.parts(), **SETTINGS) as ckpt:
        assert ckpt.restore(wait=True) == 4
    road.close()
    assert naps[0] == 0.5
    assert 0.1 in naps[5:8]
    assert set(naps) == {0.1, 0.5}
