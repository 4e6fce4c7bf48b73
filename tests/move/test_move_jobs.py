"""Jobs of several processes that are moved between two clouds' stores while they train: not one step is lost or odd."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.move.jobs import STEPS, Job, Moving, opened
from tests.servers import Bucket
from tests.servers.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # real processes, which train for a while


class Clouds:
    """A run's place in S3, an empty one in GCS, and the processes that are started between them."""

    def __init__(self, folder: Path, s3: Bucket, gcs: Bucket) -> None:
        name = f"{folder.name}-{time.time_ns()}"
        self.folder, self.s3, self.gcs = folder, s3, gcs
        self.source, self.target = f"{s3.url}/{name}", f"{gcs.url}/{name}"
        self.env: Mapping[str, str] = {**s3.env, **gcs.env}
        self._started: list[Any] = []

    def here(self, env: Mapping[str, str] | None = None, **more: Any) -> Job:
        env = {**self.env, **(env or {})}
        return self._keep(Job(self.folder / "here", self.source, env, **{"pace_s": 0.2, **more}))

    def there(self, **more: Any) -> Job:
        return self._keep(Job(self.folder / "there", self.target, self.env, **more))

    def move(self, *options: str) -> Moving:
        return self._keep(Moving(self.folder, self.source, self.target, self.env, *options))

    def training(self, job: Job, step: int) -> Job:
        """Wait until it has come so far, and has saved."""
        job.reach(step)
        job.until(self.steps_here, "a checkpoint")
        return job

    def _keep(self, what: Any) -> Any:
        self._started.append(what.process)
        return what

    def claimable(self) -> tuple[bool, bool]:
        found = []
        for bucket, url in ((self.s3, self.source), (self.gcs, self.target)):
            with opened(bucket, url) as log:
                found.append(bool(log.view.head) and not log.view.refusal())
        return found[0], found[1]

    def steps_here(self) -> list[int]:
        with opened(self.s3, self.source) as log:
            return [c.step for c in log.view.checkpoints]

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


