"""What every store has to do: the seven verbs and the probe, on memory, files and the three clouds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gpumove.config import Config
from gpumove.errors import ConfigError, IntegrityError, ObjectNotFoundError, StoreError
from gpumove.store.objects import Buffer, Store
from tests.conftest import StoreAt
from tests.contract.conftest import failing
from tests.servers import Bucket

ODD_KEYS = (
    "with space/a b",
    "plus+and%41percent",
    "ünïcode/日本",
    "brackets[0]/star*/what?",
    "quote'\"/hash#/amp&=;",
    "at@colon:comma,(round){curly}",
    "tilde~/dollar$/caret^/bar|",
    ".hidden/..twodots/trailing.",
    "a" * 200 + "/" + "b" * 200,
)


class TestStoreContract:
    """One class for all back ends; a store that passes it can hold a run."""

    @pytest.mark.parametrize("nbytes", [0, 1, 70_000])
    def test_put_then_get(self, store: Store, nbytes: int) -> None:
        data = os.urandom(nbytes)
        store.put("a/b", data)
        assert store.get("a/b") == data

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_put_takes_every_buffer(self, store: Store, kind: Callable[[bytes], Buffer]) -> None:
        store.put("k", kind(b"some bytes"))
        assert store.get("k") == b"some bytes"

    def test_put_takes_a_list_of_buffers(self, store: Store) -> None:
        parts: list[Buffer] = [
            b"",
            os.urandom(5),
            bytearray(os.urandom(1 << 20)),
            b"",
            memoryview(os.urandom(300_001))[1:],
        ]
        store.put("parts", parts)
        assert store.get("parts") == b"".join(parts)
        store.put("none", [])
        assert store.get("none") == b""
        store.put("many", [bytes([i % 256]) for i in range(3000)])
        assert store.get("many") == bytes(i % 256 for i in range(3000))

    def test_put_of_a_pack(self, store: Store) -> None:
        parts = [os.urandom(4 << 20) for _ in range(9)]
        store.put("pack", parts)
        assert store.exists("pack").nbytes == 36 << 20  # type: ignore[union-attr]
        start = (8 << 20) - 7
        assert store.get_ranges("pack", [(start, start + 14)]) == [parts[1][-7:] + parts[2][:7]]
        assert store.get("pack") == b"".join(parts)

    def test_put_again_with_the_same_bytes(self, store: Store) -> None:
        store.put("k", b"same")
        store.put("k", b"same")
        assert store.get("k") == b"same"
        assert [info.key for info in store.list("")] == ["k"]

    def test_create(self, store: Store) -> None:
        assert store.create("log/1", b"mine")
        assert not store.create("log/1", b"another's")
        assert store.get("log/1") == b"mine"
        assert store.create("log/1", b"mine"), "our own bytes lie there: that is what True says"

    def test_create_after_put_and_after_delete(self, store: Store) -> None:
        store.put("k", b"first")
        assert not store.create("k", b"second")
        store.delete(["k"])
        assert store.create("k", b"third")
        assert store.get("k") == b"third"

    def test_create_race_of_threads_has_one_winner(self, store: Store) -> None:
        for round_ in range(3):
            key, claims = f"race/{round_}", [b"claim %d" % i for i in range(8)]
            with ThreadPoolExecutor(8) as pool:
                won = [claim for claim, is_ours in zip(claims, pool.map(store.create, [key] * 8, claims)) if is_ours]
            assert won == [store.get(key)]

    def test_probe_passes_and_leaves_nothing(self, store: Store) -> None:
        store.probe_create()
        assert store.list("") == []

    def test_missing_object(self, store: Store) -> None:
        assert store.exists("nothing") is None
        assert store.exists("nothing/below") is None
        failing(lambda: store.get("nothing"), ObjectNotFoundError, "store.not_found")
        failing(lambda: store.get_ranges("nothing", [(0, 1)]), ObjectNotFoundError, "store.not_found")
        store.put("dir/file", b"")
        assert store.exists("dir") is None
        failing(lambda: store.get("dir/other"), ObjectNotFoundError, "store.not_found")

    def test_exists_tells_size_and_time(self, store: Store) -> None:
        before = time.time()
        store.put("a/b", b"12345")
        info = store.exists("a/b")
        assert info is not None
        assert (info.key, info.nbytes) == ("a/b", 5)
        assert info.mtime is not None
        assert before - 2 <= info.mtime <= time.time() + 2  # clouds tell whole seconds

    def test_get_ranges(self, store: Store) -> None:
        data = os.urandom(100_000)
        store.put("k", data)
        ranges = [
            (0, 100_000),
            (0, 1),
            (99_999, 100_000),
            (10, 500),
            (400, 900),
            (400, 900),
            (7, 7),
            (100_000, 100_000),
        ]
        assert [bytes(part) for part in store.get_ranges("k", ranges)] == [data[a:b] for a, b in ranges]
        assert store.get_ranges("k", []) == []

    def test_get_ranges_into_buffers(self, store: Store) -> None:
        data = os.urandom(50_000)
        store.put("k", data)
        ranges = [(40_000, 50_000), (5, 5), (1, 30_000)]
        whole = bytearray(b"\xee" * sum(b - a for a, b in ranges))
        view, out = memoryview(whole), []
        for start, stop in ranges:
            out.append(view[: stop - start])
            view = view[stop - start :]
        found = store.get_ranges("k", ranges, out=out)
        assert [bytes(part) for part in found] == [data[a:b] for a, b in ranges]
        with pytest.raises(ConfigError):
            store.get_ranges("k", [(0, 4)], out=[memoryview(bytearray(5))])

    @pytest.mark.parametrize("beyond", [(0, 11), (9, 12), (10, 11), (5000, 6000)])
    def test_get_ranges_past_the_end(self, store: Store, beyond: tuple[int, int]) -> None:
        store.put("k", b"0123456789")
        failing(lambda: store.get_ranges("k", [(0, 4), beyond]), IntegrityError)
        failing(
            lambda: store.get_ranges("k", [beyond], out=[memoryview(bytearray(beyond[1] - beyond[0]))]), IntegrityError
        )

    def test_list(self, store: Store) -> None:
        assert store.list("") == []
        assert store.list("none/here") == []
        keys = ["a", "a/b/c", "a/b0", "a-b/x", "ab", "b/1", "b/10", "b/2", "B/1"]
        if store.url.startswith(("file:", "memory:")):  # there no name is a file and a directory, and no run needs it
            keys.remove("a")
        for i, key in enumerate(keys):
            store.put(key, b"x" * i)
        found = store.list("")
        assert [(info.key, info.nbytes) for info in found] == sorted((key, i) for i, key in enumerate(keys))
        for prefix in ("a", "a/"):
            assert [info.key for info in store.list(prefix)] == ["a/b/c", "a/b0"]
        assert [info.key for info in store.list("b")] == ["b/1", "b/10", "b/2"]
        assert [info.key for info in store.list("a/b")] == ["a/b/c"]
        assert store.list("nothing") == []

    def test_list_sees_what_another_has_just_written(self, store: Store, store_url: StoreAt) -> None:
        assert store.list("log") == []
        url, options = store_url
        other = Store.open(url, Config(), options=options)
        other.put("log/1", b"")
        assert [info.key for info in store.list("log")] == ["log/1"]
        assert store.exists("log/1")
        other.delete(["log/1"])
        assert store.list("log") == []
        assert store.exists("log/1") is None
        other.close()

    def test_delete(self, store: Store) -> None:
        keys = [f"d/{i}" for i in range(5)]
        for key in keys:
            store.put(key, b"1")
        store.delete([])
        store.delete([keys[0], "d/missing", "nowhere/at/all", keys[2]])
        assert [info.key for info in store.list("d")] == [keys[1], keys[3], keys[4]]
        store.delete(keys)
        store.delete(keys)
        assert store.list("") == []

    def test_odd_but_legal_keys(self, store: Store) -> None:
        for key in ODD_KEYS:
            store.put(key, key.encode())
        assert [info.key for info in store.list("")] == sorted(ODD_KEYS)
        for key in ODD_KEYS:
            assert store.get(key) == key.encode()
            assert store.exists(key).key == key  # type: ignore[union-attr]
            assert bytes(store.get_ranges(key, [(1, 3)])[0]) == key.encode()[1:3]
            assert not store.create(key, b"other")
        store.delete(ODD_KEYS[::2])
        assert [info.key for info in store.list("")] == sorted(ODD_KEYS[1::2])

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "a/../b", ".", "a\0b"])
    def test_keys_that_are_none(self, store: Store, key: str) -> None:
        for call in (lambda: store.put(key, b""), lambda: store.create(key, b""), lambda: store.get(key)):
            failing(call, ConfigError)

    def test_verbs_from_many_threads(self, store: Store) -> None:
        def work(i: int) -> bool:
            store.put(f"t/{i}", b"%d" % i)
            return store.get(f"t/{i}") == b"%d" % i and store.exists(f"t/{i}") is not None

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(work, range(48)))
        assert len(store.list("t")) == 48

    def test_closed(self, store: Store) -> None:
        store.close()
        failing(lambda: store.get("k"), StoreError)


def _fill(store: Store, keys: Iterable[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), keys))


def _many(url: str, options: object, count: int) -> None:
    """More objects than one page of a listing, and than one call deletes."""
    store = Store.open(url, Config(), options=options)  # type: ignore[arg-type]
    keys = [f"many/{i:05}" for i in range(count)]
    _fill(store, keys)
    assert [info.key for info in store.list("many")] == keys
    store.delete(keys)
    assert store.list("") == []
    store.close()


def test_more_than_a_page(gcs_server: Bucket) -> None:
    _many(f"{gcs_server.url}/pages", gcs_server.options, 1100)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("store_url", "count"), [("file", 1100), ("s3", 2100), ("abfs", 5100)], indirect=["store_url"])
def test_more_than_a_page_elsewhere(store_url: StoreAt, count: int) -> None:
    _many(*store_url, count)  # S3 lists and deletes 1000 at a time, Azure lists 5000


@pytest.mark.slow
def test_put_of_a_large_object(store: Store) -> None:
    parts = [os.urandom(32 << 20) for _ in range(5)]
    store.put("large", parts)
    assert store.get("large") == b"".join(parts)


def test_closing_where_an_event_loop_runs_breaks_nothing(store_url: StoreAt) -> None:
    """As a notebook's does in the thread of its cells: a session belongs to the loop of its package."""
    url, options = store_url
    wrong: list[dict[str, Any]] = []

    async def cell() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: wrong.append(context))
        for _ in range(3):
            with contextlib.closing(Store.open(url, Config(), options=options)) as store:
                store.put("k", b"some bytes")
            gc.collect()
            await asyncio.sleep(0.05)

    asyncio.run(cell())
    gc.collect()
    assert wrong == []
