"""Files and folders that others read: complete and on the disk before they have their names."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpumove.errors import ConfigError, StoreError
from gpumove.format.codec import digest_all

_PIECE = 8 << 20
WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".gguf", ".onnx", ".part",
)  # fmt: skip
"""What is not taken along from a model's folder."""


@contextmanager
def created(path: Path) -> Iterator[int]:
    """A new file, durable when this ends well."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Where to write, so that a folder that is not there yet appears whole: in one that gets its name in the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        yield folder
        return
    temp = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    temp.mkdir()
    try:
        yield temp
        os.rename(temp, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def companions(folder: Path) -> list[Path]:
    """The files of a model's folder that belong beside its weights."""
    try:
        found = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror or error}") from error
    found = [p for p in found if not p.name.endswith(WEIGHTS)]
    if not found:
        raise ConfigError(f"{folder} has no files that belong beside weights, such as config.json")
    return found


def sum_of(path: Path) -> str:
    """The digest of what lies on the disk."""
    with path.open("rb") as file:
        return digest_all(iter(lambda: file.read(_PIECE), b""))


def write_file(path: Path, data: bytes) -> None:
    """A new file, durable."""
    with created(path) as fd:
        write_at(fd, data, 0)


def sync(folder: Path) -> None:
    """Have the names in a folder outlast a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(fd: int, data: bytes | memoryview, at: int) -> None:
    """All of it, at this place."""
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written


@contextmanager
def saying(folder: Path) -> Iterator[None]:
    """The disk's failures as errors of ours."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"writing to {folder} failed: {error.strerror or error}", code="store.export") from error
