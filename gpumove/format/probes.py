"""What a manifest records of a probe: of every output its digest, and elements to measure a distance by."""

from __future__ import annotations

from msgspec import Struct

MOST_VALUES = 1024
"""Elements of an output that are recorded."""


class Output(Struct, frozen=True):
    """One tensor that a probe gave. ``values`` are elements in its own dtype, little-endian: number ``i * n // k`` of
    the ``n`` in row-major order, for each ``i`` below ``k``, the smaller of ``n`` and ``MOST_VALUES``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    values: bytes


class Probe(Struct, frozen=True):
    """What a function of the model gave for fixed inputs, on rank 0."""

    name: str
    outputs: tuple[Output, ...]
