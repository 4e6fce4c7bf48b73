"""S3 on loopback: ministack, which honours create-only, and rclone, which does not and has to be refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.servers.process import Bucket, run_server, tool

KEY, SECRET = "test-access-key", "test-secret-key-that-must-never-be-seen"
REGION = "us-east-1"


@contextlib.contextmanager
def ministack(directory: Path, *, persist: bool = False) -> Iterator[Bucket]:
    """A bucket on ministack, in memory, or with ``persist`` in files that survive a SIGKILL of the server."""
    program = tool("ministack/bin/ministack")
    env = {
        "BIND_HOST": "127.0.0.1",  # its default is every interface
        "SERVICES": "s3",
        "LOG_LEVEL": "WARNING",
        "AUTH": "true",  # verify signatures, so that wrong credentials are refused as on the real service
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "HOME": str(directory),
    }
    if persist:
        env |= {"S3_PERSIST": "1", "S3_DATA_DIR": str(directory / "data")}
    with run_server(
        "ministack",
        lambda port: ["env", f"GATEWAY_PORT={port}", program],
        log=directory / "ministack.log",
        env=env,
    ) as server:
        bucket = describe(server.endpoint, "gpumove-test")
        create(bucket)
        yield bucket


@contextlib.contextmanager
def rclone(directory: Path) -> Iterator[Bucket]:
    """A bucket on ``rclone serve s3``: real S3 in everything but If-None-Match, which it ignores."""
    program = tool("rclone/bin/rclone")
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    flags: list[str | Path] = ["--config", directory / "none.conf", "--auth-key", f"{KEY},{SECRET}", "--addr"]
    with run_server(
        "rclone",
        lambda port: [program, "serve", "s3", *flags, f"127.0.0.1:{port}", data],
        log=directory / "rclone.log",
    ) as server:
        bucket = describe(server.endpoint, "gpumove-test")
        create(bucket)
        yield bucket


def describe(endpoint: str, name: str) -> Bucket:
    """The bucket of that name at that address."""
    options: dict[str, Any] = {"key": KEY, "secret": SECRET, "endpoint_url": endpoint}
    env = {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": REGION,
    }
    return Bucket(f"s3://{name}", options, env, endpoint, describe, create)


def create(bucket: Bucket) -> None:
    import botocore.session  # slow to import, and only the process that creates needs it
    from botocore.config import Config

    client = botocore.session.Session().create_client(
        "s3",
        region_name=REGION,
        endpoint_url=bucket.endpoint,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=Config(s3={"addressing_style": "path"}, proxies={}),
    )
    client.create_bucket(Bucket=bucket.name)
    client.close()
