"""Text to train on, found on this machine: Python sources, and C++ headers to fine-tune on. Knows no model."""

from __future__ import annotations

import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

VOCABULARY = 8192
_BYTES = 256
_PIECE = re.compile(r" ?(?:[A-Z]?[a-z]+|[A-Z]+)|\d|\n[ \t]*| +|[^\w\s]+|_+|.", re.DOTALL)
_KINDS = {"python": (".py",), "headers": (".h", ".hpp", ".cuh")}


def sources(kind: str) -> list[Path]:
    """Files of the interpreter and its packages, in an order that only their names decide."""
    tops = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib", "include")}
    found = {path for top in sorted(tops) for path in Path(top).rglob("*") if path.suffix in _KINDS[kind]}
    files = sorted(found, key=lambda path: (path.name, str(path)))
    random.Random(0).shuffle(files)
    return files


def read(kind: str, nbytes: int) -> str:
    """About so much text; less where there is no more."""
    pieces: list[str] = []
    size = 0
    for path in sources(kind):
        try:
            text = path.read_text()
        except (UnicodeDecodeError, OSError):
            continue
        pieces.append(text[: 64 << 10])  # generated tables are long, and all alike
        size += len(pieces[-1])
        if size >= nbytes:
            break
    return "\n".join(pieces)


class Vocabulary:
    """256 bytes, and the most frequent words; what is not among them is spelt in bytes."""

    def __init__(self, text: str, size: int) -> None:
        counted = Counter(piece for piece in _PIECE.findall(text) if len(piece) > 1 or not piece.isascii())
        words = [word for word, _ in counted.most_common(size - _BYTES)]
        self._numbers = {word: _BYTES + n for n, word in enumerate(words)}

    def tokens(self, text: str) -> np.ndarray:
        """The text as numbers."""
        return np.fromiter(self._spell(text), np.int64)

    def _spell(self, text: str) -> Iterator[int]:
        for piece in _PIECE.findall(text):
            number = self._numbers.get(piece)
            if number is None:
                yield from piece.encode()
            else:
                yield number


def corpora(nbytes: int, *, size: int) -> dict[str, np.ndarray]:
    """Both kinds of text as tokens; the vocabulary is that of the Python sources."""
    python = read("python", nbytes)
    vocabulary = Vocabulary(python, size)
    return {"python": vocabulary.tokens(python), "headers": vocabulary.tokens(read("headers", nbytes))}
