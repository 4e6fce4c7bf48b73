"""The copier: every byte arrives or an error says which does not, within its memory and its rate; on real servers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumove.config import Config
from gpumove.errors import IntegrityError, ObjectNotFoundError, StoreError
from gpumove.format.codec import digest
from gpumove.move.copier import Copier, Object
from gpumove.move.lending import Lender
from gpumove.move.pace import RANGE, Rate
from gpumove.store.objects import Store
from tests.conftest import fresh_place
from tests.move.runs import Place, memory
from tests.servers import Bucket
from tests.servers.proxy import Proxy

MIB = 1 << 20
CONFIG = Config(concurrency=16, retry_s=30.0)
PAIRS = [("s3", "gs"), ("gs", "abfs"), ("abfs", "file"), ("file", "s3")]


def fill(store: Store, sizes: list[int]) -> list[Object]:
    """Random objects of these sizes."""
    made = []
    for number, nbytes in enumerate(sizes):
        data = os.urandom(nbytes)
        made.append(Object(f"packs/{number:03d}", nbytes, digest(data)))
        store.put(made[-1].key, data)
    return made


def held(store: Store, objects: list[Object]) -> bool:
    return all(digest(store.get(o.key)) == o.digest for o in objects)


@pytest.fixture
def ends() -> Iterator[tuple[Store, Store]]:
    """Two stores in memory."""
    with memory().open(CONFIG) as source, memory().open(CONFIG) as target:
        yield source, target


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_between_real_stores(request: pytest.FixtureRequest, tmp_path: Path, here: str, there: str) -> None:
    with (
        Place(*fresh_place(request, here, tmp_path)).open(CONFIG) as source,
        Place(*fresh_place(request, there, tmp_path)).open(CONFIG) as target,
    ):
        made = fill(source, [0, 1, 700, 100_000, RANGE, RANGE + 1, 2 * RANGE + 12345, *[300_000] * 20])
        copier = Copier(source, target, in_flight=8, budget_bytes=64 * MIB)
        seen: list[tuple[int, int]] = []
        done: dict[str, str] = {}
        sent = copier.copy(
            made, progress=lambda now, total: seen.append((now, total)), done=lambda o, name: done.update({o.key: name})
        )
        total = sum(o.nbytes for o in made)
        assert (sent.nbytes, sent.objects) == (total, len(made))
        assert sent.seconds > 0
        assert seen == sorted(seen)
        assert seen[-1] == (total, total)
        assert done == {o.key: o.digest for o in made}
        assert held(target, made)
        assert copier.damaged(made) == []
        assert copier.rate.bytes_s
        assert copier.lender.peak_bytes <= 64 * MIB


@pytest.fixture(params=["s3", "gs", "abfs"])
def behind(request: pytest.FixtureRequest) -> Iterator[tuple[Bucket, Proxy]]:
    """A cloud's bucket and a proxy in front of it."""
    bucket: Bucket = request.getfixturevalue(
        {"s3": "s3_server", "gs": "gcs_server", "abfs": "azure_server"}[request.param]
    )
    with Proxy(bucket.endpoint) as proxy:
        yield bucket, proxy


def prefix(bucket: Bucket, request: pytest.FixtureRequest) -> Place:
    return Place(f"{bucket.url}/{request.node.name.replace('[', '-').replace(']', '')}", bucket.options)


def test_a_flipped_bit_on_the_way_from_the_source_is_found_and_read_again(
    behind: tuple[Bucket, Proxy], request: pytest.FixtureRequest
) -> None:
    bucket, proxy = behind
    place = prefix(bucket, request)
    with place.open(CONFIG) as direct, memory().open(CONFIG) as target:
        made = fill(direct, [RANGE + 5000, 70_000])
        with Place(place.url, bucket.via(proxy.endpoint).options).open(CONFIG) as source:
            fault = proxy.fail("corrupt_down", r"^GET .*00[01]", times=2, after=300)
            Copier(source, target, in_flight=1).copy(made)
            assert fault.fired == 2
            assert held(target, made)


def test_what_is_never_read_right_is_named_and_never_written(
    behind: tuple[Bucket, Proxy], request: pytest.FixtureRequest
) -> None:
    bucket, proxy = behind
    place = prefix(bucket, request)
    with place.open(CONFIG) as direct, memory().open(CONFIG) as target:
        made = fill(direct, [50_000, 60_000])
        with Place(place.url, bucket.via(proxy.endpoint).options).open(CONFIG) as source:
            fault = proxy.fail("corrupt_down", r"^GET .*001", times=99, after=9)
            with pytest.raises(IntegrityError, match=r"packs/001 is damaged"):
                Copier(source, target, in_flight=1).copy(made)
            assert fault.fired == 3
        assert [info.key for info in target.list("")] == ["packs/000"]


