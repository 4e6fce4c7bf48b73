"""A checkpoint as a folder of safetensors files that other programs load: model.safetensors, or shards and their index.

It needs no torch unless dtypes are converted, and never holds more than ``Config.budget_bytes`` of tensors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gpumove.config import Config
from gpumove.errors import ConfigError, StoreError
from gpumove.fetch import fetch
from gpumove.format.boxes import Box
from gpumove.format.dtypes import item_bytes
from gpumove.format.pointer import ExportedFile, Pointer
from gpumove.inspection.export_plan import CONVERTIBLE, File, Tensor, lay_out, runs, select, tied_names
from gpumove.inspection.folder import appearing, companions, created, saying, sum_of, sync, write_at, write_file
from gpumove.inspection.receipt import RECEIPT, Receipt
from gpumove.inspection.run import open_run, pick
from gpumove.inspection.survey import Progress
from gpumove.ranges import Wanted
from gpumove.store.objects import Store
from gpumove.store.records import read_manifest, read_parts
from gpumove.version import __version__

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_OURS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|gpumove-export\.json"
    r"|\.(model|gpumove-export).*\.[0-9a-f]{8}\.part"
)
_TEMP = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")


@dataclass(frozen=True)
class ExportReport:
    """What was written. ``tied`` maps the names that were left out to those that hold the same bytes."""

    out: str
    step: int
    files: tuple[str, ...]
    tensors: int
    tensor_bytes: int
    tied: dict[str, str]
    seconds: float


def export(
    url: str,
    out: str | os.PathLike[str],
    *,
    step: int | Pointer | None = None,
    what: str = "model",
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    drop_tied: bool = False,
    force: bool = False,
    beside: str | os.PathLike[str] | None = None,
    config: Config | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a checkpoint's tensors as safetensors files. Nothing is claimed.

    Args:
        url: the run.
        out: a folder, made if absent.
        step: which checkpoint: its step, a pointer, or the newest if None.
        what: ``"model"``, ``"all"``, or the beginning of names in whole words, such as ``"objects.ema"``. It is removed
            from the names, except for ``"all"``.
        dtype: turn floating point tensors into this dtype; needs torch.
        max_shard_bytes: begin another file rather than exceed this; a tensor that is larger gets its own.
        drop_tied: write tensors that were stored once because they are tied under their first name only.
        force: write into a folder that is not empty, replacing an earlier export.
        beside: a folder whose files, all but weights, are copied too: configuration, tokenizer, licence.
        config: bounds; by default from the environment.
        storage_options: for fsspec.
        progress: told (bytes written, bytes to write).

    Raises:
        ConfigError: no such run, checkpoint or tensors; a dtype that safetensors lacks; a folder that is not empty.
        IntegrityError: the checkpoint is damaged. No complete file of it appears under its final name.
        StoreError: the store or the disk failed.
    """
    began, config = time.perf_counter(), Config.from_env() if config is None else config
    folder = Path(out)
    _check_request(folder, dtype=dtype, max_shard_bytes=max_shard_bytes, force=force)
    more = [] if beside is None else [p for p in companions(Path(beside)) if not _OURS.fullmatch(p.name)]
    with open_run(url, config=config, storage_options=storage_options) as log:
        checkpoint = pick(log.read(), step, url=log.store.url)
        manifest = read_manifest(log.store, checkpoint)
        parts = read_parts(log.store, manifest.parts, concurrency=config.concurrency)
        tensors = select(parts, what=what, dtype=dtype)
        tied = tied_names(tensors) if drop_tied else {}
        tensors = [t for t in tensors if t.name not in tied]
        files = lay_out(tensors, max_shard_bytes=max_shard_bytes)
        receipt = Receipt(
            __version__, manifest.run, checkpoint.step, checkpoint.attempt, checkpoint.manifest, what, dtype, {}
        )
        with saying(folder), appearing(folder) as into:
            writer = _Writer(log.store, config, into, files, progress or (lambda done, total: None))
            writer.write_all(receipt, more)
    return ExportReport(
        out=str(folder), step=checkpoint.step, files=tuple(f.name for f in files), tensors=len(tensors),
        tensor_bytes=sum(t.nbytes for t in tensors), tied=tied, seconds=time.perf_counter() - began,
    )  # fmt: skip


def _check_request(folder: Path, *, dtype: str | None, max_shard_bytes: int, force: bool) -> None:
    if dtype is not None and dtype not in CONVERTIBLE:
        raise ConfigError(f"cannot convert to {dtype!r}: choose one of {', '.join(CONVERTIBLE)}")
    if max_shard_bytes < 1:
        raise ConfigError(f"the largest size of a file must be above 0, not {max_shard_bytes}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: name another folder, or use --force to replace an earlier export")


