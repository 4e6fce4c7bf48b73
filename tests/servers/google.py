"""Google Cloud Storage on loopback: our own server (gcs.py), because no other one enforces ifGenerationMatch."""

from __future__ import annotations

import contextlib
import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.servers.process import Bucket, run_server


@contextlib.contextmanager
def gcs(directory: Path, *, persist: bool = False) -> Iterator[Bucket]:
    """A bucket on our own server, in memory, or with ``persist`` in files that survive a SIGKILL of the server."""
    command = [sys.executable, "-m", "tests.servers.gcs"]
    command += ["--dir", str(directory / "data")] if persist else []
    with run_server("gcs", lambda port: [*command, "--port", str(port)], log=directory / "gcs.log") as server:
        bucket = describe(server.endpoint, "gpumove-test")
        create(bucket)
        yield bucket


def describe(endpoint: str, name: str) -> Bucket:
    """The bucket of that name at that address."""
    env = {"STORAGE_EMULATOR_HOST": endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    return Bucket(f"gs://{name}", {"endpoint_url": endpoint, "token": "anon"}, env, endpoint, describe, create)


def create(bucket: Bucket) -> None:
    request = urllib.request.Request(
        f"{bucket.endpoint}/storage/v1/b?project=test",
        data=json.dumps({"name": bucket.name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).close()
