"""Places that cannot be used say so at once, in our words, and are left as they are."""

from __future__ import annotations

import contextlib
import time

import fsspec
import pytest

from gpumove.config import Config
from gpumove.errors import StoreError
from gpumove.store.objects import Store
from tests.contract.conftest import CLOUDS, IN_TIME_S, failing
from tests.servers import Bucket


def test_missing_bucket_is_named_and_not_created(bucket: Bucket) -> None:
    missing = bucket.missing("gpumove-not-there")
    start = time.monotonic()
    with contextlib.closing(Store.open(f"{missing.url}/run", Config(), options=missing.options)) as store:
        for call in (
            lambda: store.put("k", b"1"),
            lambda: store.create("k", b"1"),
            lambda: store.list(""),
            store.probe_create,
        ):
            failing(call, StoreError, "store.no_bucket")
        failing(lambda: store.get("k"), StoreError, "store.no_bucket", "store.not_found")
    assert time.monotonic() - start < IN_TIME_S
    fs = fsspec.filesystem(missing.url.partition(":")[0], skip_instance_cache=True, **missing.options)
    assert missing.name not in [name.strip("/") for name in fs.ls("", detail=False)]


@pytest.mark.parametrize("cloud", ["s3", "abfs"])  # our own GCS server asks for none
def test_wrong_credentials(cloud: str, request: pytest.FixtureRequest) -> None:
    bucket: Bucket = request.getfixturevalue(CLOUDS[cloud])
    options = dict(bucket.options)
    if cloud == "s3":
        options |= {"key": "nobody-known", "secret": "wrong-but-secret"}
    else:
        options["connection_string"] = options["connection_string"].replace("AccountKey=Eby8", "AccountKey=Fby8")
    start = time.monotonic()
    with contextlib.closing(Store.open(f"{bucket.url}/run", Config(), options=options)) as store:
        for call in (lambda: store.put("k", b"1"), lambda: store.create("k", b"1"), lambda: store.get("k")):
            error = failing(call, StoreError, "store.denied", "store.credentials")
            assert "wrong-but-secret" not in str(error)
            assert "Fby8vdM02xNOcqFlq" not in str(error)
    assert time.monotonic() - start < IN_TIME_S


def test_store_without_create_only_is_refused(rclone_server: Bucket) -> None:
    place = f"{rclone_server.url}/run"
    with contextlib.closing(Store.open(place, Config(), options=rclone_server.options)) as store:
        failing(store.probe_create, StoreError, "store.no_create_only")
        assert store.list("") == []
