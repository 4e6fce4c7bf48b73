"""The servers themselves: what a commit protocol is tested on has to be right first."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.servers import Bucket, ServerError, gcs, process
from tests.servers.gcs_state import digests
from tests.servers.link import Link
from tests.servers.process import RUNNING, run_server
from tests.servers.proxy import Proxy

Answer = tuple[int, dict[str, str], bytes]


class Api:
    """The JSON API of one bucket, spoken by hand."""

    def __init__(self, bucket: Bucket) -> None:
        self.address = bucket.endpoint.removeprefix("http://")
        self.objects = f"/storage/v1/b/{bucket.name}/o"

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.address, timeout=30)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), data

    def insert(self, name: str, data: bytes, *, query: str = "", **headers: str) -> Answer:
        path = f"/upload{self.objects}?uploadType=media&name={quote(name, safe='')}{query}"
        return self.call("POST", path, data, **headers)

    def at(self, name: str, query: str = "") -> str:
        return f"{self.objects}/{quote(name, safe='')}{query}"

    def resource(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.call("GET", self.at(name))[2])
        return found

    def start(self, name: str, query: str = "") -> str:
        """Start a resumable upload; returns where its chunks go."""
        path = f"/upload{self.objects}?uploadType=resumable&name={name}{query}"
        return self.call("POST", path, b"{}")[1]["Location"].partition(self.address)[2]


@pytest.fixture(params=["memory", "files"])
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Api]:
    with gcs(tmp_path, persist=request.param == "files") as bucket:
        yield Api(bucket)


def test_gcs_conditions(api: Api) -> None:
    assert api.insert("a b/ü+%{}", b"1", query="&ifGenerationMatch=0")[0] == 200
    assert api.insert("a b/ü+%{}", b"2", query="&ifGenerationMatch=0")[0] == 412
    first = api.resource("a b/ü+%{}")["generation"]
    assert api.insert("a b/ü+%{}", b"3", query=f"&ifGenerationMatch={first}")[0] == 200
    second = api.resource("a b/ü+%{}")["generation"]
    assert int(second) > int(first)
    assert api.insert("a b/ü+%{}", b"4", query=f"&ifGenerationNotMatch={second}")[0] == 412
    assert api.call("DELETE", api.at("a b/ü+%{}", f"?ifGenerationMatch={first}"))[0] == 412
    assert api.call("GET", api.at("a b/ü+%{}", f"?alt=media&generation={first}"))[0] == 404
    assert api.call("GET", api.at("a b/ü+%{}", "?alt=media"))[2] == b"3"
    assert api.call("DELETE", api.at("a b/ü+%{}", f"?ifGenerationMatch={second}"))[0] == 204
    assert api.call("DELETE", api.at("a b/ü+%{}"))[0] == 404


def test_gcs_checksums(api: Api) -> None:
    good, bad = digests(b"abc"), digests(b"abd")
    for name, key in (("crc32c", "crc32c"), ("md5", "md5Hash")):
        assert api.insert("x", b"abc", X_Goog_Hash=f"{name}={bad[key]}")[0] == 400
        assert api.insert("x", b"abc", X_Goog_Hash=f"{name}={good[key]}")[0] == 200
        body = json.dumps({"name": "y", key: bad[key]}).encode()
        parts = b"--=\nContent-Type: application/json\n\n%s\n--=\nContent-Type: a/b\n\nabc\n--=--" % body
        kind = 'multipart/related; boundary="="'
        assert api.call("POST", f"/upload{api.objects}?uploadType=multipart", parts, Content_Type=kind)[0] == 400
    assert api.call("GET", api.at("y"))[0] == 404
    assert good.items() <= api.resource("x").items()


def test_gcs_ranges(api: Api) -> None:
    api.insert("r", b"0123456789")
    for asked, status, data in (("0-3", 206, b"0123"), ("8-99", 206, b"89"), ("-2", 206, b"89"), ("10-11", 416, None)):
        answer = api.call("GET", api.at("r", "?alt=media"), Range=f"bytes={asked}")
        assert answer[0] == status, asked
        assert data is None or answer[2] == data, asked


def test_gcs_resumable(api: Api) -> None:
    chunk, rest = os.urandom(256 << 10), b"the end"
    size = len(chunk) + len(rest)
    place = api.start("big", "&ifGenerationMatch=0")
    first = api.call("PUT", place, chunk, Content_Range=f"bytes 0-{len(chunk) - 1}/*")
    assert (first[0], first[1]["Range"]) == (308, f"bytes=0-{len(chunk) - 1}")
    assert api.call("GET", api.at("big"))[0] == 404
    assert api.call("PUT", place, b"", Content_Range="bytes */*")[0] == 308
    last = f"bytes {len(chunk)}-{size - 1}/{size}"
    assert api.call("PUT", place, rest, Content_Range=last)[0] == 200
    assert api.call("PUT", place, rest, Content_Range=last)[0] == 200  # its answer was lost, say
    assert api.call("GET", api.at("big", "?alt=media"))[2] == chunk + rest
    place = api.start("taken", "&ifGenerationMatch=0")
    api.insert("taken", b"by another")
    assert api.call("PUT", place, b"late", Content_Range="bytes 0-3/4")[0] == 412


def test_gcs_list_copy_compose(api: Api) -> None:
    for i in range(5):
        api.insert(f"p/{i}", b"%d" % i)
        api.insert(f"p/d{i % 2}/{i}", b"")
    api.insert("q", b"")
    names: list[str] = []
    token = ""
    for _ in range(20):
        page = json.loads(api.call("GET", f"{api.objects}?prefix=p/&delimiter=/&maxResults=2{token}")[2])
        names += [item["name"] for item in page.get("items", [])] + page.get("prefixes", [])
        if "nextPageToken" not in page:
            break
        token = f"&pageToken={page['nextPageToken']}"
    assert names == [*(f"p/{i}" for i in range(5)), "p/d0/", "p/d1/"]
    copied = api.call("POST", api.at("p/3", "/rewriteTo" + api.at("copy").removeprefix("/storage/v1")), b"{}")
    assert json.loads(copied[2])["done"]
    wanted = json.dumps({"sourceObjects": [{"name": "p/1"}, {"name": "copy"}]}).encode()
    assert api.call("POST", api.at("sum", "/compose"), wanted)[0] == 200
    assert api.call("GET", api.at("sum", "?alt=media"))[2] == b"13"
    assert api.call("GET", f"{api.objects}-nothere?prefix=p")[0] == 404


def test_gcs_race_has_one_winner(api: Api) -> None:
    def media(i: int) -> int:
        return api.insert("race", b"%d" % i, query="&ifGenerationMatch=0")[0]

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(media, range(8))) == [200, *[412] * 7]
        places = list(pool.map(lambda _: api.start("race2", "&ifGenerationMatch=0"), range(8)))
        answers = pool.map(lambda p: api.call("PUT", p, b"x", Content_Range="bytes 0-0/1")[0], places)
        assert sorted(answers) == [200, *[412] * 7]


def test_gcs_objects_are_whole_or_absent(api: Api) -> None:
    host, _, port = api.address.partition(":")
    with socket.create_connection((host, int(port))) as s:
        path = f"/upload{api.objects}?uploadType=media&name=half"
        s.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000\r\n\r\n".encode() + b"x" * 500_000)
    time.sleep(0.2)
    assert api.call("GET", api.at("half"))[0] == 404


def test_gcs_survives_sigkill(tmp_path: Path) -> None:
    with gcs(tmp_path, persist=True) as bucket:
        Api(bucket).insert("kept", b"data")
        before = Api(bucket).resource("kept")
        os.kill(RUNNING[-1].process.pid, signal.SIGKILL)
    with gcs(tmp_path / "again") as other:  # a new, empty one is empty
        assert Api(other).call("GET", Api(other).at("kept"))[0] == 404
    command = [sys.executable, "-m", "tests.servers.gcs", "--dir", str(tmp_path / "data"), "--port"]
    with run_server("gcs", lambda port: [*command, str(port)], log=tmp_path / "gcs.log") as server:
        api = Api(bucket.via(server.endpoint))
        assert api.resource("kept") == before
        assert api.call("GET", api.at("kept", "?alt=media"))[2] == b"data"


def test_missing_tool_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ServerError, match="make tools"):
        process.tool("nothing/of/this/name")


def test_server_that_dies_shows_its_log(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo the reason; exit 3"]
    with pytest.raises(ServerError, match=r"status 3(?s:.*)the reason"):  # noqa: SIM117
        with run_server("broken", lambda port: command, log=tmp_path / "log"):
            pytest.fail("unreachable")


def test_link_is_as_fast_as_its_rate() -> None:
    link, began = Link(40, delay_s=0.02), time.monotonic()
    arrives = [link.reserve(1 << 18) for _ in range(16)][-1]  # 4 MiB
    assert 0.838 < arrives - 0.02 - began < 0.84 + time.monotonic() - began


def test_link_has_its_rate_and_delay(gcs_server: Bucket) -> None:
    data = os.urandom(1 << 20)
    with Proxy(gcs_server.endpoint, up=Link(40, delay_s=0.02), down=Link(80, delay_s=0.02)) as proxy:
        api = Api(gcs_server.via(proxy.endpoint))
        start = time.monotonic()
        api.insert("small", b"")
        assert time.monotonic() - start >= 0.08  # a handshake and a request, 40 ms each
        with ThreadPoolExecutor(4) as pool:  # 4 MiB share 40 Mbit/s: 0.84 s, whatever the number of connections
            start = time.monotonic()
            list(pool.map(lambda i: api.insert(f"link{i}", data), range(4)))
            up_s = time.monotonic() - start
            start = time.monotonic()
            got = list(pool.map(lambda i: api.call("GET", api.at(f"link{i}", "?alt=media"))[2], range(4)))
            down_s = time.monotonic() - start
        assert set(got) == {data}
        assert 0.84 <= up_s < 10  # the machine may pause
        assert 0.42 <= down_s < 10


def test_faults_hit_the_matching_request_of_a_kept_connection(gcs_server: Bucket) -> None:
    with Proxy(gcs_server.endpoint) as proxy:
        api = Api(gcs_server.via(proxy.endpoint))
        fault = proxy.fail("status", r"^GET .*/o/keep", times=1, skip=1, status=429)
        connection = http.client.HTTPConnection(api.address, timeout=30)
        statuses = []
        for path in (api.at("other"), api.at("keep"), api.at("keep"), api.at("keep")):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
        assert statuses == [404, 404, 429, 404]
        assert fault.fired == 1
        assert len(proxy.requests) == 4


def test_lost_answer_leaves_the_object(gcs_server: Bucket) -> None:
    with Proxy(gcs_server.endpoint) as proxy:
        api = Api(gcs_server.via(proxy.endpoint))
        fault = proxy.fail("lost_ack", r"^POST .*name=lost")
        with pytest.raises(ConnectionError):
            api.insert("lost", b"done")
        assert fault.fired == 1
        assert api.call("GET", api.at("lost", "?alt=media"))[2] == b"done"
