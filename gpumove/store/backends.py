"""What a back end is, and the two plain ones: memory, and any file system of fsspec that has no room of its own.

A back end makes one plain call per method, without retries; it knows keys and bytes, and never why they are moved.
"""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from gpumove.errors import ConfigError
from gpumove.store import retry
from gpumove.store.address import Address

Buffer = bytes | bytearray | memoryview
Ranges = Sequence[tuple[int, int]]


class ObjectInfo(NamedTuple):
    """One object: what every store can tell of it."""

    key: str
    """Relative to the run's root, '/'-separated."""
    nbytes: int
    mtime: float | None
    """Seconds since the epoch by the store's clock, or None if it does not tell."""
    sum: str = ""
    """What the store knows of the bytes, such as "crc32:00c0ffee". Asked of one object, never in a listing."""


class Backend(abc.ABC):
    """One family of stores. Every call is bounded by ``seconds``; all failures are plain exceptions."""

    parallel = True  # several ranges are worth several calls at once
    batch = 1000  # keys that one delete() takes
    access = "the permissions of the directory"  # where to look when access is denied

    @abc.abstractmethod
    def put(self, key: str, data: Sequence[memoryview], seconds: float) -> None:
        """Write a whole object, durable and checked; MismatchError if the store holds something else."""

    @abc.abstractmethod
    def create(self, key: str, data: bytes, seconds: float) -> None:
        """Write a whole object if, and only if, the key is free; FileExistsError otherwise."""

    @abc.abstractmethod
    def get(self, key: str, seconds: float) -> bytes:
        """A whole object."""

    @abc.abstractmethod
    def read(self, key: str, ranges: Ranges, out: Sequence[memoryview] | None, seconds: float) -> list[Buffer]:
        """Half-open, non-empty ranges, in ``out`` if that is cheaper. What lies beyond the end is left out."""

    @abc.abstractmethod
    def info(self, key: str, seconds: float) -> ObjectInfo | None:
        """Size and time of an object, asked of the store itself."""

    @abc.abstractmethod
    def page(self, prefix: str, token: str | None, seconds: float) -> tuple[list[ObjectInfo], str | None]:
        """Some of the objects whose keys start with ``prefix`` ("" or ending in "/"), and where to go on."""

    @abc.abstractmethod
    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """Delete at most ``batch`` objects; missing ones are fine."""

    def regions(self, seconds: float) -> tuple[str, ...]:
        """The regions that the data lies in, in lower case; none if the store does not tell."""
        return ()

    def fault(self, error: Exception, verb: str) -> retry.Fault:
        """What a failure of ``verb`` means."""
        return retry.judge(error)

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Let go of connections."""


# The files of memory:// are shared by the whole process, so what makes a create atomic must be too.
_MEMORY_LOCK = threading.Lock()


class MemoryBackend(Backend):
    """fsspec's memory file system: for tests and examples, gone with the process."""

    parallel = False

    def __init__(self, address: Address) -> None:
        from fsspec.implementations.memory import MemoryFileSystem

        self._fs = MemoryFileSystem(skip_instance_cache=True)
        self._root = "/" + address.root if address.root else ""

    def put(self, key: str, data: Sequence[memoryview], seconds: float) -> None:
        """Stored under the lock."""
        with _MEMORY_LOCK:
            self._fs.pipe_file(f"{self._root}/{key}", b"".join(data))

    def create(self, key: str, data: bytes, seconds: float) -> None:
        """Looked up and stored under one lock."""
        with _MEMORY_LOCK:
            if f"{self._root}/{key}" in self._fs.store:
                raise FileExistsError(key)
            self._fs.pipe_file(f"{self._root}/{key}", data)

    def get(self, key: str, seconds: float) -> bytes:
        """A copy."""
        with _MEMORY_LOCK:
            return bytes(self._fs.cat_file(f"{self._root}/{key}"))

    def read(self, key: str, ranges: Ranges, out: Sequence[memoryview] | None, seconds: float) -> list[Buffer]:
        """Copies, in ``out`` where it is given."""
        with _MEMORY_LOCK:
            parts: list[Buffer] = [self._fs.cat_file(f"{self._root}/{key}", start, end) for start, end in ranges]
        if out is None:
            return parts
        for view, part in zip(out, parts):
            view[: len(part)] = part
        return [view[: len(part)] for view, part in zip(out, parts)]

    def info(self, key: str, seconds: float) -> ObjectInfo | None:
        """Size and time."""
        with _MEMORY_LOCK:
            found = self._fs.store.get(f"{self._root}/{key}")
            return ObjectInfo(key, found.getbuffer().nbytes, found.modified.timestamp()) if found else None

    def page(self, prefix: str, token: str | None, seconds: float) -> tuple[list[ObjectInfo], str | None]:
        """Everything at once."""
        start = f"{self._root}/"
        with _MEMORY_LOCK:
            found = [(name, file) for name, file in self._fs.store.items() if name.startswith(start + prefix)]
            return [
                ObjectInfo(name[len(start) :], file.getbuffer().nbytes, file.modified.timestamp())
                for name, file in found
            ], None

    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """Dropped under the lock."""
        with _MEMORY_LOCK:
            for key in keys:
                self._fs.store.pop(f"{self._root}/{key}", None)


