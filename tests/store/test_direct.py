"""Writing past the page cache: the same bytes on the disk, wherever they lay in memory, or not at all."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gpumove.config import Config
from gpumove.store.direct import LEAST_BYTES, PAGE, Bounces, write_past_cache
from gpumove.store.objects import Store


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    yield fd
    os.close(fd)


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


def _pieces(seed: int) -> list[memoryview]:
    """Pieces of all lengths, on pages and off them, writable and not."""
    chance = random.Random(seed)
    arena = mmap.mmap(-1, 8 << 20)
    arena.write(chance.randbytes(8 << 20))
    found = []
    for _ in range(chance.randint(3, 12)):
        at = chance.choice((0, 1, 3)) * PAGE + chance.choice((0, 0, 0, 64, 4095))
        length = chance.choice((1, 63, PAGE - 1, PAGE, 5 * PAGE, 700_000, 3 << 20, (1 << 20) + 1))
        view = memoryview(arena)[at : at + length]
        found.append(view if chance.random() < 0.8 else memoryview(bytes(view)))
    return [memoryview(bytes(LEAST_BYTES)), *found]


@pytest.mark.parametrize("seed", range(40))
def test_what_is_written_is_what_was_given(fd: int, seed: int) -> None:
    data = _pieces(seed)
    assert write_past_cache(fd, data, Bounces())
    assert _content(fd) == b"".join(data)


def test_whole_pages_are_written_from_where_they_lie(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = mmap.mmap(-1, 4 << 20)
    head = memoryview(bytes(PAGE))
    chunks = [memoryview(arena)[i << 20 : (i + 1) << 20] for i in range(4)]
    written: list[memoryview] = []
    real = os.writev

    def spy(fd: int, buffers: Sequence[memoryview]) -> int:
        written.extend(buffers)
        return real(fd, buffers)

    monkeypatch.setattr(os, "writev", spy)
    assert write_past_cache(fd, [head, *chunks], Bounces())
    assert [v.nbytes for v in written if v.obj is arena] == [1 << 20] * 4


def test_the_page_cache_stays_empty(fd: int) -> None:
    data = [memoryview(os.urandom(4 << 20))]
    assert write_past_cache(fd, data, Bounces())
    os.fsync(fd)
    with pytest.raises(BlockingIOError):
        os.preadv(fd, [bytearray(PAGE)], 2 << 20, os.RWF_NOWAIT)


def test_small_files_go_the_usual_way(fd: int) -> None:
    assert not write_past_cache(fd, [memoryview(bytes(LEAST_BYTES - 1))], Bounces())
    assert _content(fd) == b""


@pytest.mark.parametrize("fails", ["flag", "write"])
def test_a_file_system_that_cannot_gets_the_usual_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Some refuse the flag, some take it and refuse the write; the flag is gone before the usual way begins."""
    data = os.urandom(3 << 20)
    asked = []
    real_fcntl, real_writev = fcntl.fcntl, os.writev

    def fake_fcntl(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            asked.append(fd)
            if fails == "flag":
                raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_fcntl(fd, command, flags)

    def fake_writev(fd: int, buffers: Sequence[memoryview]) -> int:
        if real_fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            real_writev(fd, [buffers[0][:PAGE]])  # some of it may be there already
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_writev(fd, buffers)

    monkeypatch.setattr(fcntl, "fcntl", fake_fcntl)
    if fails == "write":
        monkeypatch.setattr(os, "writev", fake_writev)
    store = Store.open(str(tmp_path), Config())
    store.put("packs/one", data)
    assert store.get("packs/one") == data
    store.close()
    assert asked


def test_a_full_disk_is_told_and_not_tried_the_other_way(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, buffers: Sequence[memoryview]) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match="no space left"):
        write_past_cache(fd, [memoryview(bytes(2 << 20))], Bounces())
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
