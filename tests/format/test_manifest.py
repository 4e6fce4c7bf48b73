"""Records survive the trip through JSON, and what is not a record is refused by name."""

from __future__ import annotations

import msgspec
import pytest

from gpumove.errors import ConfigError, IntegrityError
from gpumove.format import keys
from gpumove.format.manifest import (
    FORMAT,
    Base,
    Checkpoint,
    Chunk,
    Claim,
    Collect,
    LogEntry,
    Manifest,
    Move,
    Note,
    Pack,
    Part,
    PartRef,
    Pin,
    TensorEntry,
    TraceRow,
    decode,
    decode_checked,
    encode,
    encode_checked,
)

BASE = Base(pack=0, at=64, length=10, codec="planes/1", digest="ab" * 16, nbytes=24)
PART = Part(
    format=FORMAT, run="r", attempt="00000001-00000002", rank=0, world_size=1, step=3,
    packs=(Pack("00000001-00000002", "cd" * 16, 99),),
    tensors=(TensorEntry("a", "float32", (2, 3), (Chunk((0, 0), (2, 3), 0, 8, 24, digest="ef" * 16, bases=(0,)),)),),
    bases=(BASE,),
    local=(TensorEntry("b", "bool", (), (Chunk(inline="AQ=="),)),),
    values={"x": [1, {"$float": "nan"}]},
)  # fmt: skip
COMMIT = Checkpoint(
    format=FORMAT, number=2, epoch=1, writer="w", time=1.5, step=3, attempt="00000001-00000002", manifest="0" * 32,
    manifest_bytes=9, world_size=1, state_bytes=24, new_bytes=99,
)  # fmt: skip
MOVE = Move(
    format=FORMAT, number=6, epoch=1, writer="w", time=1.0, move="ab" * 8, state="request", other="gs://c/d",
    save=False, facts={"rate": 1.5}, text="t",
)  # fmt: skip
ENTRIES = [
    COMMIT,
    Claim(format=FORMAT, number=1, epoch=1, writer="w", time=1.0, host="h", regions="eu-*"),
    Note(format=FORMAT, number=3, epoch=1, writer="w", time=1.0, text="t", resumed=2, damaged=(1,)),
    Pin(format=FORMAT, number=4, epoch=1, writer="w", time=1.0, checkpoint=2, pinned=True),
    MOVE,
    Collect(
        format=FORMAT,
        number=5,
        epoch=1,
        writer="w",
        time=1.0,
        kept=(COMMIT,),
        follows="s3://a/b",
        sealed="gs://c/d",
        move=MOVE,
    ),
]


def test_a_part_comes_back_equal() -> None:
    assert decode(Part, encode(PART), key="k") == PART


def test_a_manifest_comes_back_equal() -> None:
    manifest = Manifest(
        format=FORMAT, run="r", step=3, epoch=1, attempt="a", world_size=1, time=0.5, state_bytes=1, new_bytes=2,
        plan="p", parts=(PartRef("k", 0, "d", 5, 2),), trace=(TraceRow(1, 0.5), TraceRow(2)),
    )  # fmt: skip
    assert decode(Manifest, encode(manifest), key="k") == manifest


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: type(e).__name__)
def test_log_entries_come_back_as_what_they_were(entry: LogEntry) -> None:
    assert decode(LogEntry, encode(entry), key="k") == entry  # type: ignore[arg-type,comparison-overlap]


def test_a_newer_format_says_to_upgrade() -> None:
    newer = encode(msgspec.structs.replace(PART, format=FORMAT + 1))
    with pytest.raises(ConfigError, match=r"parts/7 is of format 2.*upgrade gpumove") as caught:
        decode(Part, newer, key="parts/7")
    assert caught.value.code == "config.newer_format"


def test_unknown_fields_are_ignored() -> None:
    fields = msgspec.json.decode(encode(PART)) | {"later": 1}
    assert decode(Part, msgspec.json.encode(fields), key="k") == PART


@pytest.mark.parametrize(
    "bad", [b"", b"{", b"[]", b"\xff\xfe", b'{"format":1}', encode(PART)[:-5], b'{"format":"x"}', b"[" * 9999]
)
def test_rubbish_names_the_object(bad: bytes) -> None:
    with pytest.raises(IntegrityError, match="the/key"):
        decode(Part, bad, key="the/key")


@pytest.mark.parametrize("bit", [0x01, 0x02, 0x10, 0x20])
def test_every_flipped_bit_of_a_log_entry_is_found(bit: int) -> None:
    whole = encode_checked(COMMIT)
    assert decode_checked(LogEntry, whole, key="k") == COMMIT  # type: ignore[arg-type,comparison-overlap]
    assert msgspec.json.decode(whole)["step"] == 3
    for at in range(len(whole)):
        damaged = whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
        with pytest.raises(IntegrityError):
            decode_checked(LogEntry, damaged, key="k")  # type: ignore[arg-type]


def test_keys_are_read_back_as_they_were_built() -> None:
    attempt = keys.attempt_name(3, 12)
    assert attempt < keys.attempt_name(3, 13) < keys.attempt_name(4, 1)
    assert keys.epoch_of(attempt) == 3
    assert keys.last_serial(3, [attempt, keys.attempt_name(3, 9), keys.attempt_name(4, 20)]) == 12
    assert keys.last_serial(5, [attempt]) == 0
    key = keys.part_key(attempt, rank=7, digest="a" * 32, plan="b" * 32, new_bytes=55)
    receipt = keys.read_receipt(key)
    assert receipt is not None
    assert (receipt.rank, receipt.digest, receipt.plan, receipt.new_bytes) == (7, "a" * 32, "b" * 16, 55)
    assert keys.read_receipt(keys.failed_key(attempt, 7)) is None
    assert keys.failed_rank(keys.failed_key(attempt, 7)) == 7
    assert keys.entry_number(keys.entry_key(41)) == 41
    assert keys.entry_number("log/41.json") is None
    digest = "d" * 32
    for found in (key, f"packs/{attempt}/{digest}.safetensors", keys.manifest_key(attempt, digest)):
        assert keys.attempt_of(found) == attempt
    for foreign in (f"packs/{attempt}/mine.safetensors", f"packs/{attempt}/{digest}", f"manifests/{attempt}-x.json"):
        assert keys.attempt_of(foreign) is None
    assert keys.attempt_of("log/1.json") is None
