"""The back end for a directory of a POSIX file system: durable, atomic, and never waiting longer than told.

It makes one plain call per method, without retries; it knows keys and bytes, and never why they are moved.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator, Sequence

from gpumove.errors import StoreError
from gpumove.store import retry
from gpumove.store.address import Address
from gpumove.store.backends import Backend, Buffer, ObjectInfo, Ranges
from gpumove.store.direct import Bounces, write_all, write_past_cache

TEMP_SUFFIX = ".gpumove-tmp"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_NO_DIR_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES)


def is_temporary(name: str) -> bool:
    """Whether a file is one that put or create has not published; older than a day, it is a leftover of a crash."""
    base = name.rpartition("/")[2]
    return base.startswith(".") and base.endswith(TEMP_SUFFIX)


class FileBackend(Backend):
    """A directory of a POSIX file system. Calls run in threads of their own: a hung mount cannot be interrupted."""

    parallel = False

    def __init__(self, address: Address) -> None:
        self._root = address.root
        self._bounces = Bounces()

    def put(self, key: str, data: Sequence[memoryview], seconds: float) -> None:
        """Temporary file, fsync, rename, fsync of the directory."""
        path = os.path.join(self._root, key)

        def work(ticket: retry.Ticket) -> None:
            with self._temporary(path, data) as temp:
                ticket.commit()
                os.replace(temp, path)
            _sync_directory(os.path.dirname(path))

        retry.in_thread(work, seconds)

    def create(self, key: str, data: bytes, seconds: float) -> None:
        """Temporary file, fsync, hard link to the name: link() fails if the name is taken, also on NFS."""
        path = os.path.join(self._root, key)

        def work(ticket: retry.Ticket) -> None:
            with self._temporary(path, [memoryview(data)]) as temp:
                ticket.commit()
                try:
                    os.link(temp, path)
                except OSError as error:
                    if error.errno in _NO_LINKS:
                        raise StoreError(
                            f"{path} cannot be created: this file system has no hard links ({error.strerror}), so two "
                            "writers could not be told apart; use another file system or an object store for the log",
                            code=retry.NO_CREATE.code,
                        ) from None
                    raise
                finally:
                    # Also if it was taken: it may be ours, made by a call whose own sync failed.
                    _sync_directory(os.path.dirname(path))

        retry.in_thread(work, seconds)

    def get(self, key: str, seconds: float) -> bytes:
        """One read of the whole file."""

        def work(ticket: retry.Ticket) -> bytes:
            with open(os.path.join(self._root, key), "rb") as file:
                return file.read()

        return retry.in_thread(work, seconds)

    def read(self, key: str, ranges: Ranges, out: Sequence[memoryview] | None, seconds: float) -> list[Buffer]:
        """One open, one preadv per range, straight into ``out`` where it is given."""

        def work(ticket: retry.Ticket) -> list[Buffer]:
            fd = os.open(os.path.join(self._root, key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                views = out or [memoryview(bytearray(end - start)) for start, end in ranges]
                return [_fill(fd, view, start) for view, (start, _) in zip(views, ranges)]
            finally:
                os.close(fd)

        return retry.in_thread(work, seconds)

    def info(self, key: str, seconds: float) -> ObjectInfo | None:
        """One stat."""

        def work(ticket: retry.Ticket) -> ObjectInfo | None:
            try:
                found = os.stat(os.path.join(self._root, key))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return ObjectInfo(key, found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

        return retry.in_thread(work, seconds)

    def page(self, prefix: str, token: str | None, seconds: float) -> tuple[list[ObjectInfo], str | None]:
        """One walk of everything below."""
        return retry.in_thread(lambda ticket: (list(_walk(self._root, prefix)), None), seconds)

    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """Unlink, fsync the directories, drop those that are empty now."""

        def work(ticket: retry.Ticket) -> None:
            paths = [os.path.join(self._root, key) for key in keys]
            for path in paths:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(path)
            for directory in sorted({os.path.dirname(path) for path in paths}, key=len, reverse=True):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    _sync_directory(directory)
                self._drop_empty(directory)

        retry.in_thread(work, seconds)

    def _drop_empty(self, directory: str) -> None:
        with contextlib.suppress(OSError):
            while directory != self._root:
                os.rmdir(directory)
                directory = os.path.dirname(directory)

    @contextlib.contextmanager
    def _temporary(self, path: str, data: Sequence[memoryview]) -> Iterator[str]:
        """A file beside ``path`` with the data, synced and checked; gone afterwards unless it was renamed."""
        temp = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}{TEMP_SUFFIX}")
        fd = _open_new(temp)
        try:
            try:
                if not write_past_cache(fd, data, self._bounces):
                    write_all(fd, data)
                os.fsync(fd)
                found, expected = os.fstat(fd).st_size, sum(view.nbytes for view in data)
            finally:
                os.close(fd)
            if found != expected:
                raise retry.MismatchError(f"the file has {found} bytes instead of {expected}")
            yield temp
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temp)


def _open_new(path: str) -> int:
    """Open a fresh file; its directory is made, and made again if a delete() drops it in between."""
    for _ in range(8):
        _make_directory(os.path.dirname(path))
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    raise OSError(errno.EAGAIN, "the directory keeps vanishing", os.path.dirname(path))


def _make_directory(path: str) -> None:
    """Like makedirs, but what it makes survives a power cut."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    if parent != path:
        _make_directory(parent)
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.mkdir(path)
        _sync_directory(parent)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_DIR_SYNC:  # some network mounts cannot, and need not
            raise
    finally:
        os.close(fd)


def _fill(fd: int, view: memoryview, offset: int) -> memoryview:
    """Read until the view is full or the file ends; the filled part."""
    done = 0
    while done < view.nbytes:
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return view[:done]


def _walk(root: str, prefix: str) -> Iterator[ObjectInfo]:
    try:
        entries = list(os.scandir(os.path.join(root, prefix)))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        key = prefix + entry.name
        with contextlib.suppress(FileNotFoundError):  # deleted while we look
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(root, key + "/")
            elif entry.is_file() and not is_temporary(key):
                found = entry.stat()
                yield ObjectInfo(key, found.st_size, found.st_mtime)