def test_a_flipped_bit_on_the_way_to_the_target_is_refused_there_and_sent_again(
    behind: tuple[Bucket, Proxy], request: pytest.FixtureRequest
) -> None:
    bucket, proxy = behind
    place = prefix(bucket, request)
    with memory().open(CONFIG) as source, place.open(CONFIG) as direct:
        made = fill(source, [RANGE + 5000, 70_000])
        with Place(place.url, bucket.via(proxy.endpoint).options).open(CONFIG) as target:
            fault = proxy.fail("corrupt_up", r"^(PUT|POST) ", times=1, skip=1, after=2000)
            Copier(source, target, in_flight=1).copy(made)
            assert fault.fired == 1
        assert held(direct, made)


def test_a_lost_connection_at_either_end_is_no_matter(
    behind: tuple[Bucket, Proxy], request: pytest.FixtureRequest
) -> None:
    bucket, proxy = behind
    place = prefix(bucket, request)
    via = Place(place.url, bucket.via(proxy.endpoint).options)
    with memory().open(CONFIG) as one, via.open(CONFIG) as middle, memory().open(CONFIG) as other:
        made = fill(one, [400_000] * 6)
        up = proxy.fail("reset_up", r"^(PUT|POST) ", times=2, after=100_000)
        Copier(one, middle, in_flight=3).copy(made)
        down = proxy.fail("reset_down", r"^GET .*00", times=2, after=100_000)
        Copier(middle, other, in_flight=3).copy(made)
        assert (up.fired, down.fired) == (2, 2)
        assert held(other, made)


