"""Files and URLs that appear."""

from __future__ import annotations

import json
import os
import ssl
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from gpumove.notices.notice import Notice
from gpumove.notices.watched import File, Url, public
from tests.servers.metadata import Plain


def test_a_file_that_appears(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    source = File(str(path))
    assert source.poll() is None
    path.touch()
    assert source.poll() == Notice("file", None, f"{path} appeared")
    path.unlink()
    assert source.poll() is None


def test_a_file_says_who_when_and_why(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    path.write_text(json.dumps({"deadline": 1234.5, "source": "slurm", "detail": "end of\nthe partition's day"}))
    assert File(str(path)).poll() == Notice("slurm", 1234.5, "end of the partition's day")


def test_seconds_count_from_when_they_were_first_seen(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    path.write_text('{"in_s": 60}')
    source = File(str(path))
    first = source.poll()
    assert first is not None
    assert first.deadline is not None
    assert 50 < first.deadline - time.time() <= 60
    time.sleep(0.02)
    assert source.poll() == first
    path.write_text('{"in_s": 5}')
    nearer = source.poll()
    assert nearer is not None
    assert nearer.deadline is not None
    assert nearer.deadline < first.deadline


@pytest.mark.parametrize(
    "content",
    ["", "now", "[1]", '{"deadline": null}', '{"deadline": "soon"}', '{"deadline": true}', '{"in_s": NaN}',
     '{"deadline": 1e999}', '{"deadline": ' + "9" * 400 + "}", '{"in_s": 12', "[" * 60000, "\udcff"],
)  # fmt: skip
def test_any_content_is_a_notice(tmp_path: Path, content: str) -> None:
    path = tmp_path / "leave"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert File(str(path)).poll() == Notice("file", None, f"{path} appeared")


def test_a_huge_file_is_read_in_part(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    assert File(str(path)).poll() is not None
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8 << 20


def test_what_is_no_file_fails_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises((ValueError, OSError)):
            File(str(path)).poll()


def test_a_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = File("leave")
    monkeypatch.chdir("/")
    (tmp_path / "leave").touch()
    assert source.poll() is not None


def test_a_stranger_cannot_flood_the_log(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    path.write_text(json.dumps({"source": "x" * 500, "detail": "\x1b[31m" + "y" * 5000}))
    notice = File(str(path)).poll()
    assert notice is not None
    assert len(notice.source) == 32
    assert len(notice.detail) == 200
    assert "\x1b" not in notice.detail


def test_a_url_that_appears() -> None:
    with Plain() as server:
        source = Url(f"{server.base}/leave?key=secret")
        for status in (404, 410, 204):
            server.status = status
            assert source.poll() is None
        server.status = 200
        assert source.poll() == Notice("url", None, f"{server.base}/leave appeared")
        server.body = b'{"deadline": 99, "source": "price"}'
        assert source.poll() == Notice("price", 99.0, f"{server.base}/leave appeared")
        assert server.requests[-1] == "GET /leave?key=secret"
        for status in (403, 500):
            server.status = status
            with pytest.raises(ConnectionError, match=str(status)):
                source.poll()


def test_a_url_over_tls_needs_a_certificate_that_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Plain() as server:
        server.status = 200
        certificate = server.encrypt(tmp_path)
        source = Url(f"{server.base}/leave")
        with pytest.raises(ssl.SSLCertVerificationError):
            source.poll()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert source.poll() is not None


def test_a_url_shows_no_secret() -> None:
    assert public("https://me:word@host:8443/leave?sig=abc#x") == "https://host:8443/leave"


def test_a_file_written_in_two_goes_is_read_when_whole(tmp_path: Path) -> None:
    """A hook that does not rename into place: the half is a notice without a deadline, the whole has one."""
    path, source = tmp_path / "leave", File(str(tmp_path / "leave"))
    with path.open("w") as file:
        file.write('{"deadline": ')
        file.flush()
        half = source.poll()
        file.write("50}")
    whole = source.poll()
    assert half is not None
    assert half.deadline is None
    assert whole is not None
    assert whole.deadline == 50.0


def test_nothing_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    source = File(str(path))
    before = len(os.listdir("/proc/self/fd"))
    path.touch()
    for _ in range(50):
        source.poll()
    assert len(os.listdir("/proc/self/fd")) <= before + threading.active_count()
