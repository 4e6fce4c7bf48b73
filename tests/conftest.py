"""Fixtures that every suite may use: the real object stores, one of each per session, and a fresh place in them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

# Before any import of the cloud clients: no proxies to loopback, no look at this machine's own cloud settings.
os.environ.update(
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    AWS_DEFAULT_REGION="us-east-1",
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
)
# As torchrun has it. Two threads that share a tiny sum wait for each other: 40 times its time where a core is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.servers import Bucket, azurite, gcs, ministack, rclone
from tests.servers.process import RUNNING

StoreAt = tuple[str, Mapping[str, Any]]
BACKENDS = ("memory", "file", "s3", "gs", "abfs")
_log_sizes: dict[Path, int] = {}


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """S3 with create-only and checked signatures."""
    with ministack(tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Google Cloud Storage."""
    with gcs(tmp_path_factory.mktemp("gcs")) as bucket:
        yield bucket


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Azure Blob."""
    with azurite(tmp_path_factory.mktemp("azure")) as container:
        yield container


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """S3 without create-only: the store that has to be refused."""
    with rclone(tmp_path_factory.mktemp("rclone")) as bucket:
        yield bucket


@pytest.fixture(params=BACKENDS)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> StoreAt:
    """(url, options) of a fresh, empty prefix on each of the five back ends."""
    return fresh_place(request, request.param, tmp_path)


def fresh_place(request: pytest.FixtureRequest, backend: str, tmp_path: Path) -> StoreAt:
    """An empty prefix on one back end; its server is started if need be."""
    name = f"{request.node.originalname[:40]}-{uuid.uuid4().hex[:8]}"
    if backend == "memory":
        return f"memory://{name}", {}
    if backend == "file":
        return (tmp_path / name).as_uri(), {}
    fixture = {"s3": "s3_server", "gs": "gcs_server", "abfs": "azure_server"}[backend]
    bucket: Bucket = request.getfixturevalue(fixture)
    return f"{bucket.url}/{name}", bucket.options


def pytest_runtest_setup() -> None:
    _log_sizes.update({server.log: server.log.stat().st_size for server in RUNNING})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the servers wrote while it ran."""
    report = yield
    if report.failed:
        tails = ((server.name, server.log_tail(_log_sizes.get(server.log, 0))) for server in RUNNING)
        report.sections += [(f"log of the {name} server", tail) for name, tail in tails if tail.strip()]
    return report
