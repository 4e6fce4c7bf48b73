"""gpumove.stage when things fail: the link, the bytes, the disk, another process."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpumove
from gpumove.config import Config
from gpumove.errors import IntegrityError, ObjectNotFoundError, StoreError
from gpumove.store.objects import Store
from tests.servers import Bucket
from tests.servers.proxy import Proxy
from tests.shards import fill, shard_data, there

MIB = 1 << 20
GET_S1 = r"(?is)^GET [^ ]*s1[? ].*\r\nrange: "


@pytest.fixture(params=["s3_server", "gcs_server"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    found: Bucket = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def place(bucket: Bucket, tmp_path: Path) -> Iterator[tuple[str, Proxy, Bucket]]:
    """Three shards behind a proxy."""
    url = fill(f"{bucket.url}/{tmp_path.name}", ["s0", "s1", "s2"], nbytes=MIB, options=bucket.options)
    with Proxy(bucket.endpoint) as proxy:
        yield url, proxy, bucket.via(proxy.endpoint)


def test_a_broken_connection_is_tried_again(place: tuple[str, Proxy, Bucket], tmp_path: Path) -> None:
    url, proxy, bucket = place
    fault = proxy.fail("reset_down", GET_S1, after=300_000, times=2)
    with gpumove.stage(url, tmp_path / "here", storage_options=bucket.options) as stage:
        for path in stage:
            assert path.read_bytes() == shard_data(path.name, MIB)
    assert fault.fired == 2


def test_damage_on_the_way_is_noticed_by_the_stores_checksum(
    place: tuple[str, Proxy, Bucket], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, proxy, bucket = place
    fault = proxy.fail("corrupt_down", GET_S1, after=300_000)
    with gpumove.stage(url, tmp_path / "here", storage_options=bucket.options) as stage:
        for path in stage:
            assert path.read_bytes() == shard_data(path.name, MIB)
        assert fault.fired == 1
        assert "s1 is read again: its crc32" in caplog.text
        proxy.fail("corrupt_down", GET_S1, after=300_000, times=2)
        with pytest.raises(IntegrityError, match=r"s1 is damaged: its crc32c? is .*, 2 times in a row"):
            stage.get("s1")
        assert "s1" not in there(tmp_path / "here")
        assert stage.get("s1").read_bytes() == shard_data("s1", MIB)  # it is asked for again, and arrives


def test_a_failure_ahead_is_heard_of_when_the_shard_is_asked_for(
    place: tuple[str, Proxy, Bucket], tmp_path: Path
) -> None:
    url, proxy, bucket = place
    names = ["s0", "none", "s2"]
    config = Config(retry_s=5.0, deadline_s=5.0)
    with gpumove.stage(url, tmp_path / "here", names=names, storage_options=bucket.options, config=config) as stage:
        shards = iter(stage)
        assert next(shards).name == "s0"
        with pytest.raises(ObjectNotFoundError, match="none does not exist"):
            next(shards)
        assert stage.position == 1
        Store.open(url, config, options=bucket.options).put("none", shard_data("none"))
        assert next(path.read_bytes() == shard_data("none") for path in stage)
        proxy.fail("status", "s0", times=float("inf"), status=503)
        with pytest.raises(StoreError, match=r"s0 failed, tried \d+ times") as caught:
            stage.get("s0")
        assert caught.value.code == "store.unavailable"
        proxy.clear()
        assert stage.get("s0").read_bytes() == shard_data("s0", MIB)


def test_a_process_that_was_stopped_while_it_fetched_is_named(tmp_path: Path) -> None:
    url = fill(f"file://{tmp_path}/source", ["s0", "s1"])
    with gpumove.stage(url, tmp_path / "here", config=Config(retry_s=3.0)) as stage:
        assert stage.get("s1").exists()
        (parts,) = (tmp_path / "here").glob(".gpumove-stage/*/parts")
        fd = os.open(parts / "s0", os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)  # as its claim would lie
        with pytest.raises(StoreError, match=r"s0: another process of this machine has been fetching it") as caught:
            stage.get("s0")
        assert caught.value.code == "store.timeout"
        os.close(fd)
        assert stage.get("s0").read_bytes() == shard_data("s0")


def test_closing_does_not_wait_for_a_store_that_hangs(place: tuple[str, Proxy, Bucket], tmp_path: Path) -> None:
    url, proxy, bucket = place
    fault = proxy.fail("stall", "s1", times=float("inf"))
    stage = gpumove.stage(url, tmp_path / "here", storage_options=bucket.options)
    assert stage.get("s0").exists()
    until = time.monotonic() + 20
    while not fault.fired and time.monotonic() < until:
        time.sleep(0.01)
    began = time.monotonic()
    stage.close()
    assert time.monotonic() - began < 20  # a call has a minute
    assert there(tmp_path / "here") == []


SCRIPT = """
import pathlib, sys, pytest, gpumove
from gpumove.errors import StoreError
from tests.shards import fill, shard_data, there

source, place = sys.argv[1], pathlib.Path(sys.argv[2])
here = place / "here"
# Room for two shards and a half: what lies ahead does not fit beside them, and that stops nobody.
with gpumove.stage(source, here, ahead=3) as stage:
    for _ in range(2):
        for path in stage:
            assert path.read_bytes() == shard_data(path.name, 400_000), path
with gpumove.stage(source, here, ahead=1, limit_bytes=10_000_000) as stage:  # more than there is: what is kept goes
    for _ in range(2):
        for path in stage:
            assert path.read_bytes() == shard_data(path.name, 400_000), path
with gpumove.stage(source, here, ahead=0) as stage:
    list(stage)
    with open(place / "more", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(StoreError, match="s0 cannot be staged: No space left on device; free space there") as caught:
        stage.get("s0")
    assert caught.value.code == "store.no_space"
    assert there(here) == []
    (place / "more").unlink()
    assert stage.get("s0").read_bytes() == shard_data("s0", 400_000)
print("fine")
"""


def test_a_full_disk_stops_only_who_needs_it(tmp_path: Path) -> None:
    # As tests/crash/test_disk_full.py: a file system of 1 MiB in a mount namespace of its own.
    source = fill(f"file://{tmp_path}/source", [f"s{i}" for i in range(5)], nbytes=400_000)
    script, mounted = tmp_path / "script.py", tmp_path / "small"
    script.write_text(SCRIPT)
    mounted.mkdir()
    command = f"mount -t tmpfs -o size=1m tmpfs {mounted} && exec {sys.executable} {script} {source} {mounted}"
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", command],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1],
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
