"""Which tensors have not changed since they were last copied, found without copying them.

A fingerprint is two sums, modulo 2**64, of a tensor's 32-bit words times random weights that only this process knows:
two different contents have the same one with a chance of 2**-64 at most, about. It is computed where the tensor is. On
the host the hash that chunks have serves, which is faster there.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

import torch

from gpumove.format.codec import digest

_WORDS = 1 << 22
"""Words at a time: temporary memory on the device is about ten times as many bytes."""
_SEEDS = tuple(secrets.randbits(63) | 1 for _ in range(2))
_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47)
"""Odd constants with well-spread bits, as int64."""


def fingerprint(tensor: torch.Tensor, mark: torch.Tensor | None = None) -> bytes:
    """A tensor's fingerprint. ``mark``: what :func:`device_fingerprint` made, if it is on a device, on the host."""
    if mark is not None:
        return mark.numpy().tobytes()
    return digest(_flat(tensor).numpy().data).encode()


def device_fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """The same of a tensor on a device, computed there in the current stream and not waited for."""
    return sums(_flat(tensor))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def sums(flat: torch.Tensor) -> torch.Tensor:
    """The weighted sums of bytes, on whatever device they are.

    Args:
        flat: uint8, contiguous.

    Returns:
        int64 of shape [2].
    """
    if odd := flat.numel() % 4:
        flat = torch.nn.functional.pad(flat, (0, 4 - odd))
    words = flat.view(torch.int32)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, words.numel(), _WORDS):
        part = words[start : start + _WORDS].to(torch.int64)
        place = torch.arange(start, start + part.numel(), dtype=torch.int64, device=flat.device)
        for n, seed in enumerate(_SEEDS):
            total[n] += (part * _weights(place, seed)).sum()
    return total


def _weights(place: torch.Tensor, seed: int) -> torch.Tensor:
    """Pseudo-random 64-bit numbers by index: multiply and fold, twice. Integer overflow wraps, as it is meant to."""
    mixed = (place + seed) * _MIX[0]
    mixed = (mixed ^ (mixed >> 31)) * _MIX[1]
    return mixed ^ (mixed >> 29)


class Watch:
    """Remembers fingerprints of sources that did not change lately, by their number in the layout."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}
        self.candidates: frozenset[int] = frozenset()
        """Sources worth a look: those that were unchanged at the last save, or are likely to be."""

    def forget(self, candidates: frozenset[int] = frozenset()) -> None:
        """The layout or the memory behind it is another one; these sources are worth a look all the same."""
        self._known, self.candidates = {}, candidates

    def settle(self, clean: Iterable[int]) -> None:
        """A save ended: these sources were as they were at the one before."""
        self.candidates = frozenset(clean)
        self._known = {n: mark for n, mark in self._known.items() if n in self.candidates}

    def changed(self, marks: Mapping[int, bytes]) -> list[int]:
        """Those that are to be copied: changed, or seen for the first time."""
        found = [number for number, mark in marks.items() if self._known.get(number) != mark]
        self._known.update(marks)
        return found
