"""gpumove.stage beside training: in workers, in several processes, killed, and over a slow link."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import gpumove
from gpumove.data.stage import Stage
from tests.servers import Bucket
from tests.servers.link import Link
from tests.servers.proxy import Proxy
from tests.shards import fill, shard_data, there

MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> str:
    return fill(f"file://{tmp_path}/source", [f"s{i}" for i in range(6)])


# --- workers ---


class Shards(IterableDataset[bytes]):
    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __iter__(self) -> Any:
        worker = get_worker_info()
        assert worker is not None
        for name in self.stage.names[worker.id :: worker.num_workers]:
            yield name, self.stage.get(name).read_bytes() == shard_data(name)


class Samples(Dataset[tuple[str, bool]]):
    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __len__(self) -> int:
        return len(self.stage)

    def __getitem__(self, index: int) -> tuple[str, bool]:
        name = self.stage.names[index]
        return name, self.stage.get(name).read_bytes() == shard_data(name)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers_stage(s3_server: Bucket, tmp_path: Path, context: str) -> None:
    names = [f"s{i}" for i in range(8)]
    url = fill(f"{s3_server.url}/workers-{context}", names, options=s3_server.options)
    with gpumove.stage(url, tmp_path / "here", storage_options=s3_server.options, limit_bytes=MIB) as stage:
        stage.get("s0")  # the parent has threads and locks of its own, which no child may meet
        for dataset in (Shards(stage), Samples(stage)):
            loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context)
            seen = list(loader)
            assert sorted(map(tuple, seen)) == [(name, True) for name in names]
        assert stage.get("s7").read_bytes() == shard_data("s7")
    assert pickle.loads(pickle.dumps(stage)).names == tuple(names)


# --- ahead of use ---


def _epoch(url: str, options: Mapping[str, Any], here: Path, *, ahead: int, step_s: float) -> float:
    """Seconds that a loop waits for its shards after the first one."""
    with gpumove.stage(url, here, ahead=ahead, storage_options=options) as stage:
        first = 0.0
        for path in stage:
            first = first or stage.stats.waited_s
            assert path.exists()
            time.sleep(step_s)  # the training
        return stage.stats.waited_s - first


def test_training_does_not_wait_when_ahead_is_enough(s3_server: Bucket, tmp_path: Path) -> None:
    # 4 MiB in 0.34 s over 100 Mbit/s; over twice as much training for each, so that a busy machine does not decide.
    names = [f"s{i}" for i in range(6)]
    url = fill(f"{s3_server.url}/ahead", names, nbytes=4 * MIB, options=s3_server.options)
    with Proxy(s3_server.endpoint, up=Link(100, 0.01), down=Link(100, 0.01)) as proxy:
        options = s3_server.via(proxy.endpoint).options
        without = _epoch(url, options, tmp_path / "a", ahead=0, step_s=0.0)
        ahead = _epoch(url, options, tmp_path / "b", ahead=2, step_s=2.3 * without / 5)
    assert without > 5 * 0.33
    assert ahead < 0.1 * without, (ahead, without)


# --- other processes ---

READER = """
import sys, gpumove
from tests.shards import shard_data
url, here, endpoint, limit = sys.argv[1:5]
from tests.servers.s3 import describe
options = describe(endpoint, "x").options if endpoint else {}
with gpumove.stage(url, here, storage_options=options, limit_bytes=int(limit) or None) as stage:
    for _ in range(2):
        for path in stage:
            assert path.read_bytes() == shard_data(path.name, path.stat().st_size), path
            assert path.stat().st_size in (100_000, 1 << 20), path
    print(stage.stats.fetched)
"""


def readers(count: int, url: str, here: Path, *, endpoint: str = "", limit_bytes: int = 0) -> list[int]:
    """How many shards each of several processes fetched that read all of them twice."""
    command = [sys.executable, "-c", READER, url, str(here), endpoint, str(limit_bytes)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    fetched = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * count
    return [int(text) for text in fetched]


def test_processes_that_share_a_folder_fetch_each_shard_once(s3_server: Bucket, tmp_path: Path) -> None:
    names = [f"s{i}" for i in range(12)]
    url = fill(f"{s3_server.url}/shared", names, nbytes=MIB, options=s3_server.options)
    with Proxy(s3_server.endpoint, down=Link(200, 0.005)) as proxy:
        fetched = readers(3, url, tmp_path / "here", endpoint=proxy.endpoint, limit_bytes=20 * MIB)
        assert sum(fetched) == 12
        assert sum(line.startswith("GET ") and "/s" in line.split("?")[0] for line in proxy.requests) >= 12
    assert there(tmp_path / "here") == sorted(names)
    assert not any((tmp_path / "here" / ".gpumove-stage").rglob("parts/*"))


def test_processes_without_a_limit_leave_nothing(source: str, tmp_path: Path) -> None:
    assert sum(readers(3, source, tmp_path / "here")) >= 6
    assert there(tmp_path / "here") == []


def test_a_stage_survives_being_killed(source: str, tmp_path: Path) -> None:
    fill(source, [f"big{i}" for i in range(4)], nbytes=MIB)
    here = tmp_path / "here"
    command = [sys.executable, "-c", READER.replace("range(2)", "range(1_000_000)"), source, str(here), "", "0"]
    for kill in range(6):
        child = subprocess.Popen(command, start_new_session=True)
        until = time.monotonic() + 60
        while not there(here) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05 + 0.03 * kill)
        os.kill(child.pid, 9)
        child.wait(30)
        for name in there(here):
            size = MIB if name.startswith("big") else 100_000
            assert (here / name).read_bytes() == shard_data(name, size), f"{name} after kill {kill}"
    with gpumove.stage(source, here, ahead=0) as stage:
        assert stage.get("s0").exists()
        assert not any(p.is_file() for p in (here / ".gpumove-stage").rglob("parts/*"))
        assert len(list(stage)) == 10
    assert there(here) == []
