"""Packs: many chunks in one valid safetensors object. Pure bytes; nothing is copied to build one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpumove.errors import IntegrityError
from gpumove.format.codec import Buffer, digest
from gpumove.format.dtypes import SAFETENSORS_DTYPES, item_bytes

_MAX_HEADER = 100 << 20
_DATA_ALIGN = 64
"""Data starts on a cache line: views of a fetched object are then aligned for every dtype."""
_PAGE = 4096
_PAGED_BYTES = 1 << 20
"""Data of larger packs starts on a page: what lies on pages in memory can go to a disk from there."""


@dataclass(frozen=True)
class PackItem:
    """One chunk on its way into a pack: its name there, its torch dtype and box shape, and the stored bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    stored: Buffer


@dataclass(frozen=True)
class PackImage:
    """A pack, ready to be put: the buffers whose concatenation is the object, and where each item lies in it."""

    buffers: list[Buffer]
    digest: str
    nbytes: int
    positions: list[int]


def box_name(fqn: str, *, shape: Sequence[int], offset: Sequence[int], box: Sequence[int]) -> str:
    """The safetensors name of a box: the tensor's own name if the box is the whole of it."""
    if tuple(box) == tuple(shape):
        return fqn
    return f"{fqn}[{','.join(f'{o}:{o + n}' for o, n in zip(offset, box))}]"


def header(entries: Sequence[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The head of a safetensors file: 8 bytes of length and the padded JSON.

    Args:
        entries: (name, safetensors dtype, shape, nbytes) in the order in which the data follows.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, nbytes in entries:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % (_DATA_ALIGN if at < _PAGED_BYTES else _PAGE))
    return len(text).to_bytes(8, "little") + text


def build(items: Sequence[PackItem]) -> PackImage:
    """Lay items out as one pack; ``positions[i]`` is where item i starts in the object."""
    order = sorted(range(len(items)), key=lambda n: _rank(items[n]))
    head = header([_entry(items[n]) for n in order])
    positions, buffers, at = [0] * len(items), [head], len(head)
    for n in order:
        positions[n] = at
        at += len(items[n].stored)
        buffers.append(items[n].stored)  # type: ignore[arg-type]
    return PackImage(buffers, digest(*buffers), at, positions)  # type: ignore[arg-type]


def _rank(item: PackItem) -> tuple[bool, int]:
    """Whole pages first: none then pushes the next off its page. Falling element size keeps the others aligned."""
    return len(item.stored) % _PAGE != 0, -(item_bytes(item.dtype) if item.codec == "raw/1" else 1)


def _entry(item: PackItem) -> tuple[str, str, Sequence[int], int]:
    if item.codec == "raw/1" and item.dtype in SAFETENSORS_DTYPES:
        return item.name, SAFETENSORS_DTYPES[item.dtype], item.shape, len(item.stored)
    name = item.name if item.codec == "raw/1" else f"{item.name}#{item.codec}"
    return name, "U8", (len(item.stored),), len(item.stored)


class Slot(NamedTuple):
    """One tensor in a safetensors header; ``start`` and ``stop`` count from the start of the object."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(data: Buffer, *, key: str, nbytes: int) -> dict[str, Slot]:
    """Read the head of a pack: what lies where.

    Args:
        data: the object, or at least its head.
        key: for messages.
        nbytes: the object's size.

    Raises:
        IntegrityError: it is not a safetensors file, or its table does not fit its size.
    """
    size = int.from_bytes(bytes(data[:8]), "little")
    try:
        if not 2 <= size <= _MAX_HEADER or 8 + size > nbytes:
            raise ValueError(f"header of {size} bytes")
        rows = {n: r for n, r in json.loads(bytes(data[8 : 8 + size])).items() if n != "__metadata__"}
        found = {
            n: Slot(r["dtype"], tuple(r["shape"]), *(8 + size + int(o) for o in r["data_offsets"]))
            for n, r in rows.items()
        }
        if any(not 8 + size <= slot.start <= slot.stop <= nbytes for slot in found.values()):
            raise ValueError("a tensor lies outside the file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{key} is not a readable pack ({error})", code="integrity.pack") from error
    return found


def shape_bytes(shape: Sequence[int], item_bytes: int) -> int:
    """Bytes of a box."""
    return math.prod(shape) * item_bytes
