"""What a store does when it, or the way to it, fails: on the three clouds, through a proxy that breaks things."""

from __future__ import annotations

import math
import os
import time

import pytest

from gpumove.errors import GpumoveError, IntegrityError, StoreError
from tests.contract.conftest import IN_TIME_S, Faulty, all_failing, failing
from tests.servers.proxy import Kind

WRITE, READ = r"^(PUT|POST) ", r"^GET "


class TestLostAnswers:
    """A create is not idempotent under retry: what lies there decides."""

    def test_ours(self, faulty: Faulty) -> None:
        store = faulty.open()
        fault = faulty.proxy.fail("lost_ack", WRITE)
        assert store.create("log/1", b"ours")
        assert fault.fired == 1
        assert store.get("log/1") == b"ours"

    def test_ours_twice_in_a_row(self, faulty: Faulty) -> None:
        store = faulty.open()
        fault = faulty.proxy.fail("lost_ack", WRITE, times=2)
        assert store.create("log/1", b"ours")
        assert fault.fired == 2

    def test_anothers(self, faulty: Faulty) -> None:
        faulty.open(direct=True).put("log/1", b"another's")
        store = faulty.open()
        fault = faulty.proxy.fail("lost_ack", WRITE)
        assert not store.create("log/1", b"ours")
        assert fault.fired == 1
        assert store.get("log/1") == b"another's"

    def test_of_the_read_back(self, faulty: Faulty) -> None:
        store = faulty.open()
        write, read = faulty.proxy.fail("lost_ack", WRITE), faulty.proxy.fail("reset", READ)
        assert store.create("log/1", b"ours")
        assert (write.fired, read.fired) == (1, 1)

    def test_put_and_delete(self, faulty: Faulty) -> None:
        store = faulty.open()
        fault = faulty.proxy.fail("lost_ack", WRITE)
        store.put("k", b"data")
        assert fault.fired == 1
        assert store.get("k") == b"data"
        fault = faulty.proxy.fail("lost_ack", r"^(DELETE|POST) ")
        store.delete(["k"])
        assert fault.fired == 1
        assert store.exists("k") is None


class TestRecovers:
    """One operation outlives the ordinary failures of networks and stores."""

    @pytest.mark.parametrize("status", [500, 503, 429])
    def test_refused_three_times(self, faulty: Faulty, status: int) -> None:
        store = faulty.open(hurry=10)
        fault = faulty.proxy.fail("status", WRITE, times=3, status=status)
        store.put("k", b"data")
        assert fault.fired == 3
        fault = faulty.proxy.fail("status", READ, times=1, status=status)
        assert store.get("k") == b"data"
        assert fault.fired == 1

    @pytest.mark.parametrize("kind", ["reset", "reset_up"])
    def test_reset_while_writing(self, faulty: Faulty, kind: Kind) -> None:
        store, data = faulty.open(hurry=10), os.urandom(2 << 20)
        fault = faulty.proxy.fail(kind, WRITE, times=2, after=1 << 20)
        store.put("k", data)
        assert fault.fired == 2
        assert store.get("k") == data

    @pytest.mark.parametrize("kind", ["reset", "reset_down"])
    def test_reset_while_reading(self, faulty: Faulty, kind: Kind) -> None:
        store, data = faulty.open(hurry=10), os.urandom(2 << 20)
        faulty.open(direct=True).put("k", data)
        fault = faulty.proxy.fail(kind, READ, times=2, after=1 << 19)
        assert store.get("k") == data
        assert fault.fired == 2
        fault = faulty.proxy.fail(kind, READ, times=1, after=1 << 19)
        buffer = bytearray(1 << 20)
        parts = store.get_ranges("k", [(5, 5 + (1 << 20))], out=[memoryview(buffer)])
        assert bytes(parts[0]) == data[5 : 5 + (1 << 20)]
        assert fault.fired == 1

    @pytest.mark.parametrize("kind", ["stall", "stall_down"])
    def test_stalled_read_is_tried_again(self, faulty: Faulty, kind: Kind) -> None:
        store, data = faulty.open(deadline_s=1.0), os.urandom(100_000)
        faulty.open(direct=True).put("k", data)
        fault = faulty.proxy.fail(kind, READ, after=50_000)
        start = time.monotonic()
        assert store.get("k") == data
        assert fault.fired == 1
        assert time.monotonic() - start < IN_TIME_S

    @pytest.mark.parametrize("kind", ["stall", "stall_up"])
    def test_stalled_write_is_tried_again(self, faulty: Faulty, kind: Kind) -> None:
        store, data = faulty.open(deadline_s=1.0), os.urandom(100_000)
        fault = faulty.proxy.fail(kind, WRITE, after=50_000)
        start = time.monotonic()
        store.put("k", data)
        assert fault.fired == 1
        assert time.monotonic() - start < IN_TIME_S
        assert store.get("k") == data


