"""Outputs in a safetensors file, as bytes: without torch, and whatever their dtype."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, deserialize

from gpumove.errors import ConfigError
from gpumove.format.dtypes import SAFETENSORS_DTYPES

_DTYPES = {known: name for name, known in SAFETENSORS_DTYPES.items()}


def read_outputs(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a file: torch's name of its dtype, its shape, and its bytes.

    Raises:
        ConfigError: there is no such file, or it is none.
    """
    try:
        found = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from error
    outputs = {}
    for name, tensor in found:
        if tensor["dtype"] not in _DTYPES:
            raise ConfigError(f"{path}: the tensor {name} has the dtype {tensor['dtype']}, which gpumove does not know")
        outputs[name] = (_DTYPES[tensor["dtype"]], tuple(tensor["shape"]), bytes(tensor["data"]))
    if not outputs:
        raise ConfigError(f"{path} holds no tensors")
    return outputs
