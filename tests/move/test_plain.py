"""Any prefix: all of it arrives, nothing is sent twice, and a run is never copied that way."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from gpumove.errors import ConfigError, IntegrityError
from gpumove.move import plain
from gpumove.move.copier import Copier
from gpumove.move.pace import RANGE
from gpumove.move.plain import Plain
from gpumove.store.objects import ObjectInfo, Store
from tests.conftest import fresh_place
from tests.move.runs import Place, memory, replicate, train
from tests.store.faults import Crash, FaultyStore

NAMES = ["a.bin", "deep/er/b.txt", "deep/c", "empty"]


@pytest.fixture
def ends() -> tuple[Place, Place]:
    source = memory()
    with source.open() as store:
        for name in NAMES:
            store.put(name, b"" if name == "empty" else os.urandom(5000))
    return source, memory()


def data(place: Place) -> dict[str, bytes]:
    with place.open() as store:
        return {key: store.get(key) for key in place.keys() if not key.startswith(".gpumove-ledger/")}  # noqa: SIM118


def put(place: Place, key: str, content: bytes) -> None:
    time.sleep(0.01)  # another time than before
    with place.open() as store:
        store.put(key, content)


def test_all_of_it_arrives_and_a_second_time_nothing_is_read_or_sent(ends: tuple[Place, Place]) -> None:
    source, target = ends
    first = replicate(source, target)
    assert (first.run, first.objects, first.nbytes, first.problems) == ("", 4, 15_000, ())
    assert data(target) == data(source)
    before = target.keys()
    with source.open() as there, target.open() as here:
        faulty = FaultyStore(there)
        again = Plain(Copier(faulty, here)).copy()  # type: ignore[arg-type]
    assert (again.sent.objects, again.sent.nbytes) == (0, 0)
    assert [call for call in faulty.trail if not call.startswith("list")] == []
    assert target.keys() == before


def test_what_is_new_or_has_changed_is_sent_and_what_is_gone_stays(ends: tuple[Place, Place]) -> None:
    source, target = ends
    replicate(source, target)
    put(source, "new", b"new")
    put(source, "deep/c", b"another")
    with source.open() as store:
        gone = store.get("a.bin")
        store.delete(["a.bin"])
    done = replicate(source, target)
    assert (done.objects, done.nbytes) == (2, 10)
    assert data(target) == {**data(source), "a.bin": gone}
    assert replicate(source, target).objects == 0


def test_the_same_bytes_of_another_time_are_read_and_not_sent(ends: tuple[Place, Place]) -> None:
    source, target = ends
    replicate(source, target)
    put(source, "a.bin", data(source)["a.bin"])
    done = replicate(source, target)
    assert (done.objects, done.nbytes) == (0, 0)
    with source.open() as there, target.open() as here:
        faulty = FaultyStore(there)
        Plain(Copier(faulty, here)).copy()  # type: ignore[arg-type]
    assert not any(call.startswith("get") for call in faulty.trail)  # the ledger has learned the new time


@pytest.mark.parametrize("how", ["gone", "cut", "rotten"])
def test_what_the_target_lost_is_sent_again(ends: tuple[Place, Place], how: str) -> None:
    source, target = ends
    replicate(source, target)
    before = data(target)["a.bin"]
    with target.open() as store:
        if how == "gone":
            store.delete(["a.bin"])
        else:
            store.put("a.bin", before[:-1] if how == "cut" else b"x" + before[1:])
    assert replicate(source, target, deep=how == "rotten").objects == 1
    assert data(target) == data(source)


def test_a_damaged_page_of_the_ledger_costs_work_and_nothing_else(
    ends: tuple[Place, Place], caplog: pytest.LogCaptureFixture
) -> None:
    source, target = ends
    replicate(source, target)
    (page,) = target.keys(".gpumove-ledger")
    put(target, page, b'[["a.bin",5000,1.0,"00"]]')
    assert replicate(source, target).objects == 4
    assert "is copied again" in caplog.text
    assert data(target) == data(source)


def test_many_pages_become_few_and_the_newest_line_counts(
    ends: tuple[Place, Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = ends
    monkeypatch.setattr(plain, "_PAGE_LINES", 1)
    monkeypatch.setattr(plain, "_MANY_PAGES", 3)
    for number in range(4):
        put(source, "a.bin", bytes([number]))
        replicate(source, target)
        assert len(target.keys(".gpumove-ledger")) <= 2 * len(NAMES) + 1
    assert replicate(source, target).objects == 0
    assert data(target)["a.bin"] == b"\x03"


@pytest.mark.parametrize("at", range(1, 14))
def test_after_a_crash_only_what_the_ledger_does_not_know_is_sent_again(
    ends: tuple[Place, Place], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "_PAGE_LINES", 1)
    source, target = ends
    with source.open() as there, target.open() as here:
        faulty, again = FaultyStore(here, at=at), FaultyStore(here)
        try:
            Plain(Copier(there, faulty, in_flight=1)).copy()  # type: ignore[arg-type]
        except Crash:
            assert faulty.calls == at
        Plain(Copier(there, again, in_flight=1)).copy()  # type: ignore[arg-type]
        assert data(target) == data(source)
        puts = [
            call for one in (faulty, again) for call in one.trail if call.startswith("put") and "ledger" not in call
        ]
        assert len(puts) <= len(NAMES) + 1


def test_what_vanishes_or_has_a_name_that_is_none_is_said_and_the_rest_copied(ends: tuple[Place, Place]) -> None:
    source, target = ends

    class Listed(FaultyStore):
        def list(self, prefix: str) -> list[ObjectInfo]:
            return [*super().list(prefix), ObjectInfo("ghost", 5, 1.0), ObjectInfo("x//y", 5, 1.0)]

    with source.open() as there, target.open() as here:
        done = Plain(Copier(Listed(there), here)).copy()  # type: ignore[arg-type]
    assert done.sent.objects == 4
    assert sorted(problem.split()[0] for problem in done.problems) == ["'x//y'", f"{source.url}/ghost"]
    assert data(target) == data(source)


def test_large_objects_go_through_ranges(ends: tuple[Place, Place]) -> None:
    source, target = ends
    put(source, "large", os.urandom(RANGE + 77))
    assert replicate(source, target).objects == 5
    assert data(target) == data(source)


def test_a_run_is_not_copied_as_a_prefix_nor_over_one(ends: tuple[Place, Place]) -> None:
    source, target = ends
    run = Place(source.url + "/runs/one")
    train(run, 1)
    with pytest.raises(ConfigError, match="runs/one/ is a run of gpumove") as caught:
        replicate(source, target)
    assert caught.value.code == "config.run_inside"
    assert target.keys() == {}
    with pytest.raises(ConfigError, match="holds a run of gpumove"):
        replicate(memory_of(b"data"), run)


def test_a_run_without_its_format_is_no_prefix_and_a_format_of_others_makes_no_run(ends: tuple[Place, Place]) -> None:
    source, target = ends
    put(source, "format.json", b'{"format": "webdataset"}')
    for sent in (5, 0):
        assert replicate(source, target).objects == sent
    run = memory()
    train(run, 1)
    with run.open() as store:
        store.delete(["format.json"])
    with pytest.raises(ConfigError) as caught:
        replicate(run, memory())
    assert caught.value.code == "config.run_inside"
    put(run, "format.json", b"rot")
    with pytest.raises(IntegrityError):
        replicate(run, memory())
    with pytest.raises(IntegrityError):
        replicate(source, run)


def memory_of(content: bytes) -> Place:
    place = memory()
    put(place, "object", content)
    return place


@pytest.mark.parametrize(("here", "there"), [("s3", "gs"), ("gs", "abfs"), ("file", "s3")])
def test_between_real_stores(request: pytest.FixtureRequest, tmp_path: Any, here: str, there: str) -> None:
    source, target = Place(*fresh_place(request, here, tmp_path)), Place(*fresh_place(request, there, tmp_path))
    contents = {f"shards/{n:03d}.tar": os.urandom(1 + 150_000 * n) for n in range(6)}
    with source.open() as store:
        fill(store, contents)
    first = replicate(source, target)
    assert (first.objects, first.problems) == (6, ())
    assert data(target) == contents
    assert replicate(source, target).objects == 0
    assert replicate(source, target, deep=True).objects == 0


def fill(store: Store, contents: dict[str, bytes]) -> None:
    for key, content in contents.items():
        store.put(key, content)
