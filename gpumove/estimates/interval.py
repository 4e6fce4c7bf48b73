"""A number that is known to lie between two others, and sums over such. Knows no units."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """A value with the least and the most that it may be. All three are finite, and in order."""

    low: float
    value: float
    high: float

    def __post_init__(self) -> None:
        if not (self.low <= self.value <= self.high and math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError(f"{self.low}, {self.value}, {self.high} are not in order, or not finite")

    @classmethod
    def exact(cls, value: float) -> Range:
        """Known for sure."""
        return cls(value, value, value)

    @classmethod
    def around(cls, value: float, share: float) -> Range:
        """A value above 0 that may be off by this share, either way."""
        return cls(value / (1 + share), value, value * (1 + share))

    @classmethod
    def over(cls, value: float, *others: float) -> Range:
        """A value, and whatever else it might be."""
        return cls(min(value, *others), value, max(value, *others))

    @property
    def is_exact(self) -> bool:
        """Whether nothing about it is uncertain."""
        return self.low == self.high

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.value + other.value, self.high + other.high)

    def __sub__(self, other: Range) -> Range:
        return Range(self.low - other.high, self.value - other.value, self.high - other.low)

    def __mul__(self, other: Range | float) -> Range:
        if not isinstance(other, Range):
            other = Range.exact(other)
        # Rounding is monotone, so that the value cannot leave the corners.
        corners = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Range(min(corners), self.value * other.value, max(corners))

    def __truediv__(self, other: Range | float) -> Range:
        if not isinstance(other, Range):
            other = Range.exact(other)
        if other.low <= 0 <= other.high:
            raise ZeroDivisionError("division by what may be 0")
        corners = [a / b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Range(min(corners), self.value / other.value, max(corners))


def total(*parts: Range | None) -> Range | None:
    """The sum, which is unknown if a part is."""
    found = Range.exact(0.0)
    for part in parts:
        if part is None:
            return None
        found = found + part
    return found


def product(*factors: Range | None) -> Range | None:
    """The product, which is unknown if a factor is."""
    found = Range.exact(1.0)
    for factor in factors:
        if factor is None:
            return None
        found = found * factor
    return found
