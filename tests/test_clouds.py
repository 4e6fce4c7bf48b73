"""The whole trip on every kind of store: train, save, fence, damage, resume exactly; and what stores refuse."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import pytest

import gpumove
from gpumove.config import Config
from gpumove.errors import FencedError, StoreError
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import reachable
from tests.jobs import new_job
from tests.servers import Bucket

StoreAt = tuple[str, Mapping[str, Any]]


def test_train_save_resume_damage_fence_and_collect(store_url: StoreAt, caplog: pytest.LogCaptureFixture) -> None:
    url, options = store_url
    whole = new_job()
    whole.train(0, 12)

    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), storage_options=options, pack_bytes=16384, chunk_bytes=4096) as ckpt:
        start = ckpt.restore()
        for stop in (3, 6):
            job.train(start, stop, ckpt)
            assert ckpt.save(stop).wait(60).step == stop
            start = stop
        job.train(6, 8, ckpt)

        other = new_job()
        with gpumove.Checkpointer(url, **other.parts(), storage_options=options) as second:
            assert second.restore() == 6
            with pytest.raises(FencedError):
                ckpt.save(8).wait(60)

    # One byte of the newest checkpoint is damaged at rest.
    store = Store.open(url, Config(), options=options)
    log = Log(store)
    newest = log.read().checkpoints[-1]
    pack = next(k for k in reachable(store, newest) if k.startswith("packs/"))
    data = bytearray(store.get(pack))
    data[int.from_bytes(data[:8], "little") + 8 + 5] ^= 4
    store.delete([pack])
    store.put(pack, bytes(data))

    job = new_job(seed=4)
    with caplog.at_level(logging.WARNING), gpumove.Checkpointer(url, **job.parts(), storage_options=options) as ckpt:
        assert ckpt.restore() == 3
        assert pack in caplog.text
        job.train(3, 12, ckpt)
        ckpt.save(12).wait(60)
    assert job.losses == {s: whole.losses[s] for s in range(4, 13)}
    assert job.fingerprint() == whole.fingerprint()

    log.read()
    collect(log, Retention(keep_last=1))
    left = {o.key for room in ("packs/", "parts/", "manifests/") for o in store.list(room)}
    assert left == set(reachable(store, log.view.checkpoints[-1]))
    model = new_job(seed=5).model
    assert gpumove.load(url, model=model, storage_options=options) == 12
    store.close()


def test_a_store_without_create_only_is_refused_as_a_home(rclone_server: Bucket) -> None:
    job = new_job()
    with (
        gpumove.Checkpointer(f"{rclone_server.url}/run", **job.parts(), storage_options=rclone_server.options) as ckpt,
        pytest.raises(StoreError) as caught,
    ):
        ckpt.restore()
    assert caught.value.code == "store.no_create_only"


def test_a_bucket_that_does_not_exist_is_named_and_not_made(s3_server: Bucket) -> None:
    job = new_job()
    for _ in range(2):
        began = time.monotonic()
        with (
            gpumove.Checkpointer("s3://no-such-bucket/run", **job.parts(), storage_options=s3_server.options) as ckpt,
            pytest.raises(StoreError, match="no-such-bucket") as caught,
        ):
            ckpt.restore()
        assert caught.value.code == "store.no_bucket"
        assert time.monotonic() - began < 20
