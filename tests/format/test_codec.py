"""Decoders give the exact bytes or raise, and never allocate what an input claims."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard

from gpumove.errors import ConfigError, IntegrityError
from gpumove.format.codec import decode, digest, find
from gpumove.format.coding import Coded, Coder, Field
from tests.format.states import DTYPES, bases_of, decoded, nudged, rule, stepped, values

pytestmark = pytest.mark.usefixtures("both_ways")

CODECS = ["raw/1", "planes/1", "sub/1", "round/1", "adam/1", "momentum/1"]


def chunks(count: int = 2001) -> list[tuple[list[Field], Coded, int]]:
    """Stored chunks of every codec, with as many formulas and modes as possible."""
    adamw = lambda p: torch.optim.AdamW(p, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)  # noqa: E731
    sgd = lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)  # noqa: E731
    families = [([Field("", "float32", values("float32", 40, "bits"), None)], None)]
    for dtype in DTYPES:
        data = values(dtype, count, "noise")
        families += [
            ([Field("", dtype, data, None)], None),
            ([Field("", dtype, data, nudged(data, "near"))], None),
        ]
    for make in (adamw, sgd):
        for gradients in (torch.float32, torch.bfloat16):
            for steps in (1, 4):
                fields = stepped(make, steps=steps, count=count, gradients=gradients)
                wide = np.frombuffer(fields[0].new, np.uint32)
                copy = ((wide + np.uint32(0x7FFF) + (wide >> 16 & 1)) >> 16).astype(np.uint16)
                fields.append(Field("copy", "bfloat16", memoryview(copy.tobytes()), None))
                families.append((fields, rule(make([torch.nn.Parameter(torch.ones(1))]), steps)))
    found = []
    for fields, rules in families:
        coded = Coder().encode(fields, rules)
        found += [(fields, c, n) for n, c in enumerate(coded) if c is not None]
    return found


def test_every_codec_occurs_and_is_exact() -> None:
    stored = chunks()
    assert {c.codec for _, c, _ in stored} == set(CODECS)
    for fields, coded, n in stored:
        assert decoded(fields, coded, n) == fields[n].new


def _damaged(stored: bytes, dice: random.Random) -> bytes:
    kind, data = dice.randrange(5), bytearray(stored)
    at = dice.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data += dice.randbytes(dice.randrange(1, 9))
    elif kind == 3:
        data[at : at + 4] = struct.pack("<I", dice.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, dice.randrange(1 << 32)]))
    else:
        data = bytearray(dice.randbytes(dice.randrange(200)))
    return bytes(data)


def test_damage_is_noticed_or_makes_no_difference() -> None:
    dice = random.Random(11)
    for fields, coded, n in chunks():
        expected = digest(fields[n].new)
        for _ in range(30):
            bases = bases_of(fields, coded)
            stored = memoryview(_damaged(bytes(coded.stored), dice))
            if dice.random() < 0.1:
                bases, stored = bases[::-1][: dice.randrange(3)], memoryview(coded.stored)
            out = bytearray(len(fields[n].new))
            try:
                decode(coded.codec, stored, memoryview(out), bases=bases, expected=expected)
            except IntegrityError:
                continue
            assert bytes(out) == fields[n].new


@pytest.mark.parametrize("name", CODECS)
def test_rubbish_and_wrong_bases_are_refused(name: str) -> None:
    dice, expected = random.Random(name), digest(bytes(1000))
    for _ in range(300):
        stored, bases = (
            dice.randbytes(dice.randrange(60)),
            [memoryview(bytes(dice.choice([0, 999, 1000, 2000])))] * dice.randrange(4),
        )
        with pytest.raises(IntegrityError):
            decode(name, memoryview(stored), memoryview(bytearray(1000)), bases=bases, expected=expected)
        if name != "raw/1":
            with pytest.raises(IntegrityError):
                decode(name, memoryview(stored), memoryview(bytearray()), bases=bases, expected=digest(b""))


def test_no_input_makes_a_decoder_allocate_what_it_claims() -> None:
    frames = [
        zstandard.compress(bytes(1 << 28)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 28)),
        zstandard.compress(bytes(1 << 28))[:40],
    ]
    stored = []
    for frame in frames:
        body = bytes([1]) + struct.pack("<I", len(frame)) + frame
        for block_log2 in (10, 16, 20):
            header = bytes([1, 0, block_log2, 1, 0, 1, 3, 0]) + struct.pack("<I", len(body))
            stored.append(header.ljust(16, b"\0") + body)
    stored += [bytes([1, 0, 16, 1, 0, 1, 3, 0]) + b"\xff" * 8, bytes([8, 0, 10, 1, 0, 8, 1, 0])]
    tracemalloc.start()
    try:
        for data in stored:
            with pytest.raises(IntegrityError):
                decode("planes/1", memoryview(data), memoryview(bytearray(1000)), expected="")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_an_unknown_codec_says_to_upgrade() -> None:
    with pytest.raises(ConfigError, match=r"'future/9'.*upgrade"):
        decode("future/9", memoryview(b""), memoryview(bytearray()), expected="")
    assert find("planes/1") is not None
