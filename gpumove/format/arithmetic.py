"""Whether this thread's floating-point unit rounds as IEEE 754 says. Knows nothing else.

``torch.set_flush_denormal`` and libraries built with -ffast-math switch a thread to treating denormals as zero, threads
inherit it from the thread that starts them, and a prediction would then come out differently from where it was made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpumove.errors import ConfigError

_LEAST_NORMAL = 2.2250738585072014e-308
_LEAST = 5e-324
_ONE = 1.0
_BIT = 2.0**-53
_ENVIRONMENT_BYTES = 256  # more than any libm's fenv_t


def is_sound() -> bool:
    """Round to nearest, denormals kept, both as operand and as result. About a microsecond."""
    return (
        _LEAST_NORMAL * 0.5 > 0.0
        and _LEAST * 2.0 > 0.0
        and _ONE + _BIT == _ONE
        and _ONE + 3 * _BIT > _ONE + 2 * _BIT
        and -_ONE - _BIT == -_ONE
    )


def _libm() -> Any:
    for name in ("libm.so.6", None):
        try:
            library = ctypes.CDLL(name)
            return library if library.fegetenv and library.fesetenv else None
        except (OSError, AttributeError):
            continue
    return None


@contextmanager
def ieee() -> Iterator[bool]:
    """Make this thread's arithmetic sound for a while, and put it back as it was. Gives whether it is sound."""
    if is_sound():
        yield True
        return
    library = _libm()
    if library is None:
        yield False
        return
    held = ctypes.create_string_buffer(_ENVIRONMENT_BYTES)
    library.fegetenv(held)
    library.fesetenv(ctypes.c_void_p(-1))  # FE_DFL_ENV, in glibc and in musl
    try:
        yield is_sound()
    finally:
        library.fesetenv(held)


@contextmanager
def require_ieee() -> Iterator[None]:
    """The same for decoders, which cannot do without.

    Raises:
        ConfigError: this thread flushes denormals to zero or rounds in another direction, and it could not be changed.
    """
    with ieee() as sound:
        if not sound:
            raise ConfigError(
                "this thread's floating-point arithmetic flushes denormals to zero or does not round to nearest, and"
                " predicted chunks cannot be decoded so: call torch.set_flush_denormal(False) before restoring",
                code="config.arithmetic",
            )
        yield
