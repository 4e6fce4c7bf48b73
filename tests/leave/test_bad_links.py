"""Leaving while the way to the bucket is cut, stalls, refuses or loses answers: said in time, and true."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

import gpumove
from tests.jobs import TrainingJob, new_job
from tests.servers import Bucket
from tests.servers.proxy import Kind, Proxy

pytestmark = pytest.mark.slow  # against real deadlines

SETTINGS: dict[str, Any] = {"every_s": None, "notices": ""}
DEADLINE_S = 5.0


@pytest.fixture
def proxy(s3_server: Bucket) -> Iterator[Proxy]:
    with Proxy(s3_server.endpoint) as found:
        yield found


class Left:
    """A job that has step 3 saved, and is to leave at step 5 while something is wrong with the way to its bucket."""

    def __init__(self, bucket: Bucket, proxy: Proxy) -> None:
        there, began = bucket.via(proxy.endpoint), time.monotonic()
        self.url, self.direct = f"{bucket.url}/{uuid.uuid4().hex[:8]}", bucket.options
        self.job: TrainingJob = new_job()
        self.ckpt = gpumove.Checkpointer(self.url, storage_options=there.options, **self.job.parts(), **SETTINGS)
        self.ckpt.restore()
        self.job.train(0, 3, self.ckpt)
        self.ckpt.save(3).wait(30)
        self.usual_s = time.monotonic() - began
        """What a slow machine may add to a bound."""
        self.step = 3
        self.seconds = self.closed_s = 0.0

    def leave(self) -> str:
        """The outcome."""
        with self.ckpt as ckpt:
            self.job.train(max(3, ckpt._step), 5, ckpt)
            began = time.monotonic()
            ckpt.request_leave(in_s=DEADLINE_S)
            self.step = 5
            while not ckpt.step(self.step):
                self.job.train(self.step, self.step + 1)
                self.step += 1
            self.seconds = time.monotonic() - began
        self.closed_s = time.monotonic() - began
        assert self.seconds < DEADLINE_S + self.usual_s, "the deadline is overrun"
        assert self.closed_s < DEADLINE_S + 0.5 + self.usual_s
        assert ckpt.notice is not None
        return str(ckpt.notice.outcome)

    def newest(self) -> int:
        """What is really there."""
        return gpumove.checkpoints(self.url, storage_options=self.direct)[-1].step


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("stall", ""),
        ("stall", r"^PUT .*packs/"),
        ("stall", r"^PUT .*log/"),
        ("stall_up", r"^PUT .*packs/"),
        ("reset", ""),
        ("status", ""),
        ("lost_ack", r"^PUT .*parts/"),
    ],
)
def test_a_way_that_is_cut_is_said_in_time(kind: Kind, pattern: str, s3_server: Bucket, proxy: Proxy) -> None:
    left = Left(s3_server, proxy)
    fault = proxy.fail(kind, pattern, times=1 << 30)
    outcome = left.leave()
    assert fault.fired
    assert outcome == f"not durable: resumes from step 3, {left.step - 3} steps lost"
    assert left.ckpt.last is not None
    assert left.ckpt.last.join(10.0), "what hangs is ended too, so that the process can end"
    proxy.clear()
    assert left.newest() == 3


@pytest.mark.parametrize("pattern", [r"^PUT .*packs/", r"^PUT .*parts/", r"^PUT .*manifests/", r"^PUT .*log/"])
@pytest.mark.parametrize("kind", ["lost_ack", "reset", "status"])
def test_a_fault_that_passes_costs_nothing(kind: Kind, pattern: str, s3_server: Bucket, proxy: Proxy) -> None:
    left = Left(s3_server, proxy)
    fault = proxy.fail(kind, pattern)
    assert left.leave() == f"durable: step {left.step}"
    assert fault.fired == 1
    assert left.newest() == left.step


def test_an_answer_that_is_lost_for_good_is_decided_by_reading(s3_server: Bucket, proxy: Proxy) -> None:
    """The entry is in the log; nothing that was sent after it has arrived, and every answer to it was lost."""
    left = Left(s3_server, proxy)
    fault = proxy.fail("lost_ack", r"^PUT .*log/", times=1 << 30)
    assert left.leave() == f"durable: step {left.step}"
    assert fault.fired
    assert left.newest() == left.step


def test_a_save_in_flight_that_stalls_is_given_up_for_a_new_one(s3_server: Bucket, proxy: Proxy) -> None:
    left = Left(s3_server, proxy)
    fault = proxy.fail("stall", r"^PUT .*packs/")
    left.job.train(3, 4)
    left.ckpt.save(4)
    assert left.ckpt.last is not None
    while not fault.fired:
        time.sleep(0.01)
    assert left.leave() == f"durable: step {left.step}"
    assert left.newest() == left.step


def test_what_is_given_up_ends_at_once(s3_server: Bucket, proxy: Proxy) -> None:
    left = Left(s3_server, proxy)
    fault = proxy.fail("stall", r"^PUT .*packs/", times=1 << 30)
    left.job.train(3, 4)
    handle = left.ckpt.save(4)
    while not fault.fired:
        time.sleep(0.01)
    left.ckpt._runner.abandon(handle)
    began = time.monotonic()
    assert handle.join(20.0)
    assert time.monotonic() - began < 1.5 + left.usual_s
    proxy.clear()
    left.ckpt.close()
    assert left.newest() == 3
