"""This process's command line as others see it: secrets that were given there are overwritten. Linux only.

Every user of a machine may read every command line. What was given is gone from there as soon as a verb starts; before
that, for as long as an interpreter takes to start, it can be seen. The process itself keeps what it was given.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

_OPTION = re.compile(rb"--(?:[a-z]+-)?option(?:=(.*))?", re.DOTALL)
_USER = re.compile(rb"(?<=://)[^/@]*(?=@)|(?<=://)[^/@]*:.*(?=@)", re.DOTALL)
_SHOWN_VALUE, _SHOWN_USER = re.compile(r"=[^\s'\"]+"), re.compile(r"(?<=://)\S+(?=@)")


def hide_secrets() -> None:
    """Overwrite the values of storage options and the users in URLs, as far as ``--``. Does nothing where it cannot."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Behind the name in brackets, which may hold anything: fields 48 and 49 of proc(5).
        start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
        if start:
            ctypes.memmove(start, masked(ctypes.string_at(start, end - start)), end - start)


def masked(line: bytes) -> bytes:
    """The words of a command line, each ended by a zero byte, without secrets; of the same length."""
    words, value = line.split(b"\0"), False
    for place, word in enumerate(words):
        if word == b"--":
            break
        option = _OPTION.fullmatch(word)
        given = word if value else option[1] if option else None
        value = option is not None and option[1] is None and not value
        if given is not None and b"=" in given:
            secret = given.partition(b"=")[2]
            words[place] = word[: len(word) - len(secret)] + b"*" * len(secret)
        else:
            words[place] = _USER.sub(lambda found: b"*" * len(found[0]), word)
    return b"\0".join(words)


def shown(message: str) -> str:
    """What argparse says of words that it does not know, without their values."""
    return _SHOWN_USER.sub("***", _SHOWN_VALUE.sub("=***", message))
