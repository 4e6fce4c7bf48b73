"""What the options of several verbs mean: storage options, sizes, rates, numbers. Text in, values out."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from gpumove.errors import ConfigError

T = TypeVar("T")
_LARGEST = sys.float_info.max
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("IB", 1024), ("", 1000))
}


def given(args: argparse.Namespace, option: str, parse: Callable[[str, str], T]) -> T | None:
    """What an option says, parsed; None if it was left out."""
    text = getattr(args, _field(option))
    return None if text is None else parse(option, text)


def _field(option: str) -> str:
    """Where argparse puts it."""
    return option.lstrip("-").replace("-", "_")


def storage_options(args: argparse.Namespace, option: str = "--option") -> dict[str, Any]:
    """``--option key=value`` as a dict; dots nest. Values may be secrets, so that no message holds one."""
    options: dict[str, Any] = {}
    for number, text in enumerate(getattr(args, _field(option)), 1):
        name, equals, value = text.partition("=")
        words = name.split(".")
        if not equals or not all(words):
            raise ConfigError(f"the {option} number {number} is not of the form key=value")
        into = options
        for word in words[:-1]:
            into = into.setdefault(word, {})
            if not isinstance(into, dict):
                raise ConfigError(f"the {option} number {number} goes below one that has a value")
        into[words[-1]] = _value(value)
    return options


def add_copying(found: argparse.ArgumentParser) -> None:
    """The options of every verb that copies from one store to another."""
    found.add_argument("--limit", metavar="RATE", help="no more than this, such as 200MB/s or 1Gbit/s")
    found.add_argument("--in-flight", metavar="N", default="16", help="objects under way at once (16)")
    found.add_argument("--to-region", metavar="REGION", help="where the store copied to lies, if it does not tell")


def copying(args: argparse.Namespace) -> dict[str, Any]:
    """What they say, and the storage options of both ends, as arguments."""
    return {
        "limit": given(args, "--limit", parse_rate),
        "in_flight": whole("--in-flight", args.in_flight),
        "to_region": args.to_region,
        "from_options": storage_options(args, "--from-option"),
        "to_options": storage_options(args, "--to-option"),
    }


def _value(text: str) -> Any:
    """JSON where it reads as JSON (true, 3, {...}, "3"), else the text itself."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def parse_size(option: str, text: str) -> int:
    """A size such as ``5GB`` (powers of 1000) or ``512MiB`` (powers of 1024), in bytes.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise ConfigError(f"{option} takes a size such as 5GB or 512MiB, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_rate(option: str, text: str) -> float:
    """A rate such as ``200MB/s`` or ``1Gbit/s``, in bytes per second. A bare number could be meant in either.

    Raises:
        ConfigError: it is none.
    """
    amount = text.strip().removesuffix("/s")
    size = amount.removesuffix("bit")
    try:
        found = parse_size(option, size) / (1 if size == amount else 8)
        found = 0 if size == amount and size[-1:].isdecimal() else found
    except ConfigError:
        found = 0
    if found <= 0:
        raise ConfigError(f"{option} takes a rate such as 200MB/s or 1Gbit/s, not {text!r}")
    return found


def whole(option: str, text: str) -> int:
    """A whole number.

    Raises:
        ConfigError: it is none.
    """
    if not text.isdecimal():
        raise ConfigError(f"{option} takes a whole number of at least 0, not {text!r}")
    return int(text)


def number(option: str, text: str, what: str, *, low: float = -_LARGEST, high: float = _LARGEST) -> float:
    """A number between two others, which count too. ``what`` says in the message which it could be.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not low <= found <= high:
        raise ConfigError(f"{option} takes {what}, not {text!r}")
    return found


def seconds(option: str, text: str) -> float:
    """A time such as ``30``, ``30s``, ``1.5min`` or ``2h``, in seconds.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)?", text.strip())
    if not match:
        raise ConfigError(f"{option} takes a time such as 30s, 1.5min or 2h, not {text!r}")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2] or "s"]