_MAKES_DIRECTORIES = ("sftp", "ssh", "smb", "hdfs", "webhdfs", "arrow_hdfs", "ftp", "dbfs")


class GenericBackend(Backend):
    """Any other fsspec file system. Whether its mode="create" is atomic, only the probe can tell."""

    access = "the storage options of its fsspec file system"

    def __init__(self, address: Address, options: Mapping[str, Any]) -> None:
        import fsspec

        scheme = address.url.partition("://")[0]
        if scheme not in fsspec.available_protocols():
            raise ConfigError(f"no store is known by the scheme {scheme}://; see docs/store.md for those that are")
        kind = fsspec.get_filesystem_class(scheme)
        given = {**kind._get_kwargs_from_urls(address.raw), **options}
        self._fs = kind(**{"skip_instance_cache": True, "use_listings_cache": False, **given})
        self._root = str(kind._strip_protocol(address.raw)).rstrip("/")
        names = (kind.protocol,) if isinstance(kind.protocol, str) else kind.protocol
        self._makes_directories = any(name in _MAKES_DIRECTORIES for name in names)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _pipe(self, key: str, data: bytes, mode: str) -> None:
        path = self._path(key)
        if self._makes_directories:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, data, mode=mode)

    def put(self, key: str, data: Sequence[memoryview], seconds: float) -> None:
        """One pipe_file, then the size is asked for."""

        def work(ticket: retry.Ticket) -> None:
            body = b"".join(data)
            ticket.commit()
            self._pipe(key, body, "overwrite")
            found = self._fs.info(self._path(key))["size"]
            if found != len(body):
                raise retry.MismatchError(f"the object has {found} bytes instead of {len(body)}")

        retry.in_thread(work, seconds)

    def create(self, key: str, data: bytes, seconds: float) -> None:
        """One pipe_file with mode="create"."""
        retry.in_thread(lambda ticket: self._pipe(key, data, "create"), seconds)

    def get(self, key: str, seconds: float) -> bytes:
        """One cat_file."""
        return retry.in_thread(lambda ticket: bytes(self._fs.cat_file(self._path(key))), seconds)

    def read(self, key: str, ranges: Ranges, out: Sequence[memoryview] | None, seconds: float) -> list[Buffer]:
        """One cat_file per range."""
        path = self._path(key)
        return retry.in_thread(
            lambda ticket: [self._fs.cat_file(path, start=start, end=end) for start, end in ranges], seconds
        )

    def info(self, key: str, seconds: float) -> ObjectInfo | None:
        """One info."""

        def work(ticket: retry.Ticket) -> ObjectInfo | None:
            try:
                found = self._fs.info(self._path(key))
            except FileNotFoundError:
                return None
            return ObjectInfo(key, found["size"], _mtime(found)) if found["type"] == "file" else None

        return retry.in_thread(work, seconds)

    def page(self, prefix: str, token: str | None, seconds: float) -> tuple[list[ObjectInfo], str | None]:
        """One find of everything below."""

        def work(ticket: retry.Ticket) -> list[ObjectInfo]:
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._path(prefix).rstrip("/"), detail=True)
            except FileNotFoundError:
                return []
            below = self._path("").lstrip("/")
            listed = [(str(name).lstrip("/"), item) for name, item in found.items()]
            return [
                ObjectInfo(name[len(below) :], item["size"], _mtime(item))
                for name, item in listed
                if name.startswith(below + prefix)
            ]

        return retry.in_thread(work, seconds), None

    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """One rm_file per key."""

        def work(ticket: retry.Ticket) -> None:
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(self._path(key))

        retry.in_thread(work, seconds)


def _mtime(info: Mapping[str, Any]) -> float | None:
    """The time of change in a record of fsspec, whose name depends on the file system."""
    for name in ("mtime", "LastModified", "last_modified", "modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None
