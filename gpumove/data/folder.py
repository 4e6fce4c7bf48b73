"""The local folder of staged shards, shared by processes: who writes which, who reads which, what may go.

All of it is in the folder itself, and in locks that the kernel drops when their process dies, however that dies::

    <folder>/train/0001.tar                    a shard, whole and checked
    <folder>/.gpumove-stage/<source>/lock      held for every change below
                                    /parts/... what is being fetched, locked by who does it
                                    /held/...  a second name of every shard that this room wrote: of no other file

A shard that is in use is locked by its users, through any of its names. It knows no store.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from gpumove.errors import ConfigError, StoreError
from gpumove.format.codec import digest
from gpumove.store.retry import judge

ROOM = ".gpumove-stage"
_LOCK_S = 60.0
_STALE_S = 3600.0
"""A shard that nobody has used for so long is not fetched ahead any more: its process is gone."""
_NO_LINKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class Not(Enum):
    """Why a shard cannot be fetched now."""

    ALONE = "somebody else is fetching it"
    ROOM = "there is no room"


@dataclass(frozen=True)
class Lease:
    """A shard that stays as long as this is held."""

    name: str
    path: Path
    fd: int


@dataclass(frozen=True)
class Part:
    """A shard that is being fetched by this process alone."""

    name: str
    fd: int
    nbytes: int

    def write(self, at: int, data: memoryview) -> None:
        """Bytes from ``at`` on."""
        while data.nbytes:
            done = os.pwrite(self.fd, data, at)
            at, data = at + done, data[done:]


class Folder:
    """One source's shards in a local folder.

    Args:
        path: the folder; made if need be.
        source: the URL that the shards come from.
        limit_bytes: what is used is kept while all shards together have no more than this; None keeps nothing.
    """

    def __init__(self, path: Path, source: str, limit_bytes: int | None) -> None:
        self.path, self.limit_bytes = path, limit_bytes
        room = path / ROOM / digest(source.encode())[:16]
        self._parts, self._held, self._lock = room / "parts", room / "held", room / "lock"
        with said(path):
            for directory in (self._parts, self._held):
                directory.mkdir(parents=True, exist_ok=True)

    def tidy(self) -> None:
        """Remove what killed processes have left behind, and what is too much."""
        with said(self.path), self._locked():
            for path, _ in _files(self._parts):
                if (fd := _owned(path)) is not None:
                    path.unlink()
                    _let_go(fd)
            for path, found in _files(self._held):
                stale = self.limit_bytes is None and found.st_atime < time.time() - _STALE_S
                if stale or found.st_nlink < 2:
                    self._evict(path)
            self._make_room(0)

    def hold(self, name: str, nbytes: int | None) -> Lease | None:
        """A shard that is there, with this size if one is given."""
        with said(self.path / name), self._locked():
            return self._hold(name, nbytes)

    def _hold(self, name: str, nbytes: int | None) -> Lease | None:
        held, path = self._held / name, self.path / name
        try:
            fd = os.open(held, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if not _is(path, fd) or nbytes not in (None, os.fstat(fd).st_size):
            # Somebody removed or replaced the file; or the object is another one than when it was fetched.
            os.close(fd)
            self._remove(held)
            return None
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return Lease(name, path, fd)

    def claim(self, name: str, nbytes: int, *, must: bool) -> Lease | Part | Not:
        """Become the one who fetches a shard, unless it is there.

        Args:
            name: the shard.
            nbytes: its size.
            must: somebody waits for it: it is fetched even if there is no room within the limit.

        Raises:
            ConfigError: a file is in its place that was not written here.
        """
        with said(self.path / name), self._locked():
            if (lease := self._hold(name, nbytes)) is not None:
                return lease
            if os.path.lexists(self.path / name):
                raise _stranger(self.path / name)
            path = self._parts / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if (fd := _owned(path, os.O_CREAT)) is None:
                return Not.ALONE
            os.ftruncate(fd, 0)
            if not self._make_room(nbytes) and not must:
                path.unlink()
                _let_go(fd)
                return Not.ROOM
            os.ftruncate(fd, nbytes)  # its bytes count from now on
            return Part(name, fd, nbytes)

    def publish(self, part: Part) -> Lease:
        """Give a part that is whole its name."""
        draft, held, path = self._parts / part.name, self._held / part.name, self.path / part.name
        with said(path):
            os.fsync(part.fd)
            with self._locked():
                for directory in (held.parent, path.parent):
                    directory.mkdir(parents=True, exist_ok=True)
                held.unlink(missing_ok=True)
                # This name first: what has only the other one is not ours, and would be in the way for ever.
                os.link(draft, held)
                try:
                    os.link(draft, path)
                except FileExistsError:
                    held.unlink()
                    raise _stranger(path) from None
                draft.unlink()
                fcntl.flock(part.fd, fcntl.LOCK_SH)
        return Lease(part.name, path, part.fd)

    def drop(self, part: Part) -> None:
        """Give up on a part. Nobody may be writing to it any more."""
        with contextlib.suppress(OSError, StoreError), self._locked():
            (self._parts / part.name).unlink(missing_ok=True)
        _let_go(part.fd)

    def release(self, lease: Lease) -> None:
        """It was used. Without a limit it goes, unless somebody else uses it."""
        with contextlib.suppress(OSError, StoreError):
            os.utime(lease.fd, (time.time(), os.fstat(lease.fd).st_mtime))
            if self.limit_bytes is None:
                with self._locked():
                    fcntl.flock(lease.fd, fcntl.LOCK_UN)
                    self._evict(self._held / lease.name)
        _let_go(lease.fd)

    def make_room(self, nbytes: int) -> None:
        """Free space on the disk by what nobody uses, least recently used first."""
        freed = 0
        with said(self.path), self._locked():
            for path, found in sorted(_files(self._held), key=lambda item: item[1].st_atime):
                if freed < nbytes and self._evict(path):
                    freed += found.st_size

    def _make_room(self, nbytes: int) -> bool:
        """Evict until so much more is within the limit. Whether it is."""
        if self.limit_bytes is None:
            return True
        shards = sorted(_files(self._held), key=lambda item: item[1].st_atime)
        excess = nbytes - self.limit_bytes
        excess += sum(found.st_size for _, found in (*shards, *_files(self._parts)))
        for path, found in shards:
            if excess > 0 and self._evict(path):
                excess -= found.st_size
        return excess <= 0

    def _evict(self, held: Path) -> bool:
        """Remove a shard unless somebody uses it."""
        fd = _owned(held, mode=os.O_RDONLY)
        if fd is None:
            return False
        self._remove(held)
        _let_go(fd)
        return True

    def _remove(self, held: Path) -> None:
        path = self.path / held.relative_to(self._held)
        with contextlib.suppress(FileNotFoundError):
            if path.samefile(held):
                path.unlink()
        held.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The only one, among all processes and threads, who changes anything."""
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            until = time.monotonic() + _LOCK_S
            while not _flock(fd):
                if time.monotonic() > until:
                    raise StoreError(
                        f"{self._lock} has been locked for {_LOCK_S:.0f} s: a process that stages into {self.path} has "
                        "been stopped, or its disk hangs",
                        code="store.timeout",
                    )
                time.sleep(0.002)
            yield
        finally:
            _let_go(fd)


def _owned(path: Path, create: int = 0, *, mode: int = os.O_RDWR) -> int | None:
    """The file, locked by nobody but this; None if somebody has it, or if it is gone."""
    try:
        fd = os.open(path, mode | create | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    if _flock(fd):
        return fd
    os.close(fd)
    return None


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _let_go(fd: int) -> None:
    """Not by closing alone: a child that was forked meanwhile has the file open too."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _is(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()


def _stranger(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is in the way: it was not staged from this URL, so it is neither used nor replaced; stage each "
        "dataset into a folder of its own",
        code="config.stage_folder",
    )


@contextlib.contextmanager
def said(path: Path) -> Iterator[None]:
    """Failures of the local disk in words."""
    try:
        yield
    except OSError as error:
        fault = judge(error)
        advice = fault.advice.partition(";")[0]
        if error.errno in _NO_LINKS:
            advice = "stage to a file system that has hard links and locks"
        text = f"{path} cannot be staged: {error.strerror or error}"
        raise StoreError(f"{text}; {advice}" if advice else text, code=fault.code) from None
