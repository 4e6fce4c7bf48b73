"""Real jobs that are broken on purpose after they were moved: each way is found, and each action follows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpumove.store.view import View
from tests.move.jobs import Job, opened
from tests.move.test_move_jobs import Clouds
from tests.servers import Bucket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPS, FIRST, FLAT = 2000, 100, 330
"""Steps in all, those of before the move, and those until the loss does not fall steeply any more."""
SETTINGS = {"GPUMOVE_KEEP_LAST": "20", "GPUMOVE_WATCH_STEPS": "80"}


@pytest.fixture
def clouds(tmp_path: Path, s3_server: Bucket, gcs_server: Bucket) -> Iterator[Clouds]:
    made = Clouds(tmp_path, s3_server, gcs_server)
    yield made
    made.end()


def both(clouds: Clouds, broken: str = "", ranks: int = 1, **settings: str) -> tuple[Job, Job]:
    """A job that trains here, and one that waits there, in which something is broken."""
    common = {"ranks": ranks, "steps": STEPS, "pace_s": 0.01}
    there = clouds.there(wait=True, broken=broken, settings={**SETTINGS, **settings}, **common)
    here = clouds.here(settings=SETTINGS, **common)
    return clouds.training(here, FLAT if broken == "lr" else FIRST), there


def view_there(clouds: Clouds) -> View:
    with opened(clouds.gcs, clouds.target) as log:
        return log.view


def losses(job: Job) -> dict[int, float]:
    return {step: float.fromhex(loss) for step, loss in job.losses().items()}


def test_a_sound_job_is_watched_and_stays(clouds: Clouds) -> None:
    here, there = both(clouds, ranks=2)
    report = clouds.move("--watch", "--on-parity", "rollback").end(120)
    assert here.end()[0] == 77
    assert (report["phase"], report["findings"]) == ("done", [])
    assert "the watch is over: nothing was found" in report["text"]
    assert clouds.claimable() == (False, True)
    assert there.process.poll() is None


def taken_back(clouds: Clouds, broken: str, further: int) -> tuple[Job, Job, Job, dict[str, Any]]:
    """The job that has left, the one that is broken, and the one that goes on here so far; and the report."""
    here, there = both(clouds, broken)
    mover = clouds.move("--watch", "--on-parity", "rollback")
    assert here.end()[0] == 77
    again = clouds.here(wait=True, ranks=1, steps=max(here.losses()) + further, settings=SETTINGS)
    report = mover.end(150, code=50)
    assert there.end()[0] == 77, there.log
    assert again.end()[0] == 0, again.log
    return here, there, again, report


@pytest.mark.parametrize("broken", ["lr", "nan"])
def test_a_spoiled_loss_takes_the_run_back_to_what_was_handed_over(clouds: Clouds, broken: str) -> None:
    here, _, again, report = taken_back(clouds, broken, 40)
    last = max(here.losses())
    assert clouds.claimable() == (True, False)
    assert min(again.losses()) == last + 1
    before = sum(losses(here)[step] for step in range(last - 19, last + 1)) / 20
    assert sum(losses(again).values()) / 40 < 1.1 * before
    print(broken, report["findings"], before)


def test_slow_steps_bring_along_what_was_trained(clouds: Clouds) -> None:
    here, there, again, report = taken_back(clouds, "slow", 80)
    assert "a step takes" in report["findings"][0]
    assert min(again.losses()) == max(there.losses()) + 1 > max(here.losses()) + 1


def test_a_job_that_stops_ends_with_a_code_of_its_own(clouds: Clouds) -> None:
    here, there = both(clouds, "nan", ranks=2, GPUMOVE_ON_PARITY="stop")
    report = clouds.move("--watch").end(120, code=50)
    assert here.end()[0] == 77
    code, _ = there.end()
    assert code == 50, there.log
    assert "the loss is nan" in there.log
    assert report["phase"] == "done"
    assert clouds.claimable() == (False, True)


def test_a_job_that_leaves_has_saved(clouds: Clouds) -> None:
    here, there = both(clouds, "lr", GPUMOVE_ON_PARITY="leave")
    mover = clouds.move("--watch", "--gone-after", "5s")
    assert here.end()[0] == 77
    code, _ = there.end()
    assert code == 75, there.log
    assert view_there(clouds).checkpoints[-1].step == max(there.losses())
    report = mover.end(120, code=50)
    assert "the loss is" in report["findings"][0]


def test_an_error_is_seen_from_outside(clouds: Clouds) -> None:
    here, there = both(clouds, "raise")
    report = clouds.move("--watch", "--on-parity", "rollback", "--leave-timeout", "20s", "--arrive-timeout", "1s")
    told = report.end(180, code=50)
    assert here.end()[0] == 77
    assert "ended with ValueError" in told["findings"][0]
    assert clouds.claimable() == (True, False)
    there.process.kill()
    there.process.wait()