# -------------------------------------------------------------------- bounds


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_the_rate_stays_below_its_bound_and_near_it(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    with Place(*fresh_place(request, kind, tmp_path)).open(CONFIG) as source, memory().open(CONFIG) as target:
        made = fill(source, [2_000_000] * 6 + [400_000] * 10)
        with memory().open(CONFIG) as other:
            freely = Copier(source, other, in_flight=8).copy(made)
        copier = Copier(source, target, in_flight=8, limit_bytes_s=8e6)
        sent = copier.copy(made)
        assert 1.75 < sent.seconds < 4.0 + 2 * freely.seconds, "16 MB at 8 MB/s"
        assert sent.nbytes / sent.seconds == pytest.approx(copier.rate.bytes_s, rel=0.1)
        assert held(target, made)


def test_memory_stays_within_the_budget_and_larger_objects_go_through_a_file(ends: tuple[Store, Store]) -> None:
    source, target = ends
    made = fill(source, [3 * MIB, *[MIB] * 24, 9 * MIB, 5 * MIB])
    copier = Copier(source, target, in_flight=16, budget_bytes=6 * MIB)
    copier.copy(made)
    assert held(target, made)
    assert 3 * MIB < copier.lender.peak_bytes <= 6 * MIB


def test_what_is_lent_twice_is_two_things_and_what_a_hung_call_may_hold_is_never_lent_again() -> None:
    lender = Lender(4 * MIB)
    never = lambda: False  # noqa: E731
    one, two = lender.lend(MIB, never), lender.lend(MIB, never)
    assert one is not None
    assert two is not None
    assert one.obj is not two.obj
    kept, lost = one.obj, two.obj
    lender.take_back(one, again=True)
    lender.take_back(two, again=False)
    third, fourth = lender.lend(MIB, never), lender.lend(MIB, never)
    assert third is not None
    assert fourth is not None
    assert third.obj is kept
    assert fourth.obj is not lost
    lender.take_back(third, again=True)
    lender.take_back(fourth, again=True)
    large = lender.lend(4 * MIB, never)  # what was kept makes room
    assert large is not None
    assert lender.peak_bytes == 4 * MIB
    assert lender.lend(1, lambda: True) is None
    lender.take_back(large, again=False)
    whole = lender.lend(9 * MIB, never)  # larger than all of it: alone
    assert whole is not None
    waiter = threading.Thread(target=lambda: lender.lend(1, never), daemon=True)
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive()
    lender.take_back(whole, again=False)
    waiter.join(5)
    assert not waiter.is_alive()


def test_giving_up_takes_no_longer_than_a_call_needs_to_notice(
    s3_server: Bucket, request: pytest.FixtureRequest
) -> None:
    place = prefix(s3_server, request)
    with place.open(CONFIG) as direct, memory().open(CONFIG) as target, Proxy(s3_server.endpoint) as proxy:
        made = fill(direct, [100_000] * 8)
        with Place(place.url, s3_server.via(proxy.endpoint).options).open(CONFIG) as source:
            proxy.fail("stall", r"^GET .*005", times=99)
            copier = Copier(source, target, in_flight=4)
            timer = threading.Timer(1.0, copier.cancelled.set)
            timer.start()
            began = time.monotonic()
            with pytest.raises(StoreError) as caught:
                copier.copy(made)
            assert caught.value.code == "store.abandoned"
            assert time.monotonic() - began < 10  # a call may take a minute
            with pytest.raises(StoreError):
                copier.copy(made[:1])


def test_the_first_error_ends_the_rest(ends: tuple[Store, Store]) -> None:
    source, target = ends
    made = fill(source, [10_000] * 50)
    source.delete([made[3].key])
    copier = Copier(source, target, in_flight=1)
    with pytest.raises(ObjectNotFoundError, match="packs/003"):
        copier.copy(made)
    assert len(target.list("")) == 3


# -------------------------------------------------------------------- without a digest


def test_without_a_digest_what_is_read_is_what_is_written_and_its_digest_is_told(ends: tuple[Store, Store]) -> None:
    source, target = ends
    made = fill(source, [0, 5000, RANGE + 5])
    told: dict[str, str] = {}
    plain = [Object(info.key, info.nbytes, None, info.mtime) for info in source.list("")]
    sent = Copier(source, target).copy(plain, done=lambda o, name: told.update({o.key: name}))
    assert told == {o.key: o.digest for o in made}
    assert sent.objects == 3
    known = [o._replace(known=told[o.key]) for o in plain]
    target.delete([o.key for o in plain])
    sent = Copier(source, target).copy(known)
    assert (sent.nbytes, sent.objects) == (0, 0)
    assert target.list("") == []


def test_what_the_source_lost_or_changed_meanwhile_is_told_and_the_rest_copied(ends: tuple[Store, Store]) -> None:
    source, target = ends
    fill(source, [5000, 6000, RANGE + 5, RANGE + 6])
    plain = [Object(info.key, info.nbytes, None, info.mtime) for info in source.list("")]
    source.delete(["packs/000"])
    time.sleep(0.01)
    source.put("packs/002", os.urandom(RANGE + 5))
    lost: list[tuple[str, str]] = []
    sent = Copier(source, target).copy(plain, lost=lambda o, error: lost.append((o.key, error.code)))
    assert sorted(lost) == [("packs/000", "store.not_found"), ("packs/002", "store.changed")]
    assert sent.objects == 2
    assert [info.key for info in target.list("")] == ["packs/001", "packs/003"]


# -------------------------------------------------------------------- the rate


def test_the_rate_counts_only_the_time_in_which_something_was_under_way() -> None:
    now = [100.0]
    rate = Rate(lambda: now[0])
    assert rate.bytes_s is None
    for _ in range(3):
        with rate.running():
            now[0] += 2.0
            rate.add(1000)
        now[0] += 500.0
    assert rate.bytes_s == 500.0


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    now = [0.0]
    rate = Rate(lambda: now[0])
    with rate.running():
        for nbytes in (1_000_000, 10):
            for _ in range(60):
                now[0] += 1.0
                rate.add(nbytes)
        assert rate.bytes_s == pytest.approx(10, rel=0.1)


def test_objects_that_share_a_link_do_not_make_it_look_slow() -> None:
    """Four arrive one after the other, at the end of the time that all of them took."""
    now = [0.0]
    rate = Rate(lambda: now[0])
    assert rate.most_bytes_s is None
    with rate.running(), contextlib.ExitStack() as under_way:
        for _ in range(4):
            under_way.enter_context(rate.moving(100))
        now[0] = 8.0
        assert rate.bytes_s is None
        assert rate.most_bytes_s == pytest.approx(50.0)
        with rate.moving(100):
            now[0] = 10.0
            rate.add(100)
        assert rate.bytes_s == pytest.approx(10.0), "four fifths of what was sent have not arrived"
        assert rate.most_bytes_s == pytest.approx(50.0)
    for _ in range(4):
        rate.add(100)
    assert rate.most_bytes_s == rate.bytes_s == pytest.approx(50.0)
