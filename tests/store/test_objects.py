"""The store without a network: memory, files, and back ends that fail on purpose under a clock of our own."""

from __future__ import annotations

import errno
import os
import random
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpumove.config import Config
from gpumove.errors import ConfigError, IntegrityError, ObjectNotFoundError, StoreError
from gpumove.store import retry
from gpumove.store.address import Address, Scrubber, parse
from gpumove.store.backends import Backend, MemoryBackend
from gpumove.store.clouds import Gather, RefusedError, judge_answer
from gpumove.store.files import TEMP_SUFFIX, FileBackend, is_temporary
from gpumove.store.objects import Store
from tests.store.faults import Crash, FaultyStore

QUICK = Config(concurrency=4, deadline_s=5.0, retry_s=30.0)


class Ticking:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds

    def clock(self, chance: float = 1.0) -> retry.Clock:
        return retry.Clock(lambda: self.time, self.sleep, lambda: chance)


class Failing:
    """A back end whose calls first raise what they are given, before or after doing their work."""

    def __init__(self, inner: Backend, verb: str, failures: list[Exception], *, after: bool = False) -> None:
        self._inner, self._verb, self._after = inner, verb, after
        self.failures = failures
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name != self._verb:
            return found

        def call(*args: Any) -> Any:
            self.calls += 1
            if self.failures and self._after:
                found(*args)
            if self.failures:
                raise self.failures.pop(0)
            return found(*args)

        return call


def failing(verb: str, failures: list[Exception], *, after: bool = False, config: Config = QUICK) -> Any:
    """A memory store with a failing verb, and its clock."""
    ticking = Ticking()
    inner = MemoryBackend(parse(f"memory://failing-{random.random()}"))
    backend: Any = Failing(inner, verb, failures, after=after)
    return Store("memory://failing", config, lambda: backend, clock=ticking.clock()), backend, ticking


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    url = f"memory://{tmp_path}" if request.param == "memory" else str(tmp_path / "not" / "yet")
    opened = Store.open(url, QUICK)
    yield opened
    opened.close()


# --- the seven verbs ---


def test_round_trip(store: Store) -> None:
    store.put("packs/1/a", [b"abc", bytearray(b"def"), memoryview(b"ghi")])
    store.put("packs/1/a", b"abcdefghi")  # the same bytes again, as a retry does
    store.put("empty", [])
    assert store.get("packs/1/a") == b"abcdefghi"
    assert store.get("empty") == b""
    info = store.exists("packs/1/a")
    assert info is not None
    assert (info.key, info.nbytes) == ("packs/1/a", 9)
    assert abs((info.mtime or 0) - time.time()) < 60
    assert store.exists("packs/1") is None
    assert store.exists("packs/1/a/b") is None
    with pytest.raises(ObjectNotFoundError, match=r"packs/2 does not exist"):
        store.get("packs/2")


def test_gather_writes_many_odd_buffers(store: Store) -> None:
    blobs = [os.urandom(n) for n in [0, 1, 70_000, 3] * 700]
    wide = memoryview(bytes(range(256)) * 4).cast("I")  # items of four bytes
    store.put("many", [*blobs, wide])
    assert store.get("many") == b"".join(blobs) + wide.tobytes()


def test_ranges(store: Store) -> None:
    data = os.urandom(100_000)
    store.put("p", data)
    spans = [(0, 10), (5, 5), (99_990, 100_000), (10, 60_000)]
    assert [bytes(r) for r in store.get_ranges("p", spans)] == [data[a:b] for a, b in spans]
    out = [memoryview(bytearray(b - a)) for a, b in spans]
    assert [bytes(r) for r in store.get_ranges("p", spans, out)] == [data[a:b] for a, b in spans]
    assert bytes(out[3]) == data[10:60_000]
    assert store.get_ranges("p", []) == []
    with pytest.raises(ConfigError, match="sizes of the ranges"):
        store.get_ranges("p", [(0, 10)], [memoryview(bytearray(9))])
    with pytest.raises(ConfigError, match="half-open"):
        store.get_ranges("p", [(3, 2)])
    with pytest.raises(ObjectNotFoundError):
        store.get_ranges("q", [(0, 1)])


