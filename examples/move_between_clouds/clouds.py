"""Two clouds on this machine: an S3 bucket and a GCS bucket, each with a link of its own to the world outside."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers import Bucket, gcs, ministack
from tests.servers.link import Link
from tests.servers.proxy import Proxy


@dataclass(frozen=True)
class Cloud:
    """One bucket, as it is seen from inside its cloud and from outside."""

    name: str
    inside: Bucket
    outside: Bucket
    link: Proxy

    @property
    def url(self) -> str:
        """Where the run lies here."""
        return f"{self.inside.url}/run"

    @property
    def out_bytes(self) -> int:
        """What has left this cloud."""
        return self.link.bytes_down

    @property
    def in_bytes(self) -> int:
        """What has come into it."""
        return self.link.bytes_up


def environment(*buckets: Bucket) -> Mapping[str, str]:
    """What a process is started with: these buckets' credentials, in the clouds' standard places, and no others."""
    alone = {
        "NO_PROXY": "127.0.0.1,localhost",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GPUMOVE_")}
    return {**kept, **alone, **{name: value for bucket in buckets for name, value in bucket.env.items()}}


@contextmanager
def two_clouds(folder: Path, *, mbit_s: float, delay_s: float) -> Iterator[tuple[Cloud, Cloud]]:
    """An S3 server and a GCS server, real protocols both. Whoever is inside a cloud reaches its bucket directly.

    Args:
        folder: for the servers' logs.
        mbit_s: each link's rate, in either direction.
        delay_s: each link's delay, one way.
    """
    with (
        ministack(folder / "s3") as s3,
        gcs(folder / "gcs") as gs,
        _link(s3, mbit_s, delay_s) as one,
        _link(gs, mbit_s, delay_s) as other,
    ):
        yield Cloud("S3", s3, s3.via(one.endpoint), one), Cloud("GCS", gs, gs.via(other.endpoint), other)


def _link(bucket: Bucket, mbit_s: float, delay_s: float) -> Proxy:
    return Proxy(bucket.endpoint, up=Link(mbit_s, delay_s), down=Link(mbit_s, delay_s))
