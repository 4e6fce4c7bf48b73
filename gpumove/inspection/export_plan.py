"""Which tensors an export writes, under which names, in which files, and where. Decides only: no I/O, no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpumove.errors import ConfigError, IntegrityError
from gpumove.format.dtypes import SAFETENSORS_DTYPES, item_bytes
from gpumove.format.manifest import Part, TensorEntry
from gpumove.format.pack import header, shape_bytes
from gpumove.format.stored import Placed, Shelf

CONVERTIBLE = ("float64", "float32", "float16", "bfloat16")
"""What dtypes are converted from and to; eight-bit floats come with scales, and integers are no weights."""


@dataclass(frozen=True)
class Tensor:
    """A tensor on its way out: its name there, what it is stored as here, and its chunks from all parts."""

    name: str
    stored: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Placed, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return shape_bytes(self.shape, item_bytes(self.dtype))


@dataclass(frozen=True)
class File:
    """One file to write: its tensors in order, what precedes them, and where each begins."""

    name: str
    tensors: tuple[Tensor, ...]
    head: bytes
    starts: tuple[int, ...]
    nbytes: int


def select(parts: Sequence[Part], *, what: str, dtype: str | None) -> list[Tensor]:
    """The tensors that are asked for, whole, in the order of their names.

    Raises:
        ConfigError: there are none, or safetensors has no such dtype.
        IntegrityError: their chunks do not make them up.
    """
    entries: dict[str, TensorEntry] = {}
    chunks: dict[str, list[Placed]] = {}
    if [part.rank for part in parts] != list(range(parts[0].world_size if parts else 1)):
        raise IntegrityError(f"the checkpoint has the parts of ranks {[part.rank for part in parts]} only")
    inside = _in_values(parts[0].values) if what.split(".")[0] == "model" else frozenset[str]()
    for part in parts:
        shelf = Shelf(part)
        # Tensors of one rank alone (buffers) come from rank 0, as a new rank would get them.
        for entry in (*part.tensors, *(part.local if part.rank == 0 else ())):
            if _matches(entry.fqn, what) and entry.fqn not in inside:
                entries[entry.fqn] = entry
                chunks.setdefault(entry.fqn, []).extend(shelf.placed(entry))
    if not entries:
        have = sorted({e.fqn.split(".")[0] for part in parts for e in (*part.tensors, *part.local)})
        raise ConfigError(f"the checkpoint has no tensors under {what!r}; it has {', '.join(have) or 'none at all'}")
    tensors = [_tensor(entries[fqn], chunks[fqn], what=what, dtype=dtype) for fqn in sorted(entries)]
    if unknown := [f"{t.name} ({t.dtype})" for t in tensors if t.dtype not in SAFETENSORS_DTYPES]:
        raise ConfigError(f"safetensors has no such dtype: {', '.join(unknown[:5])}; choose other tensors")
    return tensors


def _matches(fqn: str, what: str) -> bool:
    return what == "all" or fqn == what or fqn.startswith(f"{what}.")


def _tensor(entry: TensorEntry, chunks: Sequence[Placed], *, what: str, dtype: str | None) -> Tensor:
    if sum(chunk.box.volume() for chunk in chunks) != math.prod(entry.shape):
        raise IntegrityError(f"the chunks of {entry.fqn} do not make up its shape {list(entry.shape)}")
    name = entry.fqn
    if what != "all":
        name = entry.fqn.rpartition(".")[2] if entry.fqn == what else entry.fqn.removeprefix(f"{what}.")
    to = dtype if dtype is not None and entry.dtype in CONVERTIBLE else entry.dtype
    return Tensor(name, entry.dtype, to, entry.shape, tuple(chunks))


def _in_values(tree: Any) -> frozenset[str]:
    """Tensors inside of values, such as a module's extra state: no parameters or buffers, whatever their names."""
    if isinstance(tree, dict):
        if isinstance(name := tree.get("$tensor"), str):
            return frozenset((name,))
        tree = list(tree.values())
    return frozenset().union(*map(_in_values, tree)) if isinstance(tree, list) else frozenset()


def tied_names(tensors: Iterable[Tensor]) -> dict[str, str]:
    """Names whose bytes lie at the same place as an earlier one's -> that one. Tiny tensors are never seen as tied."""
    first: dict[object, str] = {}
    tied = {}
    for tensor in tensors:
        spots = sorted((c.stored.spot, c.box.offset) for c in tensor.chunks if c.stored is not None)
        place = (tensor.stored, tensor.shape, *spots)
        if 0 < len(spots) == len(tensor.chunks) and first.setdefault(place, tensor.name) != tensor.name:
            tied[tensor.name] = first[place]
    return tied


def lay_out(tensors: Sequence[Tensor], *, max_shard_bytes: int) -> list[File]:
    """Share tensors among files in the order given, and lay each file out."""
    groups: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [_file("model.safetensors", groups[0])]
    return [_file(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)]


def _file(name: str, tensors: Sequence[Tensor]) -> File:
    # Falling element size keeps every tensor aligned.
    ordered = tuple(sorted(tensors, key=lambda t: -item_bytes(t.dtype)))
    head = header([(t.name, SAFETENSORS_DTYPES[t.dtype], t.shape, t.nbytes) for t in ordered])
    ends = list(itertools.accumulate((t.nbytes for t in ordered), initial=len(head)))
    return File(name, ordered, head, tuple(ends[:-1]), ends[-1])


def runs(shape: Sequence[int], offset: Sequence[int], box: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The pieces of a box that are contiguous in the whole tensor, row by row: (first element, elements)."""
    depth = len(shape)
    while depth and box[depth - 1] == shape[depth - 1]:
        depth -= 1  # dimensions from here on are whole
    outer = max(depth - 1, 0)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    base = sum(o * s for o, s in zip(offset, strides))
    length = math.prod(box[outer:])
    for index in itertools.product(*(range(n) for n in box[:outer])):
        yield base + sum(i * s for i, s in zip(index, strides)), length
