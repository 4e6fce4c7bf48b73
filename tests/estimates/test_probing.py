"""The probe, on real stores, over links whose rate is known; and where there is nobody."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gpumove.config import Config
from gpumove.estimates import probing
from gpumove.estimates.interval import Range
from gpumove.estimates.probing import Probe, between, probe
from gpumove.store.objects import Store
from tests.servers import Bucket
from tests.servers.link import Link
from tests.servers.proxy import Proxy

QUICK = Config(retry_s=3.0, deadline_s=60.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the bytes: the servers of the tests, and the machine, may be slow, and a call has 20 s."""
    monkeypatch.setattr(probing, "_OBJECT_BYTES", probing._OBJECT_BYTES // 16)


def left(url: str, options: Mapping[str, Any]) -> list[str]:
    with closing(Store.open(url, Config(), options=options)) as store:
        return [found.key for found in store.list("")]


@pytest.mark.usefixtures("small")
def test_every_store_can_be_probed_and_is_as_it_was(store_url: tuple[str, Mapping[str, Any]]) -> None:
    url, options = store_url
    found = probe(url, storage_options=options)
    assert found.problem == ""
    for rate in (found.up_bytes_s, found.down_bytes_s, found.entry_s):
        assert rate is not None
        assert 0 < rate.low <= rate.value <= rate.high
    assert left(url, options) == []


@pytest.mark.slow  # 128 MB over 100 Mbit/s
def test_the_rate_of_a_link(s3_server: Bucket) -> None:
    """What is measured is what the link carries: 12.5 MB/s up, and a quarter more down."""
    with Proxy(s3_server.endpoint, up=Link(100, 0.01), down=Link(125, 0.01)) as link:
        far = s3_server.via(link.endpoint)
        found = probe(f"{far.url}/probed", storage_options=far.options)
    assert found.up_bytes_s is not None
    assert found.down_bytes_s is not None
    assert found.up_bytes_s.value == pytest.approx(12.5e6, rel=0.15)
    assert found.down_bytes_s.value == pytest.approx(15.6e6, rel=0.15)


def test_nobody_there_is_a_result(s3_server: Bucket) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        far = s3_server.via(f"http://127.0.0.1:{free.getsockname()[1]}")
        found = probe(f"{far.url}/x", storage_options=far.options, config=QUICK)
    assert (found.up_bytes_s, found.down_bytes_s, found.entry_s) == (None, None, None)
    assert found.url == f"{far.url}/x"
    assert "failed" in found.problem
    assert "put" in found.problem  # not the delete that follows


def test_a_password_in_a_url_is_not_repeated() -> None:
    found = probe("ftp://me:s3cret@nowhere.invalid/x", config=QUICK)
    assert found.problem
    assert "s3cret" not in f"{found}"


@pytest.mark.usefixtures("small")
def test_bytes_that_come_back_wrong_are_a_result_too(s3_server: Bucket) -> None:
    with Proxy(s3_server.endpoint) as link:
        fault = link.fail("corrupt_down", r"^GET .*/probe/.*/1-", times=100)
        far = s3_server.via(link.endpoint)
        found = probe(f"{far.url}/wrong", storage_options=far.options, config=QUICK)
        assert fault.fired
    assert found.up_bytes_s is None
    assert found.problem
    assert left(f"{s3_server.url}/wrong", s3_server.options) == []


def test_where_nothing_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = probe(str(tmp_path / "file"), config=QUICK)
    assert found.problem


HERE = Probe("s3://here", Range(1, 2, 3), Range(40, 50, 60), Range(1, 1, 1))
THERE = Probe("gs://there", Range(30, 55, 90), Range(1, 2, 3), Range(1, 1, 1))


def test_a_way_is_as_fast_as_its_slower_end() -> None:
    assert between(HERE, THERE)[0] == Range(30, 50, 60)
    assert between(None, THERE)[0] == Range(30, 55, 90)


@pytest.mark.parametrize("ends", [(Probe("", problem="gone"), THERE), (HERE, Probe("", problem="gone"))])
def test_a_way_that_ends_nowhere_has_no_rate(ends: tuple[Probe, Probe]) -> None:
    assert between(*ends) == (None, "the link could not be measured: gone")
