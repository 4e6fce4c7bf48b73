"""How far outputs are from what was recorded: the verdict names its evidence, whatever the dtype and the numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gpumove.errors import ConfigError
from gpumove.format.manifest import FORMAT, Manifest, decode, encode
from gpumove.format.probes import MOST_VALUES, Probe
from gpumove.parity.arrays import to_arrays
from gpumove.parity.outputs import ProbeResult, compare, numbers, record
from gpumove.serving.gate import judge, read


def recorded(outputs: Any) -> Probe:
    return record("probe", to_arrays(outputs))


def compared(before: Any, after: Any, tolerance: float | None = None) -> ProbeResult:
    return compare(recorded(before), to_arrays(after), step=7, tolerance=tolerance)


def manifest(*probes: Probe) -> Manifest:
    made = Manifest(
        format=FORMAT, run="r", step=7, epoch=1, attempt="00000001-00000001", world_size=1, time=0.0, state_bytes=0,
        new_bytes=0, plan="", parts=(), probes=probes,
    )  # fmt: skip
    read_back = decode(Manifest, encode(made), key="m")
    assert read_back == made
    return read_back


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64,
     torch.int8, torch.bool, torch.uint8, torch.float8_e4m3fn],
)  # fmt: skip
def test_the_same_bits_are_bitwise_and_one_other_bit_is_not(dtype: torch.dtype) -> None:
    whole = (torch.rand(3, 700, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    assert compared(whole, whole.clone()).verdict == "bitwise"
    other = whole.clone()
    other.view(torch.uint8).view(-1)[-1] ^= 1  # of a value that is not among those that were recorded
    found = compared(whole, other)
    if (dtype.is_floating_point and dtype.itemsize > 1) or dtype.is_complex:
        assert (found.verdict, found.worst.difference) == ("within tolerance", 0.0)
        parts = 2 if dtype.is_complex else 1
        assert f"over {1024 * parts} of {2100 * parts} values" in found.text
    else:
        assert found.verdict == "different"
        assert "every bit counts" in found.text


@pytest.mark.parametrize(
    ("dtype", "passes", "fails"),
    [
        (torch.float64, 1e-7, 1e-5),
        (torch.float32, 5e-4, 2e-3),
        (torch.bfloat16, 1e-2, 5e-2),
        (torch.float16, 2e-3, 1e-2),
    ],
)
def test_rounding_passes_and_more_does_not(dtype: torch.dtype, passes: float, fails: float) -> None:
    whole = torch.linspace(-4, 4, 500, dtype=torch.float64)
    for off, verdict in ((passes, "within tolerance"), (fails, "different")):
        other = whole.clone()
        other[250] += 4 * off
        found = compared(whole.to(dtype), other.to(dtype))
        assert found.verdict == verdict, (off, found)
        assert found.worst.relative == pytest.approx(off, rel=0.5)
    assert compared(whole.to(dtype), other.to(dtype), tolerance=1.0).ok
    assert not compared(whole.to(dtype), other.to(dtype), tolerance=0.0).ok


@given(st.integers(0, 5000))
def test_what_is_recorded_is_evenly_taken(count: int) -> None:
    probe = recorded(torch.arange(count, dtype=torch.float32))
    most = min(count, MOST_VALUES)
    found = numbers("float32", probe.outputs[0].values)
    assert found is not None
    assert found.tolist() == [i * count // most for i in range(most)]


def test_numbers_that_are_none() -> None:
    odd = torch.tensor([1.0, math.nan, math.inf, -math.inf, 0.0])
    assert compared(odd, odd).verdict == "bitwise"
    assert compared(odd, odd + torch.tensor([1e-5, 0, 0, 0, 0])).verdict == "within tolerance"
    for place, value in ((1, 0.0), (2, -math.inf), (0, math.nan)):
        other = odd.clone()
        other[place] = value
        found = compared(odd, other)
        assert (found.verdict, found.ok) == ("different", False)
        assert "1 of 5 recorded values are not finite on one side only" in found.text
    assert compared(torch.zeros(3), torch.zeros(3) + 1e-30).verdict == "different"  # all of nothing
    assert compared(torch.zeros(3), -torch.zeros(3)).verdict == "within tolerance"


def test_names_and_shapes() -> None:
    before = {"logits": torch.ones(2, 3), "more": (torch.ones(1), [torch.ones(2)]), "none": None}
    assert [o.name for o in recorded(before).outputs] == ["logits", "more.0", "more.1.0"]
    assert compared(before, before).verdict == "bitwise"
    assert compared(torch.ones(2, 3), {"any_name": torch.ones(2, 3)}).ok
    for after, words in (
        ({**before, "logits": torch.ones(3, 2)}, "its shape is [3, 2], and [2, 3] was recorded"),
        ({"logits": torch.ones(2, 3)}, "it is missing"),
        ({**before, "extra": torch.ones(1)}, "it is not in the record"),
    ):
        found = compared(before, after)
        assert not found.ok
        assert words in found.text


def test_another_dtype_is_compared_by_its_numbers() -> None:
    whole = torch.randn(64, generator=torch.Generator().manual_seed(1))
    assert compared(whole, whole.bfloat16()).verdict == "within tolerance"
    assert compared(whole.bfloat16(), whole.numpy()).verdict == "within tolerance"
    assert compared(whole, whole.double()).verdict == "within tolerance"
    assert compared(whole, whole.int()).verdict == "different"


def test_numbers_arrays_and_what_is_refused() -> None:
    assert compared(0.25, np.float64(0.25)).verdict == "bitwise"
    assert compared({"ok": True, "n": 3}, {"ok": np.bool_(True), "n": np.int64(3)}).verdict == "bitwise"
    assert compared(np.arange(4, dtype=">f4"), torch.arange(4, dtype=torch.float32)).verdict == "bitwise"
    for bad in (
        None,
        [],
        {"a": [1.0], "a.0": 2.0},
        [1.0] * 65,
        "text",
        {"cache": object()},
        np.array(["a"]),
        torch.ones(2, 2).to_sparse(),
    ):
        with pytest.raises(ConfigError, match="output"):
            to_arrays(bad)


def test_the_gate_reads_a_file_without_torch(tmp_path: Path) -> None:
    outputs = {"logits": torch.randn(5).bfloat16(), "ids": torch.arange(3)}
    save_file(outputs, tmp_path / "outputs.safetensors")
    known = manifest(recorded(outputs))
    assert judge(known, read(tmp_path / "outputs.safetensors")).verdict == "bitwise"
    (tmp_path / "none").write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="no safetensors file"):
        read(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "absent")
    save_file({}, tmp_path / "empty")
    with pytest.raises(ConfigError, match="holds no tensors"):
        read(tmp_path / "empty")


def test_which_probe() -> None:
    one, two = record("a", to_arrays(torch.ones(2))), record("b", to_arrays(torch.zeros(2)))
    live = to_arrays(torch.zeros(2))
    assert judge(manifest(one, two), live, name="b").verdict == "bitwise"
    for known, name, words in (((), None, "no probe"), ((one, two), None, "a, b: name one"), ((one,), "c", "it has a")):
        with pytest.raises(ConfigError, match=words) as caught:
            judge(manifest(*known), live, name=name)
        assert caught.value.code == "config.no_probe"
    with pytest.raises(ConfigError, match="tolerance"):
        judge(manifest(one), live, tolerance=math.nan)
