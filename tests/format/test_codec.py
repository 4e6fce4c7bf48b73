"""Codecs return the exact bytes or raise, never grow a chunk, and never allocate what an input claims."""

from __future__ import annotations

import random

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumove.errors import ConfigError, IntegrityError
from gpumove.format.codec import decode, digest, encode

CHOICES = ["raw", "zstd", "auto"]


def _round_trip(data: bytes, choice: str) -> str:
    name, stored = encode(memoryview(data), choice)
    assert len(stored) <= len(data)
    out = bytearray(len(data))
    decode(name, memoryview(stored), memoryview(out), expected=digest(data))
    assert bytes(out) == data
    return name


@given(st.binary(max_size=4096), st.sampled_from(CHOICES))
def test_exact_for_any_bytes(data: bytes, choice: str) -> None:
    _round_trip(data, choice)


@pytest.mark.parametrize("choice", CHOICES)
def test_large_noise_stays_raw_and_large_structure_shrinks(choice: str) -> None:
    noise = random.Random(1).randbytes(3 << 20)
    assert _round_trip(noise, choice) == "raw/1"
    assert _round_trip(bytes(3 << 20), choice) == ("raw/1" if choice == "raw" else "zstd/1")


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_bit_is_always_noticed(data: st.DataObject) -> None:
    original = bytes(range(256)) * 40
    name, stored = encode(memoryview(original), data.draw(st.sampled_from(["raw", "zstd"])))
    damaged = bytearray(stored)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    out = bytearray(len(original))
    try:
        decode(name, memoryview(damaged), memoryview(out), expected=digest(original))
    except IntegrityError:
        return
    assert bytes(out) == original  # a bit that zstd does not use, such as a reserved one


@given(st.binary(max_size=300))
def test_rubbish_is_refused(rubbish: bytes) -> None:
    for name in ("zstd/1", "raw/1"):
        with pytest.raises(IntegrityError):
            decode(name, memoryview(rubbish), memoryview(bytearray(1000)), expected=digest(bytes(1000)))


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.compress(bytes(1 << 28))
    with pytest.raises(IntegrityError, match="declares 268435456 bytes where 64"):
        decode("zstd/1", memoryview(bomb), memoryview(bytearray(64)), expected="")
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    with pytest.raises(IntegrityError):
        decode("zstd/1", memoryview(endless), memoryview(bytearray(64)), expected="")


def test_an_unknown_codec_says_to_upgrade() -> None:
    with pytest.raises(ConfigError, match=r"'future/9'.*upgrade"):
        decode("future/9", memoryview(b""), memoryview(bytearray()), expected="")
