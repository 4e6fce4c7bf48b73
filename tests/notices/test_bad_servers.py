"""Servers that hang, lie or are not there: every source ends in time, believes nothing and shows no secret."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from http.client import HTTPException

import pytest

from gpumove.notices.aws import Aws, AwsRebalance
from gpumove.notices.azure import Azure
from gpumove.notices.gcp import Gcp, GcpMaintenance
from gpumove.notices.metadata import ask, moment
from gpumove.notices.notice import Source
from gpumove.notices.watched import Url
from tests.servers.metadata import (
    Gce,
    Imds,
    Plain,
    Rude,
    cut_short,
    drips,
    floods,
    hangs,
    page,
    redirects_to,
    resets,
    rubbish,
    vanishes,
)

SOURCES: dict[str, Callable[[str], Source]] = {
    "aws": lambda base: Aws(base, limit_s=0.6),
    "aws-rebalance": lambda base: AwsRebalance(base, limit_s=0.6),
    "gcp": lambda base: Gcp(base, wait_s=0, limit_s=0.6),
    "gcp-maintenance": lambda base: GcpMaintenance(base, wait_s=0, limit_s=0.6),
    "azure": lambda base: Azure(base, limit_s=0.6, first_limit_s=0.6),
    "url": lambda base: Url(f"{base}/leave", limit_s=0.6),
}


WRONG = [hangs, drips, floods, vanishes, resets, rubbish, cut_short, page]
# Any document is a notice where a URL was named for it, so two of these are right there.
CASES = [(name, behave) for name in SOURCES for behave in (WRONG if name != "url" else WRONG[:-2])]


@pytest.mark.parametrize(("name", "behave"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_bad_answers_end_in_time_and_are_no_notice(name: str, behave: Callable[[socket.socket], None]) -> None:
    with Rude(behave) as server:
        began = time.monotonic()
        with pytest.raises((OSError, HTTPException, ValueError)):
            SOURCES[name](server.base).poll()
        assert time.monotonic() - began < 15
        assert server.connections >= 1


@pytest.mark.parametrize("name", SOURCES)
def test_redirects_are_never_followed(name: str) -> None:
    with Plain() as elsewhere:
        elsewhere.status, elsewhere.body = 200, b'{"action": "terminate"}'
        with Rude(redirects_to(elsewhere.base)) as server, pytest.raises(ConnectionError, match="302"):
            SOURCES[name](server.base).poll()
        assert elsewhere.requests == []


@pytest.mark.parametrize("name", SOURCES)
def test_nobody_there(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        SOURCES[name](f"http://127.0.0.1:{port}").poll()


def test_what_says_true_and_is_not_google_is_not_believed() -> None:
    with Plain() as server:
        server.status, server.body = 200, b"TRUE"
        with pytest.raises(ValueError, match="not Google"):
            Gcp(server.base, wait_s=0).poll()


def test_at_most_64_kib_are_read() -> None:
    before = _resident_bytes()
    with Rude(floods) as server, pytest.raises(ValueError, match="64 KiB"):
        ask(f"{server.base}/", limit_s=5)
    assert _resident_bytes() - before < 32 << 20


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Plain() as proxy, Imds() as imds, Gce() as gce:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.base)
        assert Aws(imds.base).poll() is None
        assert Gcp(gce.base).poll() is None
        assert (proxy.requests, imds.count("GET"), gce.count("GET")) == ([], 1, 1)


def test_a_token_is_in_no_error() -> None:
    with Imds() as imds:
        source = Aws(imds.base)
        source.poll()
        imds.action = b"rubbish"
        with pytest.raises(ValueError) as failure:
            source.poll()
        assert source._imds._token not in (None, "")
        assert str(source._imds._token) not in repr(failure.value)


@pytest.mark.parametrize("text", [None, 3, "", "soon", "Mon, 99 Foo 2016", "2026-13-01T00:00:00Z", "9" * 400])
def test_what_is_no_date_is_none(text: object) -> None:
    assert moment(text) is None


def test_dates_as_the_clouds_write_them() -> None:
    assert moment("2017-09-18T08:22:00Z") == 1505722920
    assert moment("Mon, 18 Sep 2017 08:22:00 GMT") == 1505722920
    assert moment("2017-09-18T08:22:00") == 1505722920