def _stating(config: bytes, dtype: str | None) -> bytes:
    """A model's configuration, where it states a dtype: that of the weights now. Loaders believe it, not them."""
    try:
        found = json.loads(config)
    except ValueError:
        return config
    stated = [key for key in ("dtype", "torch_dtype") if isinstance(found, dict) and isinstance(found.get(key), str)]
    if dtype is None or not stated:
        return config
    return json.dumps({**found, **dict.fromkeys(stated, dtype)}, indent=2).encode() + b"\n"


class _Writer:
    """Writes files one after the other; the chunks of each in parallel."""

    def __init__(self, store: Store, config: Config, folder: Path, files: Sequence[File], progress: Progress) -> None:
        self._store, self._config, self._folder, self._files, self._progress = store, config, folder, files, progress
        self._total = sum(t.nbytes for f in files for t in f.tensors)
        self._done = 0
        self._lock = threading.Lock()

    def write_all(self, receipt: Receipt, more: Sequence[Path]) -> None:
        """All files under other names; then away with an earlier export, and each gets its own, the receipt last."""
        need, free = sum(f.nbytes for f in self._files), shutil.disk_usage(self._folder).free
        if free < need:
            raise StoreError(f"{self._folder} has {free} bytes free and {need} are needed", code="store.no_space")
        temps: dict[str, Path] = {}
        try:
            for file in self._files:
                self._write(self._temp(file.name, temps), file)
            if len(self._files) > 1:
                write_file(self._temp(INDEX, temps), self._index())
            for path in more:
                data = path.read_bytes()
                write_file(self._temp(path.name, temps), _stating(data, receipt.dtype) if path.name == CONFIG else data)
            sums = {f.name: ExportedFile(f.nbytes, sum_of(temps[f.name])) for f in self._files}
            sums |= {name: ExportedFile(p.stat().st_size, sum_of(p)) for name, p in temps.items() if name not in sums}
            whole = msgspec.structs.replace(receipt, files=sums)
            write_file(self._temp(RECEIPT, temps), msgspec.json.format(msgspec.json.encode(whole)) + b"\n")
            self._retire(temps)
            for name, temp in temps.items():
                os.replace(temp, self._folder / name)
        finally:
            for temp in temps.values():
                temp.unlink(missing_ok=True)
        sync(self._folder)

    def _temp(self, name: str, temps: dict[str, Path]) -> Path:
        temps[name] = self._folder / f".{name}.{uuid.uuid4().hex[:8]}.part"
        return temps[name]

    def _retire(self, temps: Mapping[str, Path]) -> None:
        """Remove an earlier export, and what a broken one left: files of two exports must never look like one model,
        not even after a crash."""
        keep = set(temps.values())
        for path in self._folder.iterdir():
            left = _TEMP.fullmatch(path.name)
            if path not in keep and (_OURS.fullmatch(path.name) or (left and left[1] in temps)):
                path.unlink()
        sync(self._folder)

    def _index(self) -> bytes:
        where = {t.name: f.name for f in self._files for t in f.tensors}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
        return json.dumps(index, indent=2).encode() + b"\n"

    def _write(self, path: Path, file: File) -> None:
        with created(path) as fd:
            os.ftruncate(fd, file.nbytes)
            write_at(fd, file.head, 0)
            wanted = [
                Wanted(tensor.name, chunk, self._placer(fd, tensor, start, chunk.box))
                for tensor, start in zip(file.tensors, file.starts)
                for chunk in tensor.chunks
            ]
            fetch(self._store, wanted, config=self._config)

    def _placer(self, fd: int, tensor: Tensor, start: int, box: Box) -> Callable[[memoryview], None]:
        """What writes one chunk to where it belongs in the file."""
        size = item_bytes(tensor.dtype)

        def place(data: memoryview) -> None:
            data, at = convert(data, tensor.stored, tensor.dtype), 0
            for first, count in runs(tensor.shape, box.offset, box.shape):
                write_at(fd, data[at : at + count * size], start + first * size)
                at += count * size
            with self._lock:
                self._done += len(data)
                self._progress(self._done, self._total)

        return place


def convert(data: memoryview, stored: str, dtype: str) -> memoryview:
    """Elements of one dtype as another; the same bytes if it is the same.

    Raises:
        ConfigError: torch is not installed.
    """
    if stored == dtype or not len(data):
        return data
    try:
        import torch
    except ImportError:
        raise ConfigError("converting dtypes needs torch: install it, or leave --dtype out") from None
    source = torch.frombuffer(bytearray(data), dtype=getattr(torch, stored))
    return source.to(getattr(torch, dtype)).view(torch.uint8).numpy().data
