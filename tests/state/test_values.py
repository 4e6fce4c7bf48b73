"""Values come back equal and of the same type; what cannot is refused with its path."""

from __future__ import annotations

import io
import math
from collections import Counter, OrderedDict, deque
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpumove.errors import ConfigError, IntegrityError
from gpumove.state.values import flatten, tensor_names, unflatten

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
    st.complex_numbers(allow_nan=False),
)  # fmt: skip
HASHABLE = st.one_of(st.integers(), st.text(), st.booleans(), st.none(), st.binary())
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner), st.dictionaries(HASHABLE, inner),
        st.frozensets(HASHABLE), st.sets(HASHABLE), st.lists(inner).map(lambda x: deque(x, 7)),
    ),
    max_leaves=12,
)  # fmt: skip


def trip(value: Any) -> Any:
    """Through JSON and back."""
    sink: dict[str, torch.Tensor] = {}
    tree = msgspec.json.decode(msgspec.json.encode(flatten("v", value, sink)))
    assert sorted(tensor_names(tree)) == sorted(sink)
    return unflatten(tree, sink.__getitem__)


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(*p) for p in zip(a.items(), b.items()))
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(TREES)
def test_any_tree_comes_back_as_it_was(value: Any) -> None:
    assert same(trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict([("b", 1), ("a", 2)]),
        Counter("hello"),
        {1: "int key", (1, 2): "tuple key", "$odd": 0},
        2**200,
        -(2**63) - 1,
        [np.float32(1.5), np.int64(-3), np.bool_(True)],
        torch.bfloat16,
        torch.device("cuda:1"),
        torch.Size([2, 3]),
        bytearray(b"ab"),
        {"$tensor": "not a tensor"},
    ],
    ids=repr,
)
def test_particular_values(value: Any) -> None:
    assert same(trip(value), value)


def test_floats_that_json_lacks() -> None:
    assert math.isnan(trip(float("nan")))
    assert trip([float("inf"), float("-inf")]) == [math.inf, -math.inf]
    assert math.copysign(1, trip(-0.0)) == -1


def test_arrays_and_streams() -> None:
    array = np.arange(12, dtype=">i2").reshape(3, 4)[:, ::2]
    back = trip(array)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)
    assert trip(io.BytesIO(b"xyz")).getvalue() == b"xyz"


def test_tensors_are_taken_out_by_name_even_if_names_meet() -> None:
    value = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "list": [torch.tensor(3)]}
    sink: dict[str, torch.Tensor] = {}
    tree = flatten("v", value, sink)
    assert set(sink) == {"v.a.b", "v.a.b~", "v.list.0"}
    back = unflatten(tree, sink.__getitem__)
    assert [int(back["a.b"]), int(back["a"]["b"]), int(back["list"][0])] == [1, 2, 3]


class Sub(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    "bad", [object(), lambda: 0, Sub(a=1), np.array([object()]), {"x": {1, object()}}, type], ids=str
)
def test_what_cannot_be_encoded_names_its_path(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"'top\.list\.1") as caught:
        flatten("top", {"list": [0, bad]}, {})
    assert caught.value.code == "config.unencodable"


@pytest.mark.parametrize(
    "bad",
    [{"$int": "x"}, {"$ndarray": [1]}, {"$size": 3}, {"$dict": [1]}, {"$float": "pi"}, {"$npscalar": ["<f4", "AA=="]}],
)
def test_malformed_trees_are_refused(bad: Any) -> None:
    with pytest.raises(IntegrityError):
        unflatten(bad, {}.__getitem__)


def test_unknown_tags_and_dtypes_say_to_upgrade() -> None:
    with pytest.raises(ConfigError, match="upgrade"):
        unflatten({"$later": 1}, {}.__getitem__)
    with pytest.raises(ConfigError, match="dtype 'float3'"):
        unflatten({"$dtype": "float3"}, {}.__getitem__)
