"""What a function gave, as named arrays of bytes on the host: tensors, numbers, and dicts and tuples of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from gpumove.errors import ConfigError
from gpumove.format.dtypes import item_bytes
from gpumove.parity.outputs import Array
from gpumove.state.aside import whole
from gpumove.state.values import dtype_name

_MOST = 64


def flatten(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What a probe gave, by name: keys and places joined with dots. None is left out."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(found, (list, tuple)):
        for place, value in enumerate(found):
            yield from flatten(value, f"{path}.{place}" if path else str(place))
    elif found is not None:
        yield path or "output", found


def named(found: Any) -> dict[str, Any]:
    """The same as a dict.

    Raises:
        ConfigError: there are none, too many for a manifest, or two of one name.
    """
    pairs = list(flatten(found))
    if not 0 < len(pairs) <= _MOST:
        raise ConfigError(f"it gave {len(pairs)} outputs: give from 1 to {_MOST} tensors")
    outputs = dict(pairs)
    if len(outputs) < len(pairs):
        raise ConfigError("two of its outputs have one name: keys and places are joined with dots")
    return outputs


def to_array(value: Any, name: str = "output") -> Array:
    """An output as bytes, on the host.

    Raises:
        ConfigError: it is neither a dense tensor nor an array nor a number.
    """
    if isinstance(value, torch.Tensor):
        tensor = whole(value).detach()
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise ConfigError(f"the output {name!r} is a tensor of layout {tensor.layout}: give a dense one")
        # A copy: FSDP frees the memory of whole parameters, which it cannot where numpy has seen it.
        flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).clone()
        item_bytes(dtype_name(tensor.dtype))
        return Array(dtype_name(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())
    found = np.asarray(value) if isinstance(value, (bool, int, float, np.ndarray, np.generic)) else None
    if found is None or found.dtype.kind not in "biufc":
        raise ConfigError(f"the output {name!r} is {type(value).__name__}: give tensors, or a dict or tuple of them")
    item_bytes(found.dtype.name)
    return Array(found.dtype.name, found.shape, found.astype(found.dtype.newbyteorder("<")).tobytes())


def to_arrays(outputs: Any) -> dict[str, Array]:
    """All outputs: a tensor, an array, or a dict or tuple of them."""
    return {name: to_array(value, name) for name, value in named(outputs).items()}