def test_a_truncated_object_is_told_with_its_sizes(store: Store) -> None:
    store.put("p", b"x" * 50)
    with pytest.raises(IntegrityError, match=r"/p is truncated: bytes up to 80 were expected, but it has 50") as e:
        store.get_ranges("p", [(0, 40), (40, 80)])
    assert e.value.code == "integrity.truncated"


def test_create_is_exclusive_and_tells_whose_bytes_lie_there(store: Store) -> None:
    assert store.create("log/1", b"mine")
    assert store.create("log/1", b"mine")  # our own, found by reading back
    assert not store.create("log/1", b"theirs")
    assert store.get("log/1") == b"mine"


def test_races_have_one_winner(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        for n in range(20):
            won = list(pool.map(lambda i, n=n: store.create(f"log/{n}", b"%d" % i), range(8)))
            assert sum(won) == 1
            assert store.get(f"log/{n}") == b"%d" % won.index(True)
    store.probe_create()
    assert store.list("probe") == []


def test_list_is_recursive_sorted_and_by_directory(store: Store) -> None:
    for key in ("log/2", "log/1", "log/a/b/c", "logs/1", "x"):
        store.put(key, b"1")
    assert [i.key for i in store.list("log")] == ["log/1", "log/2", "log/a/b/c"] == [i.key for i in store.list("log/")]
    assert [i.key for i in store.list("")] == ["log/1", "log/2", "log/a/b/c", "logs/1", "x"]
    assert store.list("nothing/here") == []
    store.delete(["log/1", "log/2", "log/a/b/c", "missing", "also/missing"])
    store.delete([])
    assert [i.key for i in store.list("")] == ["logs/1", "x"]


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/./b", "a\0b", "a\\b"])
def test_keys_cannot_leave_the_root(store: Store, key: str) -> None:
    for call in (lambda: store.put(key, b""), lambda: store.get(key), lambda: store.delete([key])):
        with pytest.raises(ConfigError, match="is no key"):
            call()


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path), QUICK)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.get("a")


# --- files ---


def test_files_leave_no_temporaries_and_no_empty_directories(tmp_path: Path) -> None:
    store = Store.open(f"file://{tmp_path}/run", QUICK)
    assert store.url == f"file://{tmp_path}/run"
    store.put("packs/1/a", b"1")
    store.create("log/1", b"1")
    store.create("log/1", b"2")
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert sorted(p.name for p in files) == ["1", "a"]
    store.delete(["packs/1/a", "log/1"])
    assert list((tmp_path / "run").rglob("*")) == []
    leftover = tmp_path / "run" / f".x{TEMP_SUFFIX}"
    leftover.write_bytes(b"half")
    assert is_temporary(str(leftover))
    assert store.list("") == []


def test_a_file_system_without_hard_links_cannot_hold_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store = Store.open(str(tmp_path), QUICK)
    for call in (lambda: store.create("log/1", b"1"), store.probe_create):
        with pytest.raises(StoreError, match="no hard links") as e:
            call()
        assert e.value.code == "store.no_create_only"
    assert store.list("") == []
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def calls_end() -> None:
    """Wait for the calls that were left behind."""
    for thread in threading.enumerate():
        if thread.name == "gpumove-store":
            thread.join(20)


def test_a_hung_mount_is_left_behind_and_publishes_nothing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, real = threading.Event(), os.fsync

    def hang(fd: int) -> None:
        release.wait(20)
        real(fd)

    monkeypatch.setattr(os, "fsync", hang)
    store = Store.open(str(tmp_path), Config(deadline_s=0.2, retry_s=0.3))
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"put file://.*/a failed.*raise deadline_s") as e:
        store.put("a", bytearray(b"the buffer is reused later"))
    assert e.value.code == "store.timeout"
    assert time.monotonic() - begin < 15  # it hangs for 20
    release.set()
    calls_end()
    assert list(tmp_path.iterdir()) == []