class TestGivesUp:
    """What does not get better ends in our error, in time, and says which object it was."""

    def test_stalled_for_ever(self, faulty: Faulty) -> None:
        store = faulty.open(deadline_s=0.7, retry_s=1.5)
        faulty.proxy.fail("stall", times=math.inf)
        calls = [
            lambda: store.get("k"),
            lambda: store.put("k", b"x" * 100_000),
            lambda: store.list(""),
            lambda: store.get_ranges("k", [(0, 5)]),
            lambda: store.exists("k"),
        ]
        all_failing(calls, StoreError, "store.timeout")

    def test_throttled_for_ever(self, faulty: Faulty) -> None:
        store = faulty.open(retry_s=10.0, hurry=10)
        faulty.proxy.fail("status", times=math.inf, status=503)
        calls = [lambda: store.put("k", b"1"), lambda: store.create("k", b"1"), lambda: store.get("k")]
        all_failing(calls, StoreError, "store.throttled", "store.unavailable")

    def test_server_is_away(self, faulty: Faulty) -> None:
        store = faulty.open(retry_s=10.0, hurry=10)
        faulty.proxy.fail("reset", times=math.inf)
        calls = [lambda: store.put("k", b"1"), lambda: store.exists("k"), lambda: store.delete(["k"])]
        all_failing(calls, StoreError, "store.unavailable")

    def test_the_message_names_the_object(self, faulty: Faulty) -> None:
        store = faulty.open(retry_s=0.5)
        faulty.proxy.fail("reset", times=math.inf)
        assert f"{store.url}/some/key" in str(failing(lambda: store.get("some/key"), StoreError))
        assert faulty.prefix in store.url


class TestFlippedBits:
    """A damaged upload is never stored and accepted. (Downloads are checked by digests, above the store.)"""

    @pytest.mark.parametrize("after", [40_000, 1_500_000])
    def test_once(self, faulty: Faulty, after: int) -> None:
        store, data = faulty.open(), os.urandom(2 << 20)
        fault = faulty.proxy.fail("corrupt_up", WRITE, after=after)
        try:
            store.put("k", data)
        except GpumoveError as e:
            assert isinstance(e, IntegrityError)  # noqa: PT017 - either outcome is right
        else:
            assert faulty.open(direct=True).get("k") == data
        assert fault.fired == 1

    def test_every_time(self, faulty: Faulty) -> None:
        store = faulty.open(hurry=5)
        faulty.proxy.fail("corrupt_up", WRITE, after=40_000, times=math.inf)
        failing(lambda: store.put("k", os.urandom(100_000)), GpumoveError)

    def test_in_a_create(self, faulty: Faulty) -> None:
        store, data = faulty.open(), os.urandom(5000)
        fault = faulty.proxy.fail("corrupt_up", WRITE, after=2500)
        try:
            won = store.create("log/1", data)
        except GpumoveError:
            won = False
        assert fault.fired == 1
        assert won is (faulty.open(direct=True).exists("log/1") is not None and store.get("log/1") == data)
