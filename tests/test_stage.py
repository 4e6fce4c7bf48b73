"""gpumove.stage: order, what is kept, whose files it touches, and what it checks."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import gpumove
from gpumove.config import Config
from gpumove.errors import ConfigError, IntegrityError
from gpumove.format.codec import digest
from gpumove.move.copier import Copier
from gpumove.move.plain import Plain
from gpumove.store.objects import Store
from tests.shards import fill, shard_data, staged_bytes, there

StoreAt = tuple[str, Mapping[str, Any]]
MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> str:
    return fill(f"file://{tmp_path}/source", [f"s{i}" for i in range(6)])


# --- order ---


def test_every_store_is_staged_in_order_and_whole(store_url: StoreAt, tmp_path: Path) -> None:
    url, options = store_url
    names = ["b/0.tar", "b/1.tar", "a.tar"]
    fill(url, names, options=options)
    kind = {"s3": "crc32", "gs": "crc32c", "abfs": "md5"}.get(url.partition(":")[0], "")
    found = Store.open(url, Config(), options=options).exists("a.tar")
    assert found is not None
    assert found.sum.partition(":")[0] == kind  # what it is compared with
    fill(url, ["c/large"], nbytes=17 * MIB + 5, options=options)
    Store.open(url, Config(), options=options).put("b/empty", b"")
    with gpumove.stage(url, tmp_path / "here", storage_options=options) as stage:
        assert stage.names == ("a.tar", "b/0.tar", "b/1.tar", "b/empty", "c/large")
        assert len(stage) == 5
        for place, path in enumerate(stage):
            name = stage.names[place]
            assert stage.position == place + 1
            assert path == tmp_path / "here" / name
            size = {"c/large": 17 * MIB + 5, "b/empty": 0}.get(name, 100_000)
            assert path.read_bytes() == shard_data(name, size)
        assert there(tmp_path / "here") == []
        assert stage.position == 0
        assert stage.stats.shards == stage.stats.fetched == 5
        assert stage.stats.fetched_bytes == 300_000 + 17 * MIB + 5


def test_names_and_patterns(source: str, tmp_path: Path) -> None:
    fill(source, ["odd[1]", "odd1", "deep/er/x"])

    def order(*names: str, **more: Any) -> tuple[str, ...]:
        return gpumove.stage(source, tmp_path / "here", names=names, **more).names

    assert order("s4", "s1") == ("s4", "s1")
    assert order("s4", "s*", "deep/*") == ("s4", "s0", "s1", "s2", "s3", "s5", "deep/er/x")
    assert order("odd[1]") == ("odd[1]",)
    assert order("s[12]") == ("s1", "s2")
    assert gpumove.stage(source, tmp_path / "here", names="s1").names == ("s1",)
    for wrong in (["t*"], [], ["../x"], ["a//b"], [".gpumove-stage/x"], ["a\\b"]):
        with pytest.raises(ConfigError) as caught:
            order(*wrong)
        assert caught.value.code == "config.stage"
    for more in ({"ahead": -1}, {"start": 2}, {"start": -1}, {"limit_bytes": 0}):
        with pytest.raises(ConfigError, match=next(iter(more))):
            order("s1", **more)
    for given in ({"s1": "sha1:" + "0" * 40}, {"s1": "md5:123"}, {"s1": "nonsense"}):
        with pytest.raises(ConfigError, match="digest of s1"):
            order("s1", digests=given)
    with pytest.raises(ConfigError, match="nothing to stage"):
        gpumove.stage(str(tmp_path / "nothing"), tmp_path / "here")
    with pytest.raises(ConfigError, match="lies within"):
        gpumove.stage(source, source.removeprefix("file://") + "/inside")


def test_a_resumed_job_starts_where_it_was_and_the_next_pass_is_whole(source: str, tmp_path: Path) -> None:
    with gpumove.stage(source, tmp_path / "here", start=4) as stage:
        assert [p.name for p in stage] == ["s4", "s5"]
        assert [p.name for p in stage] == [f"s{i}" for i in range(6)]
        for path in stage:
            if path.name == "s2":
                break
        assert stage.position == 3
        assert [p.name for p in stage] == ["s3", "s4", "s5"]
    with gpumove.stage(source, tmp_path / "here", start=6) as stage:
        assert list(stage) == []


def test_any_shard_by_name(source: str, tmp_path: Path) -> None:
    with gpumove.stage(source, tmp_path / "here", ahead=1) as stage:
        for name in ("s3", "s0", "s0", "s5"):
            assert stage.get(name).read_bytes() == shard_data(name)
        with pytest.raises(ConfigError, match="'s9' is none of the 6 shards"):
            stage.get("s9")


def test_threads_keep_what_they_use(source: str, tmp_path: Path) -> None:
    wrong: list[str] = []

    def use(first: int) -> None:
        for turn in range(30):
            name = f"s{(first + turn) % 6}"
            path = stage.get(name)
            time.sleep(0.002)
            if path.read_bytes() != shard_data(name):
                wrong.append(name)

    with gpumove.stage(source, tmp_path / "here") as stage:
        threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_staging_needs_no_torch() -> None:
    code = "import sys, gpumove; gpumove.stage; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- what is kept ---


def test_without_a_limit_what_was_used_goes(source: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    with gpumove.stage(source, here, ahead=2) as stage:
        for place, path in enumerate(stage):
            assert path.exists()
            assert set(there(here)) <= {f"s{i}" for i in range(place, place + 3)}


def test_an_open_file_outlives_its_eviction(source: str, tmp_path: Path) -> None:
    with gpumove.stage(source, tmp_path / "here") as stage, stage.get("s0").open("rb") as file:
        stage.get("s5")
        assert "s0" not in there(tmp_path / "here")
        assert file.read() == shard_data("s0")


def test_within_a_limit_what_was_used_stays(source: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    with gpumove.stage(source, here, limit_bytes=600_000) as stage:
        assert len(list(stage)) == len(list(stage)) == 6
        assert stage.stats.fetched == 6
    with gpumove.stage(source, here, limit_bytes=600_000) as stage:  # as after a restart
        assert len(list(stage)) == 6
        assert stage.stats.fetched == 0
    with gpumove.stage(source, here, limit_bytes=350_000) as stage:
        for path in stage:
            assert path.exists()
        for _ in stage:
            assert staged_bytes(here) <= 350_000
        stage.get("s3")
        stage.get("s1")
        stage.get("s2")
        assert "s3" in there(here)  # the least recently used went first


def test_a_shard_above_the_limit_is_staged_all_the_same(source: str, tmp_path: Path) -> None:
    with gpumove.stage(source, tmp_path / "here", limit_bytes=50_000) as stage:
        for path in stage:
            assert path.read_bytes() == shard_data(path.name)
            assert len(there(tmp_path / "here")) == 1


# --- only its own files ---


def test_files_of_others_are_left_alone(source: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "s1").write_bytes(b"mine")
    (here / "notes").write_bytes(b"mine too")
    with gpumove.stage(source, here) as stage:
        assert stage.get("s0").exists()
        with pytest.raises(ConfigError, match="s1 is in the way") as caught:
            stage.get("s1")
        assert caught.value.code == "config.stage_folder"
        used = stage.get("s2")
        used.unlink()
        used.write_bytes(b"mine as well")
        assert stage.get("s4").exists()
    assert {name: (here / name).read_bytes() for name in there(here)} == {
        "s1": b"mine", "notes": b"mine too", "s2": b"mine as well",
    }  # fmt: skip


def test_two_datasets_in_one_folder_do_not_mix(source: str, tmp_path: Path) -> None:
    other = fill(f"file://{tmp_path}/other", ["s0", "t0"], nbytes=50)
    with gpumove.stage(source, tmp_path / "here") as one, gpumove.stage(other, tmp_path / "here", ahead=0) as two:
        assert one.get("s0").stat().st_size == 100_000
        with pytest.raises(ConfigError, match="in the way"):
            two.get("s0")
        assert two.get("t0").read_bytes() == shard_data("t0", 50)


def test_what_was_removed_or_has_changed_is_fetched_again(source: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    with gpumove.stage(source, here, limit_bytes=MIB) as stage:
        list(stage)
    (here / "s0").unlink()
    fill(source, ["s1"], nbytes=70)
    with gpumove.stage(source, here, limit_bytes=MIB) as stage:
        assert stage.get("s0").read_bytes() == shard_data("s0")
        assert stage.get("s1").read_bytes() == shard_data("s1", 70)
        list(stage)
        assert stage.stats.fetched == 2


# --- what is checked ---


@pytest.mark.parametrize("kind", ["sha256", "md5", "crc32", "xxh3_128"])
def test_given_digests_are_compared(source: str, tmp_path: Path, kind: str) -> None:
    data = shard_data("s0")
    right = {
        "sha256": hashlib.sha256(data).hexdigest(), "md5": hashlib.md5(data).hexdigest(),
        "crc32": f"{zlib.crc32(data):08x}", "xxh3_128": digest(data),
    }[kind]  # fmt: skip
    digests = {"s0": f"{kind}:{right}", "s1": f"{kind}:{right}"}
    with gpumove.stage(source, tmp_path / "here", digests=digests) as stage:
        assert stage.get("s0").read_bytes() == data
        with pytest.raises(IntegrityError, match=f"s1 is damaged: its {kind} is .*, not {right}"):
            stage.get("s1")
        assert there(tmp_path / "here") != ["s1"]
        assert stage.get("s2").read_bytes() == shard_data("s2")


def test_the_ledger_of_a_replicated_prefix_is_compared(source: str, tmp_path: Path) -> None:
    with_ledger = f"file://{tmp_path}/copy"
    Plain(Copier(Store.open(source, Config()), Store.open(with_ledger, Config()))).copy()
    rotten = tmp_path / "copy" / "s3"
    data = bytearray(rotten.read_bytes())
    data[77] ^= 1
    rotten.write_bytes(data)
    with gpumove.stage(with_ledger, tmp_path / "here") as stage:
        assert stage.names == tuple(f"s{i}" for i in range(6))
        with pytest.raises(IntegrityError, match="s3 is damaged: its xxh3_128"):
            list(stage)
        assert stage.position == 3
