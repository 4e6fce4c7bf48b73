"""Real training under `gpumove run`: notices, a dead store, and losses that are those of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import gpumove
from tests.job.harness import GPUMOVE, ROOT, Running
from tests.servers import Bucket
from tests.servers.proxy import Proxy

STEPS, FAREWELL = 400, 200
"""In all; and at the end, so many that the job cannot do them before it has heard of a notice."""
TINY = ("--layers", "1", "--width", "32", "--context", "64", "--batch", "8", "--threads", "1", "--steps", str(STEPS),
        "--every-steps", "1000")  # fmt: skip


class Training(Running):
    """One life of examples.train_gpt on two ranks, under `gpumove run`."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        url: str = "",
        env: Mapping[str, str] | None = None,
        more: Sequence[str] = (),
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.nproc, self._log = folder, 2, folder / "stderr"
        self.record = folder / f"losses-{len(list(folder.glob('losses-*')))}"
        url = url or str(folder / "run")
        command = [*GPUMOVE, "run", *options, url, "--", "--nproc-per-node", "2", "-m", "examples.train_gpt"]
        self.start([*command, "--ddp", "--url", url, "--out", str(self.record), *TINY, *more], env)

    def reached(self) -> int:
        """The newest step of this life."""
        return max(losses(self.record), default=0)


def losses(record: Path) -> dict[int, str]:
    """By step, with every bit; a line that is being written does not count."""
    lines = record.read_text().split("\n")[:-1] if record.exists() else []
    return {said["step"]: said["loss"] for said in map(json.loads, lines) if "step" in said}


def rounds(folder: Path, reference: Mapping[int, str], notices: int, dice: random.Random) -> None:
    """Train with that many notices at random steps, and compare every loss that was ever computed."""
    at = sorted(dice.sample(range(1, STEPS - FAREWELL), notices))
    for threshold in at:
        life = Training(folder)
        life.until(lambda life=life, to=threshold: life.reached() >= to, f"step {threshold}")  # type: ignore[misc]
        life.send(dice.choice([signal.SIGTERM, signal.SIGUSR1]))
        code, out = life.end()
        assert code == 75, life.log
        newest = max(c.step for c in gpumove.checkpoints(str(folder / "run")))
        assert out == f"durable: step {newest}\n"
        assert newest == life.reached(), "not one step is lost"
    assert Training(folder).end()[0] == 0
    lives = [losses(path) for path in sorted(folder.glob("losses-*"), key=lambda p: int(p.name.split("-")[1]))]
    assert len(lives) == notices + 1
    assert {step for life in lives for step in life} == set(range(1, STEPS + 1))
    assert all(life[step] == reference[step] for life in lives for step in life)
    assert sum(map(len, lives)) == STEPS, "no step was done twice"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The losses of the run that nobody interrupts."""
    running = Training(tmp_path_factory.mktemp("reference"))
    assert running.end()[0] == 0, running.log
    return losses(running.record)


def test_a_notice(tmp_path: Path, reference: dict[int, str]) -> None:
    rounds(tmp_path / "job", reference, 1, random.Random(5))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_thirty_notices(tmp_path: Path, reference: dict[int, str], number: int) -> None:
    rounds(tmp_path / "job", reference, 3, random.Random(number))


def test_the_example_ends_well_where_nothing_could_be_saved(tmp_path: Path) -> None:
    notice, record = tmp_path / "notice", tmp_path / "losses"
    command = [sys.executable, "-m", "examples.train_gpt", "--url", str(tmp_path / "run"), "--out", str(record), *TINY]
    env = {**os.environ, "GPUMOVE_NOTICES": f"file:{notice}"}
    with subprocess.Popen([*command, "--every-steps=5", "--steps=100000"], cwd=ROOT, env=env) as process:
        while max(losses(record), default=0) < 8 and process.poll() is None:
            time.sleep(0.02)
        (tmp_path / "draft").write_text(json.dumps({"deadline": 1.0}))
        (tmp_path / "draft").rename(notice)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_the_store_dies_in_the_grace_period(tmp_path: Path, s3_server: Bucket) -> None:
    name, often = f"dies-{time.time_ns()}", ("--every-steps", "20")
    with Proxy(s3_server.endpoint) as proxy:
        bucket = s3_server.via(proxy.endpoint)
        url = f"{bucket.url}/{name}"
        life = Training(tmp_path, "--grace", "20", url=url, env=bucket.env, more=("--steps=100000", *often))
        life.until(lambda: saved(url, s3_server), "checkpoint")
        fault = proxy.fail("stall", r"^(PUT|POST) ", times=1e9)
        began = time.monotonic()
        life.send(signal.SIGTERM)
        code, out = life.end()
        took = time.monotonic() - began
    assert fault.fired
    assert code == 76, life.log
    assert took < 30, "gpumove run ends it after 19 s"
    newest = saved(url, s3_server)[-1]
    assert out.startswith(f"not durable: resumes from step {newest}, ")
    again = Training(tmp_path, url=url, env=s3_server.env, more=(f"--steps={newest + 5}", *often))
    assert again.end()[0] == 0
    assert sorted(losses(again.record)) == list(range(newest + 1, newest + 6))


def saved(url: str, bucket: Bucket) -> list[int]:
    """The steps that are in the store."""
    try:
        return [c.step for c in gpumove.checkpoints(url, storage_options=bucket.options)]
    except gpumove.ConfigError:  # no run yet
        return []