def test_a_hung_read_never_gets_the_callers_buffer_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, real, hung = threading.Event(), os.preadv, []

    def hang_once(fd: int, views: list[memoryview], offset: int) -> int:
        if not hung:
            hung.append(views[0])
            release.wait(20)
            views[0][:] = b"?" * len(views[0])
            return len(views[0])
        return real(fd, views, offset)

    store = Store.open(str(tmp_path), Config(deadline_s=0.3, retry_s=10))
    store.put("a", b"0123456789")
    monkeypatch.setattr(os, "preadv", hang_once)
    buffer = bytearray(10)
    (result,) = store.get_ranges("a", [(0, 10)], [memoryview(buffer)])
    release.set()
    calls_end()
    assert bytes(result) == b"0123456789"
    assert bytes(buffer) == b"?" * 10


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "store.no_space"), (errno.EDQUOT, "store.quota"), (errno.EROFS, "store.read_only")],
)
def test_full_disks_are_waited_for_a_short_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def full(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "writev", full)
    ticking = Ticking()
    store = Store.open(str(tmp_path), Config(), clock=ticking.clock())
    with pytest.raises(StoreError, match=os.strerror(number)) as e:
        store.put("a/b", b"1")
    assert e.value.code == code
    assert sum(ticking.slept) < 60
    assert (len(ticking.slept) > 0) == (number != errno.EROFS)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_forbidden_directory_is_denied_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="permissions of the directory") as e:
        Store.open(str(tmp_path / "run"), QUICK).put("a", b"1")
    assert e.value.code == "store.denied"


def test_a_process_killed_while_it_writes_leaves_no_partial_object(tmp_path: Path) -> None:
    code = (
        "import sys, itertools; from gpumove.store.objects import Store; from gpumove.config import Config\n"
        "s = Store.open(sys.argv[1], Config())\n"
        "for i in itertools.count():\n"
        "    s.put(f'p/{i % 50}', bytes([i % 50]) * 300_000); s.create(f'l/{i}', b'x' * 3000)\n"
        "    i or print('both are there', flush=True)"
    )
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline()
        time.sleep(random.uniform(0.05, 0.2))
        child.kill()
        child.wait()
        child.stdout.close()
    store = Store.open(str(tmp_path), QUICK)
    sizes = {i.key.split("/")[0]: set() for i in store.list("")}
    for info in store.list(""):
        sizes[info.key.split("/")[0]].add(info.nbytes)
    assert sizes == {"p": {300_000}, "l": {3000}}


# --- retries ---


def test_transient_failures_are_retried_with_growing_waits_until_the_bound() -> None:
    store, _, ticking = failing("put", [ConnectionResetError("reset")] * 5)
    store.put("a", b"1")
    assert ticking.slept == [0.25, 0.5, 1.0, 2.0, 4.0]
    store, _, ticking = failing("put", [ConnectionResetError("reset")] * 100)
    with pytest.raises(StoreError, match=r"put memory://failing/a failed, tried 7 times in \d+ s: Conn.*: reset") as e:
        store.put("a", b"1")
    assert e.value.code == "store.unavailable"
    assert sum(ticking.slept) < QUICK.retry_s
    short: list[Exception] = [*[ConnectionResetError("reset")] * 6, TimeoutError("no answer")]
    store, _, _ = failing("put", short, config=Config(deadline_s=60, retry_s=30))
    with pytest.raises(StoreError, match=r"tried 7 times in \d+ s: Conn.*: reset"):  # the last call had no minute
        store.put("a", b"1")
    assert max(retry.wait_s(retry.FLAKY, n, 1.0) for n in range(1, 2000)) == 20.0
    assert retry.wait_s(retry.FLAKY, 9, 0.0) == 0.0


@pytest.mark.parametrize("error", [TypeError("no"), PermissionError(errno.EACCES, "no"), NotImplementedError("no")])
def test_what_cannot_get_better_is_not_retried(error: Exception) -> None:
    store, backend, ticking = failing("put", [error])
    with pytest.raises(StoreError, match="not retried"):
        store.put("a", b"1")
    assert backend.calls == 1
    assert ticking.slept == []


def test_a_lost_answer_of_a_create_is_settled_by_reading_back() -> None:
    store, backend, _ = failing("create", [ConnectionResetError("lost")], after=True)
    assert store.create("log/1", b"mine")
    assert backend.calls == 2
    assert not store.create("log/1", b"other")
    # Also if every answer is lost until the policy gives up.
    store, backend, _ = failing("create", [ConnectionResetError("lost")] + [OSError("down")] * 99, after=True)
    backend._inner.create("log/2", b"theirs", 1.0)
    backend._after = False
    assert not store.create("log/2", b"mine")
    with pytest.raises(StoreError, match="down"):
        store.create("log/3", b"mine")


