"""The native core and numpy give the same bytes, both ways, and the core checks what it is given."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumove.format import kernels, native, predict
from gpumove.format.arithmetic import ieee
from gpumove.format.codec import decode, digest
from gpumove.format.differences import encode_step, gradient_of, residual_of
from gpumove.format.kernels import CENTRED, FLOATS, PLAIN, QUADS, SPARSE, UNSIGNED
from gpumove.format.lanes import CODED, CONSTANT, RAW, Lane, Layout, shape_of
from gpumove.format.planes import Reader, Writer, encode_planes
from gpumove.format.predict import BFLOAT16, FLAGS, FLOAT16, FLOAT32, FORMULAS, GRADIENT, WIDTHS, Step
from tests.format.states import bases_of
from tests.format.test_codec import chunks

SIZES = (1, 2, 3, 63, 255, 256, 257, 1000, 4099)
SCALARS = (0.1, 0.95, 0.05, 1e-8, -6e-4)


@pytest.fixture
def core() -> native.Core:
    assert native.core is not None
    return native.core


def _on_numpy(function: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "core", None)
        return function()


def test_the_core_is_built_where_it_is_developed(core: native.Core) -> None:
    # Or tests and benchmarks would silently be those of numpy alone.
    assert core.__name__ == "gpumove.format._native"  # type: ignore[attr-defined]


def _stored_digest() -> str:
    found = hashlib.sha256()
    for fields, coded, n in chunks(5003):
        found.update(coded.codec.encode() + bytes(coded.stored))
        out = memoryview(bytearray(len(fields[n].new)))
        bases = bases_of(fields, coded)
        decode(coded.codec, memoryview(coded.stored), out, bases=bases, expected=digest(fields[n].new))
    return found.hexdigest()


def test_all_works_without_it_and_stores_the_same(core: native.Core) -> None:
    code = (
        "import sys; sys.modules['gpumove.format._native'] = None; from gpumove.format import native; "
        "assert native.core is None; from tests.format.test_native import _stored_digest; print(_stored_digest())"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert found.stdout.strip() == _stored_digest()


def _nasty(rng: np.random.Generator, count: int, dtype: int) -> np.ndarray:
    """Ordinary values, any bits at all, denormals, infinities, NaN, zeros and what lies between two roundings."""
    kind = {4: np.uint32, 2: np.uint16}[WIDTHS[dtype]]
    bits = rng.integers(0, 1 << 8 * WIDTHS[dtype], count).astype(kind)
    ordinary = rng.standard_normal(count).astype(np.float32) * np.float32(10.0) ** rng.integers(-12, 3, count)
    held = np.empty(count, kind)
    predict.store(ordinary.astype(np.float32), dtype, held)
    edges = {
        FLOAT32: (0, 1, 0x7F800000, 0xFF800000, 0x7FC00001, 0x80000000, 0x7FFFFF, 0x33000000, 0x477FF000, 0x38800000),
        BFLOAT16: (0, 1, 0x7F80, 0xFF80, 0x7FC1, 0x8000, 0x7F, 0x7F7F),
        FLOAT16: (0, 1, 0x7C00, 0xFC00, 0x7E01, 0x8000, 0x3FF, 0x7BFF),
    }[dtype]
    which = rng.integers(0, 8, count)
    held[which == 0] = bits[which == 0]
    held[which == 1] = rng.choice(np.array(edges, kind), count)[which == 1]
    return held


def _steps() -> list[Step]:
    found = []
    for number, formula in FORMULAS.items():
        kinds: Sequence[tuple[int, ...]] = [(dtype,) * formula.bases for dtype in range(3)]
        if formula.bases == 3:
            kinds = [*kinds, (BFLOAT16, FLOAT32, FLOAT16), (FLOAT32, BFLOAT16, BFLOAT16)]
        if number == GRADIENT:
            kinds = [(FLOAT32, BFLOAT16)]
        for dtypes, flags, repeats in itertools.product(kinds, range(FLAGS + 1), (0, 1, 5)):
            found.append(Step(number, dtypes, SCALARS[: formula.scalars], flags, repeats))
    return found


@pytest.mark.parametrize("formula", FORMULAS)
def test_predictions_are_the_same_bit_for_bit(formula: int, core: native.Core) -> None:
    rng = np.random.default_rng(formula)
    with ieee() as sound, predict.quiet():
        assert sound
        for step in (s for s in _steps() if s.formula == formula):
            for count in (1, 255, 3001):
                bases = [_nasty(rng, count, dtype) for dtype in step.dtypes]
                new = _nasty(rng, count, step.dtypes[0])
                expected = _on_numpy(lambda: residual_of(step, bases, new).tobytes())  # noqa: B023
                assert residual_of(step, bases, new).tobytes() == expected, (step, count)


@pytest.mark.parametrize("formula", [n for n in FORMULAS if n != GRADIENT])
def test_predicted_chunks_are_the_same_over_several_blocks(formula: int, core: native.Core) -> None:
    rng, dtype = np.random.default_rng(formula), BFLOAT16 if formula % 2 else FLOAT32
    count = (1 << 20) // WIDTHS[dtype] + 1001
    step = Step(formula, (dtype,) * FORMULAS[formula].bases, SCALARS[: FORMULAS[formula].scalars], 1)
    bases, new = [_nasty(rng, count, dtype) for _ in step.dtypes], _nasty(rng, count, dtype)
    with ieee():
        stored = bytes(encode_step(step, bases, new))
        assert stored == bytes(_on_numpy(lambda: encode_step(step, bases, new)))
    name, views = "adam/1" if formula < 16 else "momentum/1", [memoryview(base).cast("B") for base in bases]
    for run in (_on_numpy, lambda function: function()):
        out = memoryview(bytearray(new.nbytes))
        run(lambda: decode(name, memoryview(stored), out, bases=views, expected=digest(new.data.cast("B"))))  # noqa: B023


def test_gradients_and_roundings_are_the_same(core: native.Core) -> None:
    rng = np.random.default_rng(3)
    old, new = _nasty(rng, 100_003, FLOAT32), _nasty(rng, 100_003, FLOAT32)
    step, found, expected = Step(GRADIENT, (FLOAT32, BFLOAT16), (0.1,)), np.empty(100_003, np.uint16), old.copy()
    expected = np.empty(100_003, np.uint16)
    with predict.quiet():
        gradient_of(step, old, new, found)
        _on_numpy(lambda: gradient_of(step, old, new, expected))
        assert (found == expected).all()
        core.rounded(FLOAT16, old, found)
        predict.store(old.view(np.float32), FLOAT16, expected)
        assert (found == expected).all()
        core.rounded(BFLOAT16, old, found)
        _on_numpy(lambda: kernels.round_bfloat16(old, expected))
        assert (found == expected).all()


def _layouts(width: int) -> list[Layout]:
    every = tuple(Lane(n, 1, CODED) for n in range(width))
    found = [
        Layout(width, PLAIN, every),
        Layout(width, CENTRED, tuple(lane._replace(background=0x80, rare=True) for lane in every)),
        Layout(width, PLAIN, (Lane(0, width, RAW),)),
        Layout(width, CENTRED, (Lane(0, width, CODED, 7),)),
    ]
    if width > 1:
        halves = (Lane(0, width // 2, RAW), Lane(width // 2, width // 2, CODED))
        found += [Layout(width, PLAIN, halves), Layout(width, CENTRED, halves[::-1])]
    if width in (2, 4):
        found.append(Layout(width, FLOATS, every))
    return found


@pytest.mark.parametrize("width", UNSIGNED)
def test_streams_are_the_same_for_every_width_size_and_address(width: int, core: native.Core) -> None:
    rng = np.random.default_rng(width)
    for layout, count in itertools.product(_layouts(width), SIZES):
        words = rng.integers(0, 256, count * width, np.uint8).view(UNSIGNED[width])
        if layout.transform == CENTRED:
            words[rng.random(count) < 0.9] = 0

        def stored(words: np.ndarray = words, layout: Layout = layout) -> bytes:
            writer = Writer(words.size, layout)
            writer.put(words.copy())
            return bytes(writer.finish())

        found = stored()
        assert found == _on_numpy(stored)
        odd = bytearray(len(found) + 1)
        odd[1:] = found
        for run in (_on_numpy, lambda function: function()):
            out = np.empty(words.nbytes + 1, np.uint8)[:-1].view(UNSIGNED[width])
            run(lambda: Reader(memoryview(odd)[1:], count, width).block(0, out))  # noqa: B023
            assert (out == words).all()


def test_the_core_takes_and_fills_buffers_at_odd_addresses(core: native.Core) -> None:
    rng = np.random.default_rng(1)
    words, head = rng.integers(0, 256, 4 * 999 + 1, np.uint8), bytes([4, 1, 18, 3, 0, 2, 1, 0, 2, 1, 1, 0, 3, 1, 1, 0])
    room = [np.empty(2 * 999 + 1, np.uint8)[1:], np.empty(999, np.uint8), np.empty(999, np.uint8)]
    core.split(head, native.PREDECESSOR, words[1:], (words[:-1],), tuple(room), 0)
    out = np.zeros(4 * 999 + 2, np.uint8)
    core.join(head, native.PREDECESSOR, out[1:-1], (words[:-1],), tuple(room))
    assert (out[1:-1] == words[1:]).all()
    assert out[0] == out[-1] == 0


@given(st.binary(max_size=300), st.integers(0, 255), st.sampled_from([0, 1, 3, 250]))
def test_packed_planes_are_the_same(noise: bytes, background: int, spread: int) -> None:
    assert native.core is not None
    plane = np.frombuffer(noise, np.uint8) // np.uint8(255 - spread) + np.uint8(background)
    count = kernels.count_others(plane, background)
    for kind in (SPARSE, QUADS):

        def pack(kind: int = kind) -> Any:
            if kind == SPARSE:
                return kernels.pack_sparse(plane, background, count=count)
            return kernels.pack_quads(plane, background, limit=len(plane))

        codes, others = pack()
        assert (codes, others) == tuple(map(bytes, _on_numpy(pack)))
        assert native.core.others(kind, codes, len(plane)) == len(others)
        out = np.zeros_like(plane)
        native.core.spread(kind, codes, background, others, out)
        assert (out == plane).all()
        if others:
            assert native.core.pack(kind, plane, background, len(others) - 1) is None


@given(st.binary(max_size=200))
def test_folded_planes_are_the_same(noise: bytes) -> None:
    plane = np.frombuffer(noise, np.uint8) & np.uint8(0x7F)
    found, expected, back = (np.zeros(len(noise) - len(noise) // 8, np.uint8) for _ in range(3))
    assert kernels.fold(plane, found)
    if noise:
        assert _on_numpy(lambda: kernels.fold(plane, expected))
        assert not kernels.fold(plane | np.uint8(0x80), back)
    assert (found == expected).all()
    out = np.empty_like(plane)
    kernels.unfold(found, out)
    assert (out == plane).all()


def test_what_is_counted_is_the_same(core: native.Core) -> None:
    rng = np.random.default_rng(2)
    for width, count in itertools.product(UNSIGNED, (1, 7, 256, 2048)):
        words = rng.integers(0, 256, count * width, np.uint8).view(UNSIGNED[width])
        for transform in (PLAIN, CENTRED, *((FLOATS,) if width in (2, 4) else ())):
            found = kernels.count_bytes(words, transform)
            assert (found == _on_numpy(lambda: kernels.count_bytes(words, transform))).all()  # noqa: B023


def test_a_constant_chunk_needs_no_loop() -> None:
    words = np.full(1000, 0x12345678, np.uint32)
    stored = encode_planes(words, Layout(4, PLAIN, (Lane(0, 4, CONSTANT),)))
    out = np.empty_like(words)
    Reader(stored, 1000, 4).block(0, out)
    assert shape_of(1000, 4).blocks == 1
    assert (out == words).all()


HEAD = bytes([4, 0, 18, 2, 0, 2, 1, 0, 2, 2, 1, 0])
STEP = native.packed(5, 0, 0, (0, 0, 0), (1.0, 1.0, 1.0, 1.0))
IMPOSSIBLE_LAYOUTS = [
    b"",
    HEAD[:-1],
    HEAD + b"\0",
    bytes([3]) + HEAD[1:],
    bytes([4, 3]) + HEAD[2:],
    bytes([8, 1, 17, 1, 0, 8, 1, 0]),
    bytes([4, 0, 18, 0]),
    bytes([4, 0, 18, 1, 0, 2, 1, 0]),
    bytes([4, 0, 18, 2, 0, 2, 1, 0, 0, 2, 1, 0]),
    bytes([4, 0, 18, 2, 0, 2, 1, 0, 4, 2, 1, 0]),
    bytes([4, 0, 18, 2, 0, 2, 1, 0, 2, 4, 1, 0]),
    bytes([4, 0, 18, 2, 0, 2, 1, 0, 255, 1, 1, 0]),
    bytes([4, 0, 18, 200]) + bytes([0, 1, 1, 0]) * 200,
]
IMPOSSIBLE_STEPS = [
    b"\1",
    STEP + b"\0",
    bytes([0]) + STEP[1:],
    bytes([7]) + STEP[1:],
    bytes([21]) + STEP[1:],
    bytes([5, 4]) + STEP[2:],
    bytes([5, 0, 33]) + STEP[3:],
    bytes([5, 0, 0, 2]) + STEP[4:],
    bytes([5, 0, 0, 3, 3]) + STEP[5:],
    bytes([5, 0, 0, 3, 1]) + STEP[5:],
    bytes([255, 0, 0, 2]) + bytes(28),
]


def test_the_core_refuses_what_does_not_fit(core: native.Core) -> None:
    words, half = np.zeros(100, np.uint32), np.zeros(100, np.uint16)
    good: list[Any] = [HEAD, STEP, words, (words, words, words), (half, half)]
    core.join(*good)  # type: ignore[call-arg]
    bad: list[tuple[int, Any]] = [(0, layout) for layout in IMPOSSIBLE_LAYOUTS] + [
        (1, step) for step in IMPOSSIBLE_STEPS
    ]
    bad += [(2, words[:99]), (2, words.view(np.uint8)[1:]), (3, (words,)), (3, (words, words, words[:99]))]
    bad += [(4, (half,)), (4, (half, half[:99])), (4, (half, words)), (3, [words]), (4, [half])]
    for at, value in bad:
        arguments = [*good[:at], value, *good[at + 1 :]]
        with pytest.raises(ValueError):
            core.join(*arguments)  # type: ignore[call-arg]
        with pytest.raises(ValueError):
            core.split(*arguments, 0)  # type: ignore[call-arg]
    for call in (
        lambda: core.split(HEAD, STEP, words, (words,) * 3, (half, half), 1),
        lambda: core.split(bytes([4, 0, 18, 1, 0, 4, 0, 0]), b"", words, (), (words[:1],), 0),
        lambda: core.count(3, 0, words),
        lambda: core.count(8, 1, words),
        lambda: core.count(8, 0, words[:99]),
        lambda: core.pack(QUADS, half, 256, 1),
        lambda: core.pack(4, half, 0, 1),
        lambda: core.pack(QUADS, half, 0, 201),
        lambda: core.others(QUADS, bytes(24), 100),
        lambda: core.others(SPARSE, bytes(14), 100),
        lambda: core.spread(QUADS, bytes(50), 0, b"1", half),
        lambda: core.spread(QUADS, b"\xff" * 50, 0, bytes(199), half),
        lambda: core.spread(SPARSE, b"\xff" * 25, 0, bytes(201), half),
        lambda: core.fold(bytes(16), half),
        lambda: core.unfold(bytes(16), half),
        lambda: core.estimate(words, words[:99], 0.1, half),
        lambda: core.rounded(1, words[:99], half),
        lambda: core.rounded(3, words, half),
    ):
        with pytest.raises(ValueError):
            call()
    for argument in ((), (1, 2), (HEAD, STEP, bytes(400), (words,) * 3, (half, half))):
        with pytest.raises((TypeError, BufferError)):
            core.join(*argument)  # type: ignore[call-arg]
