"""Coverage-guided fuzzing of all decoders; by hand: ``python -m tests.format.fuzz_decoders [libFuzzer's arguments]``.

Needs atheris. The first byte picks a codec and the sizes of the bases; the rest is the stored chunk. The argument
``corpus=<folder>`` writes real chunks there first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gpumove.format"]):
    from gpumove.errors import IntegrityError
    from gpumove.format.codec import decode, digest

from tests.format.test_codec import CODECS, chunks

SIZES = ((), (4004,), (4004, 4004), (4004,) * 3, (4004,) * 5, (2002,), (8008,))


def one(data: bytes) -> None:
    """Any bytes are refused, at the latest because what came out has another digest."""
    if not data:
        return
    name, sizes = CODECS[data[0] % len(CODECS)], SIZES[data[0] // len(CODECS) % len(SIZES)]
    bases = [memoryview((b"\x12\x34\x56\x3d\x9a" * size)[:size]) for size in sizes]
    out = bytearray(4004)
    try:
        decode(name, memoryview(data[1:]), memoryview(out), bases=bases, expected="")
    except IntegrityError as error:
        if "hash to" in str(error) and digest(out) not in str(error):
            raise
        return
    raise AssertionError("nothing has an empty digest")


def _write_corpus(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n, (_, coded, _) in enumerate(chunks(1001)):
        fit = SIZES.index((4004,) * len(coded.bases)) if coded.codec != "round/1" else SIZES.index((8008,))
        (folder / f"{n:04d}").write_bytes(bytes([CODECS.index(coded.codec) + len(CODECS) * fit]) + bytes(coded.stored))


if __name__ == "__main__":
    for argument in [a for a in sys.argv if a.startswith("corpus=")]:
        sys.argv.remove(argument)
        _write_corpus(Path(argument.removeprefix("corpus=")))
        sys.argv.append(argument.removeprefix("corpus="))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