def test_a_create_that_meets_a_vanishing_object_is_tried_again() -> None:
    store, backend, _ = failing("create", [FileExistsError("taken"), FileExistsError("taken")])
    assert store.create("log/1", b"mine")
    assert backend.calls == 3


def test_damage_on_the_way_is_retried_and_damage_at_rest_is_an_integrity_error() -> None:
    store, backend, _ = failing("put", [retry.MismatchError("CRC")] * 2)
    store.put("a", b"1")
    store, backend, _ = failing("put", [retry.MismatchError("CRC")] * 99)
    with pytest.raises(IntegrityError, match="damaged"):
        store.put("a", b"1")
    assert backend.calls == 4


def test_an_answer_that_ends_early_is_retried_but_a_short_object_is_not() -> None:
    store, backend, _ = failing("read", [])
    store.put("a", b"0123456789")
    backend._inner.read, whole = (lambda *a: [b"012"]), backend._inner.read
    with pytest.raises(StoreError, match="ended early"):
        store.get_ranges("a", [(0, 10)])
    backend._inner.read = whole
    assert store.get_ranges("a", [(0, 10)]) == [b"0123456789"]


def test_throttling_halves_what_is_in_flight_and_recovers_slowly() -> None:
    ticking = Ticking()
    limiter = retry.Limiter(8, ticking.clock())
    limiter.throttled()
    limiter.throttled()  # the same wave of refusals counts once
    assert limiter.limit == 4
    for expected in (2, 1, 1):
        ticking.time += 2
        limiter.throttled()
        assert limiter.limit == expected
    for _ in range(10):
        limiter.answered()
    assert limiter.limit in (1, 2)
    for _ in range(100):
        limiter.answered()
    assert limiter.limit == 8


def test_throttling_waits_longer_and_has_its_own_code() -> None:
    store, backend, ticking = failing("put", [RefusedError(503, "SlowDown", "slow down")] * 99)
    backend._inner.fault = lambda error, verb: judge_answer(error.status, error.code, text=str(error), verb=verb)
    with pytest.raises(StoreError, match="asks for fewer requests") as e:
        store.put("a", b"1")
    assert e.value.code == "store.throttled"
    assert ticking.slept[:3] == [1.0, 2.0, 4.0]
    assert store._now().limiter.limit == 1


def test_calls_in_flight_are_bounded() -> None:
    busy, most, lock = 0, 0, threading.Lock()
    full = threading.Barrier(QUICK.concurrency, timeout=20)
    store, backend, _ = failing("put", [])

    def slow(*_: Any) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        full.wait()
        with lock:
            busy -= 1

    backend._inner.put = slow
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: store.put(f"k{i}", b"1"), range(32)))
    assert most == QUICK.concurrency


@pytest.mark.parametrize(
    ("status", "code", "verb", "kind", "expected"),
    [
        (404, "NoSuchKey", "get", "missing", "store.not_found"),
        (404, "", "put", "permanent", "store.no_bucket"),
        (403, "AccessDenied", "get", "permanent", "store.denied"),
        (403, "rateLimitExceeded", "put", "throttled", "store.throttled"),
        (403, "QuotaExceeded", "put", "space", "store.quota"),
        (401, "", "get", "permanent", "store.credentials"),
        (412, "PreconditionFailed", "create", "exists", "store.exists"),
        (409, "ConditionalRequestConflict", "create", "exists", "store.exists"),
        (409, "OperationAborted", "delete", "transient", "store.unavailable"),
        (400, "BadDigest", "put", "corrupt", "integrity.transfer"),
        (400, "", "put", "permanent", "store.refused"),
        (400, "RequestTimeout", "put", "transient", "store.unavailable"),
        (429, "", "get", "throttled", "store.throttled"),
        (503, "", "get", "transient", "store.unavailable"),
        (503, "SlowDown", "get", "throttled", "store.throttled"),
        (507, "", "put", "space", "store.no_space"),
        (301, "PermanentRedirect", "put", "permanent", "store.refused"),
    ],
)
def test_answers_are_judged(status: int, code: str, verb: str, kind: str, expected: str) -> None:
    fault = judge_answer(status, code, text="", verb=verb)
    assert (fault.kind, fault.code) == (kind, expected)


