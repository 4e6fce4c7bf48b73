"""Packs are valid safetensors files, aligned and named as docs/format.md says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as load_safetensors

from gpumove.errors import IntegrityError
from gpumove.format.codec import digest
from gpumove.format.dtypes import SAFETENSORS_DTYPES
from gpumove.format.pack import PackItem, box_name, build, header, read_header
from gpumove.state.values import dtype_name

KNOWN = [d for d in SAFETENSORS_DTYPES if hasattr(torch, d)]


def _item(name: str, tensor: torch.Tensor) -> PackItem:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return PackItem(name, dtype_name(tensor.dtype), tuple(tensor.shape), "raw/1", memoryview(data))


@pytest.mark.parametrize("dtype", KNOWN)
def test_every_dtype_opens_in_safetensors_with_its_name_shape_and_bytes(dtype: str, tmp_path: Path) -> None:
    bits = torch.randint(0, 2 if dtype == "bool" else 256, (3, 40), dtype=torch.uint8)
    tensor = bits.view(getattr(torch, dtype))
    image = build([_item("a.b", tensor), _item("odd", torch.zeros(3, dtype=torch.uint8))])
    path = tmp_path / "pack.safetensors"
    path.write_bytes(b"".join(image.buffers))
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        found = opened.get_tensor("a.b")
    assert found.dtype == tensor.dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@given(st.lists(st.sampled_from(KNOWN), min_size=1, max_size=12), st.integers(0, 5))
def test_positions_point_at_the_bytes_and_are_aligned(dtypes: list[str], rows: int) -> None:
    items = []
    for n, dtype in enumerate(dtypes):
        bits = torch.randint(0, 2 if dtype == "bool" else 256, (rows * (n + 1), 8), dtype=torch.uint8)
        items.append(_item(f"t{n}", bits.view(getattr(torch, dtype))))
    image = build(items)
    whole = b"".join(image.buffers)
    assert (len(whole), digest(whole)) == (image.nbytes, image.digest)
    for item, at in zip(items, image.positions):
        assert whole[at : at + len(item.stored)] == bytes(item.stored)
        assert at % getattr(torch, item.dtype).itemsize == 0
    assert set(load_safetensors(whole)) == {i.name for i in items}


def test_encoded_and_unknown_dtypes_appear_as_bytes() -> None:
    image = build(
        [
            PackItem("x", "float32", (1000,), "zstd/1", memoryview(b"abc")),
            PackItem("y", "complex128", (2,), "raw/1", memoryview(bytes(32))),
        ]
    )
    slots = read_header(b"".join(image.buffers), key="k", nbytes=image.nbytes)
    assert {n: (s.dtype, s.shape) for n, s in slots.items()} == {"x#zstd/1": ("U8", (3,)), "y": ("U8", (32,))}


def test_a_box_is_named_by_its_bounds_and_a_whole_tensor_by_itself() -> None:
    assert box_name("w", shape=(4, 2), offset=(0, 0), box=(4, 2)) == "w"
    assert box_name("w", shape=(4, 2), offset=(1, 0), box=(2, 2)) == "w[1:3,0:2]"
    assert box_name("s", shape=(), offset=(), box=()) == "s"


def test_damaged_headers_are_refused() -> None:
    good = header([("a", "F32", (2,), 8)]) + bytes(8)
    assert read_header(good, key="k", nbytes=len(good))["a"].stop == len(good)
    table = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99]}}).encode()
    for bad in (
        b"",
        good[:7],
        b"\xff" * 16,
        good[:20] + b"\xff" + good[21:],
        len(table).to_bytes(8, "little") + table + bytes(8),
        (2).to_bytes(8, "little") + b"[]",
    ):
        with pytest.raises(IntegrityError, match="readable pack"):
            read_header(bad, key="k", nbytes=len(bad))