@pytest.fixture
def clouds(tmp_path: Path, s3_server: Bucket, gcs_server: Bucket) -> Iterator[Clouds]:
    made = Clouds(tmp_path, s3_server, gcs_server)
    yield made
    made.end()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The losses of the run that stays where it is."""
    folder = tmp_path_factory.mktemp("reference")
    job = Job(folder, str(folder / "run"), {})
    assert job.end()[0] == 0, job.log
    return job.losses()


def compare(reference: Mapping[int, str], *lives: Job, twice: bool = False) -> None:
    """Every loss that was ever computed is the one of the run that nobody moved, and none is missing."""
    seen = [life.losses() for life in lives]
    assert {step for life in seen for step in life} == set(reference)
    assert all(life[step] == reference[step] for life in seen for step in life)
    if not twice:
        assert sum(map(len, seen)) == len(reference), "no step was done twice"


def states(report: Mapping[str, Any]) -> list[str]:
    return [e["state"] for e in report["events"] if e["state"] not in ("round", "wait")]


def test_there(clouds: Clouds, reference: Mapping[int, str]) -> None:
    there, here = clouds.there(wait=True), clouds.here()
    clouds.training(here, 12)
    report = clouds.move().end()
    assert here.end() == (77, f"moved: do not start it again here (durable: step {max(here.losses())})\n"), here.log
    assert there.end()[0] == 0, there.log
    compare(reference, here, there)
    assert max(there.losses()) == STEPS
    assert report["phase"] == "done"
    assert states(report) == ["begin", "request", "sealed", "handover", "done"]
    assert 0 < report["blackout_s"] < 60
    (asked,) = [event for event in report["events"] if event["state"] == "request"]
    assert asked["facts"]["forecast_parts"].keys() >= {"leave", "handover", "last_delta", "restore"}
    print("blackout", report["blackout_s"], "foretold", asked["facts"])
    again = clouds.here()
    code, out = again.end()
    assert code == 77, again.log
    assert "moved: do not start it again here" in out
    assert clouds.target in out
    assert clouds.claimable() == (False, True)


def test_the_mover_is_killed_again_and_again(clouds: Clouds, reference: Mapping[int, str]) -> None:
    there, here = clouds.there(wait=True), clouds.here()
    clouds.training(here, 12)
    mover, told = clouds.move(), set[str]()
    for state in ("begin", "request", "sealed", "handover"):
        if state not in told:
            mover.until(state, or_end=True)  # it may have been entered, and not told, just before the last kill
        if mover.process.poll() is not None:
            break
        mover.process.kill()
        mover.process.wait()
        told |= {event["state"] for event in mover.events()}
        assert sum(clouds.claimable()) <= 1
        mover = clouds.move("--resume")
    assert {"begin", "request", "sealed"} <= told
    assert mover.end()["phase"] == "done"
    assert here.end()[0] == 77, here.log
    assert there.end()[0] == 0, there.log
    compare(reference, here, there)


def test_a_job_that_was_frozen_cannot_commit_at_either_end(clouds: Clouds, reference: Mapping[int, str]) -> None:
    there, here = clouds.there(wait=True), clouds.here(every=20)
    clouds.training(here, 30)
    workers = here.workers()
    for worker in workers:
        worker.suspend()
    had = clouds.steps_here()
    report = clouds.move("--leave-timeout", "1s", "--force").end()
    assert states(report) == ["begin", "request", "forced", "sealed", "handover", "done"]
    there.reach(had[-1] + 15)
    for worker in workers:
        worker.resume()
    code, out = here.end()
    assert code == 77, here.log
    assert "fenced" in here.log.lower() or "was moved to" in out
    assert there.end()[0] == 0, there.log
    assert clouds.steps_here() == had
    compare(reference, here, there, twice=True)


def test_a_job_that_is_dead(clouds: Clouds, reference: Mapping[int, str]) -> None:
    here = clouds.here()
    clouds.training(here, 25)
    for process in (*here.workers(), here.process):
        process.kill()
    had = clouds.steps_here()
    failed = clouds.move("--leave-timeout", "0.5s")
    assert failed.process.wait(60) == 10, failed.text()
    assert "did not leave within 0.5 s" in failed.text()
    assert clouds.claimable() == (True, False)
    report = clouds.move("--leave-timeout", "0.5s", "--force", "--no-wait").end()
    assert (report["phase"], report["step"]) == ("handed", had[-1])
    there = clouds.there()
    assert there.end()[0] == 0, there.log
    assert clouds.move("--resume").end()["phase"] == "done"
    compare(reference, here, there, twice=True)


def test_what_is_trained_again_sooner_than_sent_is_not_sent(clouds: Clouds, reference: Mapping[int, str]) -> None:
    """The job leaves without a save. When that is the better way is arithmetic, and tested as such."""
    there, here = clouds.there(wait=True), clouds.here(every=20)
    clouds.training(here, 25)
    mover = clouds.move("--max-blackout", "0.000001s")  # it goes on copying
    mover.until("round")
    mover.process.kill()
    mover.process.wait()
    with opened(clouds.s3, clouds.source) as log:
        begun = log.view.move
        assert begun is not None
        log.move("request", move=begun.move, other=begun.other, save=False)
    assert clouds.move("--resume").end()["phase"] == "done"
    code, out = here.end()
    assert code == 77, here.log
    assert "not durable: resumes from step" in out
    assert there.end()[0] == 0, there.log
    assert len(here.losses()) + len(there.losses()) > STEPS
    compare(reference, here, there, twice=True)


def test_there_and_back(clouds: Clouds, reference: Mapping[int, str]) -> None:
    there, here = clouds.there(wait=True, pace_s=0.2), clouds.here()
    clouds.training(here, 12)
    clouds.move().end()
    assert here.end()[0] == 77
    there.reach(60)
    back = clouds.here(wait=True, pace_s=0)
    report = clouds.move("--rollback").end()
    assert (report["source"], report["phase"]) == (clouds.target, "done")
    assert there.end()[0] == 77, there.log
    assert back.end()[0] == 0, back.log
    compare(reference, here, there, back)


def test_a_save_after_every_step(clouds: Clouds, reference: Mapping[int, str]) -> None:
    there, here = clouds.there(wait=True), clouds.here(every=40)
    clouds.training(here, 42)
    report = clouds.move("--every-step", "--slow", "0.3s").end()
    assert here.end()[0] == 77, here.log
    assert there.end()[0] == 0, there.log
    compare(reference, here, there)
    begun = [e for e in report["events"] if e["state"] == "begin" and e["facts"].get("every_step")]
    assert len(begun) == 1, report["events"]
    steps = [c for c in clouds.steps_here() if c > 40]
    assert len([step for step, after in pairwise(steps) if after == step + 1]) >= 4, steps


def test_a_rank_that_is_lost_at_the_cutover(clouds: Clouds, reference: Mapping[int, str]) -> None:
    """Its host goes while the last save runs: the other one has the same weights, and completes it."""
    with Proxy(clouds.s3.endpoint) as proxy:
        there = clouds.there(wait=True)
        here = clouds.training(clouds.here(clouds.s3.via(proxy.endpoint).env), 12)
        mover = clouds.move()
        mover.until("request")
        fault = proxy.fail("status", r"^PUT .*packs/", times=1e9)
        here.until(lambda: "leaving after step" in here.log, "last save")
        here.workers()[1].kill()
        here.until(lambda: "is gone; the others go on" in here.log, "round of the other rank")
        fault.times = 0
        report = mover.end()
        code, out = here.end()
        assert fault.fired, proxy.requests[-40:]
    last = max(here.losses())
    (sealed,) = [event for event in report["events"] if event["state"] == "sealed"]
    assert sealed["facts"]["step"] == last, "not one step is lost"
    assert code == 77, (out, here.log)
    assert there.end()[0] == 0, there.log
    seen = there.losses()
    assert set(seen) == set(range(last + 1, STEPS + 1))
    # The lost rank's generator went with it, so that its dropout masks are others: near, but not the same.
    assert here.losses() == {step: reference[step] for step in range(1, last + 1)}
