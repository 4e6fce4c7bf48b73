"""Python values to and from tagged JSON (docs/format.md, section 5); tensors are taken out by name. No pickle, ever."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from gpumove.errors import ConfigError, IntegrityError

_INT64 = range(-(1 << 63), 1 << 63)


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype without the prefix, as the format writes it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a format name.

    Raises:
        ConfigError: this torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"the checkpoint holds tensors of dtype {name!r}, which torch {torch.__version__} lacks")
    return dtype


def flatten(path: str, value: Any, sink: dict[str, torch.Tensor]) -> Any:
    """Turn a value into tagged JSON.

    Args:
        path: the value's name; tensors inside are named below it.
        value: dicts, lists, tuples, sets, numbers, strings, bytes, numpy and torch values, nested as you like.
        sink: receives the tensors, by reference.

    Raises:
        ConfigError: something inside cannot be encoded; the message names its path.
    """
    if value is None or isinstance(value, (bool, str)):
        return value if type(value) in (type(None), bool, str) else _plain(path, value)
    if isinstance(value, torch.Tensor):
        while path in sink:  # "a.b" as a key and "b" inside "a" would meet here
            path += "~"
        sink[path] = value.detach()
        return {"$tensor": path}
    for kind, encode in _ENCODERS.items():
        if type(value) is kind:
            return encode(path, value, sink)
    return _plain(path, value)


def _plain(path: str, value: Any) -> Any:
    """Values whose class is not matched exactly."""
    if isinstance(value, np.generic) and np.dtype(value.dtype.str) == value.dtype and not value.dtype.hasobject:
        return {"$npscalar": [value.dtype.str, _b64(value.tobytes())]}
    raise ConfigError(
        f"the value at {path!r} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved "
        "exactly without pickle: store numbers, strings, bytes, containers, numpy arrays or tensors, "
        "or give the object state_dict() and load_state_dict()",
        code="config.unencodable",
    )


def _b64(data: bytes | memoryview) -> str:
    return base64.b64encode(data).decode()


def _list(path: str, value: Any, sink: dict[str, torch.Tensor]) -> list[Any]:
    return [flatten(f"{path}.{i}", item, sink) for i, item in enumerate(value)]


def _pairs(path: str, value: Mapping[Any, Any], sink: dict[str, torch.Tensor]) -> list[Any]:
    return [[flatten(f"{path}<key>", k, sink), flatten(f"{path}.{k}", v, sink)] for k, v in value.items()]


def _dict(path: str, value: Mapping[Any, Any], sink: dict[str, torch.Tensor]) -> Any:
    if all(type(k) is str and not k.startswith("$") for k in value):
        return {k: flatten(f"{path}.{k}", v, sink) for k, v in value.items()}
    return {"$dict": _pairs(path, value, sink)}


def _float(_path: str, value: float, _sink: object) -> Any:
    return value if math.isfinite(value) else {"$float": str(value)}


def _int(_path: str, value: int, _sink: object) -> Any:
    return value if value in _INT64 else {"$int": str(value)}


def _sorted(value: Any) -> list[Any]:
    return sorted(value, key=repr)  # sets have no order, and equal states must give equal bytes


def _ndarray(path: str, value: np.ndarray[Any, Any], _sink: object) -> Any:
    if value.dtype.hasobject or np.dtype(value.dtype.str) != value.dtype:
        raise ConfigError(
            f"the array at {path!r} has the dtype {value.dtype}, which cannot be saved", code="config.unencodable"
        )
    return {"$ndarray": [value.dtype.str, list(value.shape), _b64(np.ascontiguousarray(value).tobytes())]}


_ENCODERS: dict[type, Callable[[str, Any, dict[str, torch.Tensor]], Any]] = {
    int: _int,
    float: _float,
    dict: _dict,
    list: _list,
    tuple: lambda p, v, s: {"$tuple": _list(p, v, s)},
    set: lambda p, v, s: {"$set": _list(p, _sorted(v), s)},
    frozenset: lambda p, v, s: {"$frozenset": _list(p, _sorted(v), s)},
    deque: lambda p, v, s: {"$deque": [_list(p, v, s), v.maxlen]},
    OrderedDict: lambda p, v, s: {"$odict": _pairs(p, v, s)},
    Counter: lambda p, v, s: {"$counter": _pairs(p, v, s)},
    bytes: lambda _p, v, _s: {"$bytes": _b64(v)},
    bytearray: lambda _p, v, _s: {"$bytearray": _b64(v)},
    io.BytesIO: lambda _p, v, _s: {"$bytesio": _b64(v.getvalue())},
    complex: lambda p, v, s: {"$complex": [_float(p, v.real, s), _float(p, v.imag, s)]},
    np.ndarray: _ndarray,
    torch.dtype: lambda _p, v, _s: {"$dtype": dtype_name(v)},
    torch.device: lambda _p, v, _s: {"$device": str(v)},
    torch.Size: lambda _p, v, _s: {"$size": list(v)},
}


def tensor_names(tree: Any) -> list[str]:
    """The names of all tensors that a tagged tree refers to."""
    if isinstance(tree, list):
        return [name for item in tree for name in tensor_names(item)]
    if isinstance(tree, dict):
        if isinstance(name := tree.get("$tensor"), str):
            return [name]
        return [name for item in tree.values() for name in tensor_names(item)]
    return []


def unflatten(tree: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    """Rebuild a value from tagged JSON.

    Args:
        tree: what :func:`flatten` gave.
        tensor: finds a tensor by its name.

    Raises:
        IntegrityError: the tree is not well formed.
    """
    if isinstance(tree, list):
        return [unflatten(item, tensor) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree), "")
    if len(tree) != 1 or not tag.startswith("$"):
        return {k: unflatten(v, tensor) for k, v in tree.items()}
    body = tree[tag]
    if tag == "$tensor":
        return tensor(body)
    if tag not in _DECODERS:
        raise ConfigError(
            f"the checkpoint uses the value tag {tag!r}, which this gpumove does not know: upgrade gpumove"
        )
    try:
        return _DECODERS[tag](body, lambda t: unflatten(t, tensor))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise IntegrityError(
            f"a saved value with the tag {tag} is malformed ({error})", code="integrity.value"
        ) from error


def _array(body: Any) -> np.ndarray[Any, Any]:
    dtype, shape, text = body
    array: np.ndarray[Any, Any] = np.frombuffer(base64.b64decode(text), dtype=np.dtype(dtype)).reshape(shape).copy()
    return array


def _npscalar(body: Any) -> Any:
    return np.frombuffer(base64.b64decode(body[1]), dtype=np.dtype(body[0]))[0]


_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "$tuple": lambda b, go: tuple(go(b)),
    "$set": lambda b, go: set(go(b)),
    "$frozenset": lambda b, go: frozenset(go(b)),
    "$deque": lambda b, go: deque(go(b[0]), maxlen=b[1]),
    "$dict": lambda b, go: {go(k): go(v) for k, v in b},
    "$odict": lambda b, go: OrderedDict((go(k), go(v)) for k, v in b),
    "$counter": lambda b, go: Counter({go(k): go(v) for k, v in b}),
    "$bytes": lambda b, _: base64.b64decode(b),
    "$bytearray": lambda b, _: bytearray(base64.b64decode(b)),
    "$bytesio": lambda b, _: io.BytesIO(base64.b64decode(b)),
    "$float": lambda b, _: float(b),
    "$int": lambda b, _: int(b),
    "$complex": lambda b, go: complex(go(b[0]), go(b[1])),
    "$ndarray": lambda b, _: _array(b),
    "$npscalar": lambda b, _: _npscalar(b),
    "$dtype": lambda b, _: dtype_of(b),
    "$device": lambda b, _: torch.device(b),
    "$size": lambda b, _: torch.Size(b),
}
