"""How much time a notice leaves, and waits that end with it."""

from __future__ import annotations

import threading
import time

from gpumove.leave.countdown import Countdown


def test_without_a_notice_there_is_no_end() -> None:
    countdown = Countdown()
    assert countdown.left_s() == countdown.meet_s == float("inf")
    assert countdown.silent_s == 3.0
    began = time.monotonic()
    assert not countdown.wait(threading.Event().wait, most_s=0.7)
    assert 0.7 <= time.monotonic() - began < 5


def test_the_margin_and_its_parts() -> None:
    countdown = Countdown()
    began = time.monotonic()
    countdown.ends_in(30.0)
    left = [countdown.left_s(), countdown.left_s(margin=0.5), countdown.left_s(margin=0), 2 * countdown.meet_s]
    passed_s = time.monotonic() - began
    for found, most in zip(left, (27, 28.5, 30, 27)):
        assert most - passed_s <= found <= most
    countdown.ends_in(0.5)
    assert countdown.left_s() == 0
    assert (countdown.meet_s, countdown.silent_s) == (2.0, 1.0), "what ranks get in any case"


def test_a_wait_ends_when_the_end_comes_nearer() -> None:
    countdown = Countdown()
    threading.Timer(0.3, countdown.ends_in, (1.8,)).start()
    began = time.monotonic()
    assert not countdown.wait(threading.Event().wait, margin=1.0)
    assert 0.8 < time.monotonic() - began < 20


def test_a_wait_leaves_the_margin_that_it_was_told() -> None:
    countdown = Countdown()
    countdown.ends_in(10.0)
    assert not countdown.wait(threading.Event().wait, margin=9.0)
    assert 3 < countdown.left_s(margin=0) < 9.1, "nine seconds of margin are left"


def test_a_wait_ends_with_what_it_waits_for() -> None:
    countdown, done = Countdown(), threading.Event()
    threading.Timer(0.7, done.set).start()
    began = time.monotonic()
    assert countdown.wait(done.wait)
    assert time.monotonic() - began < 10
    countdown.ends_in(-5.0)
    assert countdown.wait(done.wait), "what has come has come, be it late"