def test_a_certificate_that_is_not_trusted_does_not_get_better() -> None:
    assert retry.judge(ssl.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed")).kind == "permanent"
    assert retry.judge(ssl.SSLError("[SSL: WRONG_VERSION_NUMBER]")).kind == "transient"


@pytest.mark.parametrize("most", [1, 7, 64, 10_000])
def test_buffers_read_as_one_file_without_being_joined(most: int) -> None:
    blobs = [os.urandom(n) for n in (0, 1, 50, 0, 300, 7)]
    whole = b"".join(blobs)
    file = Gather([memoryview(blob) for blob in blobs], most)
    assert file.seek(0, os.SEEK_END) == len(whole)
    for start in (0, 1, 51, 57, 357, len(whole)):
        file.seek(start)
        got = b""
        while piece := file.read(100):
            assert len(piece) <= min(most, 100)
            got += piece
            assert file.tell() == start + len(got)
        assert got == whole[start:]


# --- stores that are no log homes ---


class Overwriting(MemoryBackend):
    """Creates that overwrite, as some S3 servers do."""

    def create(self, key: str, data: bytes, seconds: float) -> None:
        self.put(key, [memoryview(data)], seconds)


class CheckThenWrite(MemoryBackend):
    """Creates that look first and write later, as fsspec's default does: all have looked before the first writes."""

    _looked = threading.Barrier(QUICK.concurrency, timeout=20)

    def create(self, key: str, data: bytes, seconds: float) -> None:
        if self.info(key, seconds):
            raise FileExistsError(key)
        self._looked.wait()
        self.put(key, [memoryview(data)], seconds)


@pytest.mark.parametrize("kind", [Overwriting, CheckThenWrite])
def test_the_probe_refuses_stores_whose_create_is_not_exclusive(kind: Callable[[Address], Backend]) -> None:
    backend = kind(parse("memory://unfit"))
    store = Store("memory://unfit", QUICK, lambda: backend)
    with pytest.raises(StoreError, match="memory://unfit cannot hold a log: of 5 creates") as e:
        store.probe_create()
    assert e.value.code == "store.no_create_only"
    assert store.list("") == []


# --- URLs and secrets ---


@pytest.mark.parametrize(
    ("url", "family", "shown", "root"),
    [
        ("/a//b/", "file", "file:///a/b", "/a/b"),
        ("file:///a/b", "file", "file:///a/b", "/a/b"),
        ("memory://x/y/", "memory", "memory://x/y", "x/y"),
        ("S3://bucket/a//b/", "s3", "s3://bucket/a/b", "bucket/a/b"),
        ("gcs://bucket", "gcs", "gcs://bucket", "bucket"),
        ("abfs://c@acc.dfs.core.windows.net/a", "azure", "abfs://c@acc.dfs.core.windows.net/a", "c/a"),
        ("sftp://user:pw@host/a?x=1", "generic", "sftp://host/a", "host/a"),
    ],
)
def test_urls(url: str, family: str, shown: str, root: str) -> None:
    place = parse(url)
    assert (place.family, place.url, place.root) == (family, shown, root)


@pytest.mark.parametrize(
    "url", ["", "s3://", "s3://k:hush-hush@b", "gs://b?sig=hush-hush", "filecache::s3://b", "nope://b"]
)
def test_wrong_urls_are_refused_without_showing_what_is_secret(url: str) -> None:
    with pytest.raises(ConfigError) as e:
        Store.open(url, QUICK)
    assert "hush-hush" not in str(e.value)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, extra, module in (("s3://b", "s3", "s3fs"), ("gs://b", "gcs", "gcsfs"), ("az://b", "azure", "adlfs")):
        for loaded in (module, *(n for n in sys.modules if n.startswith(f"{module}."))):
            monkeypatch.setitem(sys.modules, loaded, None)  # also what other tests have imported of it
        for ours in ("s3", "gcs", "azure"):
            monkeypatch.delitem(sys.modules, f"gpumove.store.{ours}", raising=False)
        with pytest.raises(ConfigError, match=rf"pip install 'gpumove\[{extra}\]'"):
            Store.open(url, Config())  # the default deadline: the first import of a cloud package takes its time


SECRETS = {
    "key": "AKIAFAKEFAKEFAKEFAKE",
    "secret": "the/secret+of==the key",
    "connection_string": "AccountName=acc;AccountKey=bm90IGEga2V5==;BlobEndpoint=http://127.0.0.1:1/acc",
    "client_kwargs": {"aws_session_token": "a-session-token"},
    "token": {"private_key": "-----BEGIN PRIVATE KEY-----abc"},
}


def test_no_credential_is_ever_shown() -> None:
    scrub = Scrubber("sftp://me:pass-word@host/x", SECRETS)
    hidden = [
        "AKIAFAKEFAKEFAKEFAKE",
        "the/secret",
        "bm90IGEga2V5",
        "a-session-token",
        "pass-word",
        "BEGIN PRIVATE",
        "s1g",
    ]
    text = f"{SECRETS} sftp://me:pass-word@host/x https://h/b?sv=1&sig=s1gn4tur3%3D&x=1 Authorization: Bearer ya29.s1g"
    assert not [word for word in hidden if word in scrub(text)]
    assert "http://127.0.0.1:1/acc" in scrub("cannot reach http://127.0.0.1:1/acc")
    # Whatever a back end says, neither the error nor the traceback of it shows more.
    store, _, _ = failing("put", [ValueError(text)])
    store._scrub = scrub
    try:
        store.put("a", b"1")
    except StoreError:
        shown = traceback.format_exc()
    assert "ValueError" in shown
    assert not [word for word in hidden if word in shown]


# --- forks, threads, imports ---


def test_a_forked_child_opens_its_own(store: Store) -> None:
    store.put("a", b"1")
    if (pid := os.fork()) == 0:  # pragma: no cover - the child
        try:
            parent = store._live
            fine = store.get("a") == b"1" and store.create("b", b"2") and store._live is not parent
            os._exit(0 if fine else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_import_is_light() -> None:
    code = (
        "import sys, gpumove.store.objects\n"
        "heavy = {'torch', 'numpy', 'fsspec', 's3fs', 'gcsfs', 'adlfs', 'aiohttp', 'botocore'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- the store that dies on purpose ---


def test_faulty_store_counts_dies_and_stays_dead(store: Store) -> None:
    store.delete([i.key for i in store.list("")])
    counting = FaultyStore(store)
    counting.put("a", b"1234")
    counting.create("b", b"2")
    assert counting.get("a") == b"1234"
    assert counting.calls == 3
    for mode, there in (("before", False), ("after", True)):
        dying = FaultyStore(store, at=2, mode=mode)  # type: ignore[arg-type]
        dying.put("x", b"1")
        with pytest.raises(Crash):
            dying.create(f"made-{mode}", b"1")
        with pytest.raises(Crash):
            dying.get("x")
        assert (store.exists(f"made-{mode}") is not None) == there
    torn = FaultyStore(store, at=1, mode="torn")
    with pytest.raises(Crash):
        torn.put("torn", b"12345678")
    visible = store.exists("torn")
    assert (visible.nbytes if visible else None) == (4 if store.url.startswith("memory") else None)


def test_faulty_store_loses_answers_below_the_policy(store: Store) -> None:
    for at in range(1, 8):
        lossy = FaultyStore(store, at=at, mode="lost")
        assert lossy.create(f"log/{at}", b"mine")
        lossy.put(f"p/{at}", b"123")
        assert lossy.get(f"p/{at}") == b"123"
        assert lossy.get_ranges(f"p/{at}", [(0, 1), (1, 3)]) == [b"1", b"23"]
        assert lossy.exists(f"p/{at}") is not None
        assert [i.key for i in lossy.list(f"p/{at}")] == []
        lossy.delete([f"p/{at}"])
        assert store.exists(f"p/{at}") is None


def test_file_backend_is_what_paths_get(tmp_path: Path) -> None:
    assert isinstance(Store.open(str(tmp_path), QUICK)._now().backend, FileBackend)
