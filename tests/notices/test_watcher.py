"""Sources in their threads: none delays another, the same notice is one, and a failure is told once."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpumove.notices.aws import Aws
from gpumove.notices.azure import Azure
from gpumove.notices.notice import Notice, Outcome, Source
from gpumove.notices.watched import File
from gpumove.notices.watcher import Watcher, _pause_after
from tests.notices.test_clouds import iso, rfc
from tests.servers.metadata import AzureImds, Imds, Rude, hangs


class Scripted:
    """A source of one's own: each poll takes the next thing to say, or to raise; the last one stays."""

    name = "own"
    pause_s = 0.01

    def __init__(self, *said: Notice | BaseException | None) -> None:
        self._said = list(said)
        self.polls = 0

    def poll(self) -> Notice | None:
        self.polls += 1
        said = self._said.pop(0) if len(self._said) > 1 else self._said[0]
        if isinstance(said, BaseException):
            raise said
        return said


def watch(*sources: Source) -> tuple[Watcher, queue.Queue[Notice]]:
    heard: queue.Queue[Notice] = queue.Queue()
    watcher = Watcher(sources, heard.put)
    watcher.start()
    return watcher, heard


def until(true: Callable[[], bool], limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_same_notice_is_one_and_a_nearer_deadline_is_news() -> None:
    now = time.time()
    source = Scripted(
        None, Notice("own", None), Notice("own", None), Notice("own", now + 60), Notice("own", now + 90),
        Notice("own", None), Notice("own", now + 20), Notice("own", now + 60), None,
    )  # fmt: skip
    watcher, heard = watch(source)
    until(lambda: source.polls > 9)
    watcher.close()
    assert [heard.get_nowait().deadline for _ in range(3)] == [None, now + 60, now + 20]
    assert heard.empty()


def test_a_deadline_in_the_past_is_passed_on() -> None:
    watcher, heard = watch(Scripted(Notice("own", 1.0)))
    assert heard.get(timeout=5).deadline == 1.0
    watcher.close()


def test_one_that_hangs_delays_nobody(tmp_path: Path) -> None:
    with Rude(hangs) as server, Imds() as imds:
        began = time.monotonic()
        watcher, heard = watch(Aws(server.base, limit_s=20), Aws(imds.base), File(str(tmp_path / "leave")))
        assert time.monotonic() - began < 8
        (tmp_path / "leave").touch()
        assert heard.get(timeout=5).source == "file"
        until(lambda: server.connections > 0)
        began = time.monotonic()
        watcher.close()
        assert time.monotonic() - began < 8


def test_threads_are_daemons_with_a_name(tmp_path: Path) -> None:
    watcher, _ = watch(File(str(tmp_path / "leave")))
    threads = [t for t in threading.enumerate() if t.name == "gpumove-notice-file"]
    assert threads
    assert all(thread.daemon for thread in threads)
    watcher.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_nothing_is_passed_on_after_the_end() -> None:
    gate, entered = threading.Event(), threading.Event()

    class Slow:
        name = "slow"
        pause_s = 0.01

        def poll(self) -> Notice | None:
            entered.set()
            gate.wait(10)
            return Notice("slow", None)

    watcher, heard = watch(Slow())
    assert entered.wait(5)
    watcher.close()
    gate.set()
    until(lambda: not any(t.name == "gpumove-notice-slow" for t in threading.enumerate()))
    assert heard.empty()


def test_a_failure_is_told_once_and_the_source_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gpumove")
    source = Scripted(OSError("no\nroute"), Notice("own", 7.0), OSError("again"))
    watcher, heard = watch(source)
    assert heard.get(timeout=10).deadline == 7.0
    until(lambda: source.polls > 2)
    watcher.close()
    told = [record for record in caplog.records if "own" in record.getMessage()]
    assert len(told) == 1
    assert told[0].levelno == logging.INFO
    assert told[0].getMessage().endswith("OSError: no route")


@pytest.mark.parametrize("error", [SystemExit(3), MemoryError()])
def test_whatever_a_source_raises_it_is_asked_again(error: BaseException) -> None:
    watcher, heard = watch(Scripted(error, Notice("own", 7.0)))
    assert heard.get(timeout=10).deadline == 7.0
    watcher.close()


def test_a_failing_source_is_asked_ever_more_rarely_up_to_a_minute() -> None:
    pauses = [_pause_after(0.5, failures) for failures in range(1, 20)]
    assert pauses[:3] == [2.0, 4.0, 8.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 60.0


def test_whoever_is_told_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Notice] = []

    def on_notice(notice: Notice) -> None:
        heard.append(notice)
        if len(heard) == 1:
            raise RuntimeError("not now")

    watcher = Watcher([Scripted(Notice("own", 9.0), Notice("own", 5.0))], on_notice)
    watcher.start()
    until(lambda: len(heard) == 2)
    watcher.close()
    assert "could not be passed on" in caplog.text


def test_a_source_that_cannot_be_opened_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Shut(Scripted):
        def open(self) -> None:
            raise RuntimeError("no")

        def close(self) -> None:
            raise AssertionError("was never open")

    caplog.set_level(logging.INFO, "gpumove")
    source = Shut(Notice("own", None))
    watcher, heard = watch(source, Scripted(Notice("other", None)))
    assert heard.get(timeout=5).source == "other"
    watcher.close()
    assert source.polls == 0
    assert "not watched: RuntimeError: no" in caplog.text


def test_a_notice_of_azure_is_acknowledged_once_its_outcome_is_known() -> None:
    with AzureImds() as azure, Imds() as imds:
        watcher, heard = watch(Azure(azure.base), Aws(imds.base))
        event = azure.schedule("Preempt", ["train-vmss_3"], rfc(30))
        notice = heard.get(timeout=10)
        watcher.acknowledge(notice)
        assert azure.started == []
        notice.outcome = Outcome(durable=True, step=5, lost_steps=0)
        watcher.acknowledge(notice)
        assert azure.started == [event]
        watcher.close()


def test_an_acknowledgement_that_fails_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with AzureImds() as azure:
        source = Azure(azure.base, limit_s=0.5)
        azure.schedule("Preempt", ["train-vmss_3"], rfc(30))
        notice = source.poll()
        azure.events.clear()
    assert notice is not None
    notice.outcome = Outcome(durable=True, step=5, lost_steps=0)
    caplog.set_level(logging.INFO, "gpumove")
    Watcher([source], print).acknowledge(notice)
    assert "did not take the acknowledgement" in caplog.text


def test_the_nearer_of_two_clouds_deadlines_reaches_the_job() -> None:
    with Imds() as imds, AzureImds() as azure:
        watcher, heard = watch(Aws(imds.base), Azure(azure.base))
        imds.action = {"action": "terminate", "time": iso(120)}
        azure.schedule("Preempt", ["train-vmss_3"], rfc(30))
        notices = [heard.get(timeout=10) for _ in range(2)]
        watcher.close()
    nearest = min(notices, key=lambda n: n.deadline or 0)
    assert nearest.source == "azure"
