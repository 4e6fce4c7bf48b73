"""What a sample says: how to cut words into lanes, and how many bits they will take. Encoders only; readers need none.

A lane of noise is stored as it is: Huffman would only cost time. The estimates are order-0 entropies, which is what
Huffman reaches within two per cent on planes of floats and residuals.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpumove.format import kernels
from gpumove.format.entropy import compress
from gpumove.format.kernels import FLOATS, PLAIN, Words
from gpumove.format.lanes import CODED, CONSTANT, RAW, SEVEN, Lane, Layout

_NOISE_BITS, _SEVEN_BITS = 7.7, 6.8
_RARE_SHARE = 0.6
_LEVEL = 3
_LEVEL_GAIN = 0.97


def sample(words: Words, runs: int, run: int) -> Words:
    """Runs of neighbours, spread evenly: whole rows of a matrix may differ from the next."""
    if words.size <= runs * run:
        return words
    step = words.size // runs
    found: Words = words[: runs * step].reshape(runs, step)[:, :run].reshape(-1)
    return found


def _bits(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of each byte, with the usual correction for what a sample has not seen."""
    total = counts[0].sum()
    spent = (counts * np.log2(np.maximum(counts, 1))).sum(axis=1) / total
    seen = np.count_nonzero(counts, axis=1)
    found: NDArray[np.float64] = np.log2(total) - spent + (seen - 1) / (2 * total * np.log(2))
    return found


def estimate_bits(words: Words, transform: int) -> float:
    """Bits per word if every byte is coded by itself."""
    if not words.size:
        return 0.0
    return float(np.minimum(_bits(kernels.count_bytes(words, transform)), 8.0).sum())


def _lane(at: int, counts: NDArray[np.float64], bits: float) -> Lane:
    common = int(counts.argmax())
    if counts[common] > _RARE_SHARE * counts.sum():
        return Lane(at, 1, CODED, common, rare=True)
    if bits > _NOISE_BITS:
        return Lane(at, 1, RAW)
    if bits > _SEVEN_BITS and not counts[128:].any():
        return Lane(at, 1, SEVEN)
    return Lane(at, 1, CODED)


def _merge(lanes: list[Lane], *, floats: bool) -> list[Lane]:
    """Neighbouring lanes of noise as one: a run of wider words is one pass instead of two."""
    if len(lanes) == 1:
        return lanes
    half = len(lanes) // 2
    low, high = _merge(lanes[:half], floats=False), _merge(lanes[half:], floats=floats)
    pair = [*low, *high]
    if not floats and len(pair) == 2 and all(lane.mode == RAW for lane in pair) and low[0].width == high[0].width:
        return [Lane(low[0].start, 2 * low[0].width, RAW)]
    return pair


def layout_for(words: Words, transform: int) -> Layout:
    """The layout that fits a sample."""
    width = words.itemsize
    if words.size == 0:
        return Layout(width, PLAIN, (Lane(0, width, RAW),))
    counts = kernels.count_bytes(words, transform)
    lanes = [_lane(at, *found) for at, found in enumerate(zip(counts, _bits(counts).tolist()))]
    if transform == FLOATS and lanes[-1].mode == RAW:
        return layout_for(words, PLAIN)
    return Layout(width, transform, tuple(_merge(lanes, floats=transform == FLOATS)))


@lru_cache
def plain_layout(width: int, transform: int) -> Layout:
    """For chunks too small to be worth a look."""
    if transform != FLOATS:
        return Layout(width, PLAIN, tuple(Lane(at, 1, CODED, rare=True) for at in range(width)))
    low = (Lane(0, 2, RAW),) if width == 4 else ()
    return Layout(width, FLOATS, (*low, Lane(width - 2, 1, RAW), Lane(width - 1, 1, CODED)))


def constant_layout(width: int) -> Layout:
    """All words are the same."""
    return Layout(width, PLAIN, (Lane(0, width, CONSTANT),))


def repetitive_layout(words: Words) -> Layout | None:
    """Whole words through zstd at a level, where that finds repetitions which lanes do not: text, ids, masks."""
    data: Any = words[: (1 << 16) // words.itemsize]
    lanes = estimate_bits(data, PLAIN) / (8 * words.itemsize)
    if len(compress(data, _LEVEL)) < _LEVEL_GAIN * lanes * data.nbytes:
        return Layout(words.itemsize, PLAIN, (Lane(0, words.itemsize, CODED, level=_LEVEL),))
    return None


def without_seven(layout: Layout) -> Layout:
    """The same, for words whose top bit is set somewhere that the sample did not see."""
    lanes = (Lane(lane.start, lane.width, RAW) if lane.mode == SEVEN else lane for lane in layout.lanes)
    return layout._replace(lanes=tuple(lanes))
