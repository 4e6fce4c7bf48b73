"""Where a measured run stores its bytes: a directory or a bucket's prefix. Knows no peer."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse


@dataclass(frozen=True)
class Place:
    """One empty prefix for one run of one peer."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> Path | None:
        """The directory, if it is one."""
        parsed = urlparse(self.url)
        return Path(unquote(parsed.path)) if parsed.scheme == "file" else None

    def child(self, name: str) -> str:
        """The URL of something below."""
        return f"{self.url}/{name}"

    def file_system(self) -> Any:
        """An fsspec file system of our own, without caches."""
        import fsspec

        return fsspec.filesystem(
            urlparse(self.url).scheme, skip_instance_cache=True, use_listings_cache=False, **self.options
        )

    def newest(self) -> str:
        """The name of the last save of a peer that calls them step-N."""
        if self.local is not None:
            names = os.listdir(self.local)
        else:
            names = [path.rpartition("/")[2] for path in self.file_system().ls(self.url, detail=False)]
        return max((name for name in names if name.startswith("step-")), key=lambda name: int(name[5:]))

    def nbytes(self) -> int:
        """Bytes of all objects here."""
        if self.local is not None:
            return sum(path.stat().st_size for path in _files(self.local))
        found = self.file_system().find(self.url, detail=True)
        return sum(int(info["size"]) for info in found.values())

    def sync(self, name: str) -> None:
        """Make durable what a peer left in the page cache: files, then directories. A bucket needs no such help."""
        if self.local is None:
            return
        top = self.local / name
        for path in [*_files(top), *_directories(top), self.local]:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def evict(self) -> bool:
        """Drop the files from the page cache; False where that is not possible."""
        if self.local is None:
            return False
        for path in _files(self.local):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)  # dirty pages cannot be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        return True

    def remove(self, name: str = "") -> None:
        """Delete everything here, or one thing below."""
        if self.local is not None:
            target = self.local / name if name else self.local
            if target.is_file():
                target.unlink()
            else:
                shutil.rmtree(target, ignore_errors=True)
            return
        url = self.child(name) if name else self.url
        fs = self.file_system()
        if fs.exists(url):
            fs.rm(url, recursive=True)


@contextlib.contextmanager
def fresh_place(store: str, scratch: Path) -> Iterator[Place]:
    """An empty place, gone afterwards, and with it the S3 server, which keeps objects in memory."""
    if store == "file":
        place = Place((scratch / "run").resolve().as_uri())
        try:
            yield place
        finally:
            place.remove()
        return
    from tests.servers import ministack

    server = Path(tempfile.mkdtemp(dir=scratch))
    with ministack(server) as bucket:
        yield Place(f"{bucket.url}/run", bucket.options)
    shutil.rmtree(server, ignore_errors=True)


def _files(top: Path) -> Iterator[Path]:
    if top.is_file():
        yield top
        return
    yield from (path for path in sorted(top.rglob("*")) if path.is_file())


def _directories(top: Path) -> Iterator[Path]:
    if top.is_dir():
        yield top
        yield from (path for path in sorted(top.rglob("*")) if path.is_dir())
