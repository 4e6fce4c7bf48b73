"""docs/codecs.md is enough: a decoder written from it gives the same bytes; and the bytes of each codec are frozen."""

from __future__ import annotations

import pytest

from gpumove.format.codec import decode, digest
from tests.format import reference
from tests.format.golden import GOLDEN
from tests.format.states import bases_of
from tests.format.test_codec import chunks

pytestmark = pytest.mark.usefixtures("both_ways")


def test_the_page_is_enough_to_decode() -> None:
    for fields, coded, n in chunks(5003):
        bases = [bytes(base) for base in bases_of(fields, coded)]
        assert reference.decode(coded.codec, bytes(coded.stored), len(fields[n].new), bases) == fields[n].new


@pytest.mark.parametrize(
    ("name", "stored", "bases", "expected"), GOLDEN, ids=[f"{n}-{row[0]}" for n, row in enumerate(GOLDEN)]
)
def test_what_was_stored_once_is_read_for_ever(name: str, stored: str, bases: tuple[str, ...], expected: str) -> None:
    data, wanted = bytes.fromhex(stored), bytes.fromhex(expected)
    out = bytearray(len(wanted))
    views = [memoryview(bytes.fromhex(base)) for base in bases]
    decode(name, memoryview(data), memoryview(out), bases=views, expected=digest(wanted))
    assert reference.decode(name, data, len(wanted), [bytes(view) for view in views]) == wanted
