"""The error tree: grouped by what the caller can do, with stable codes and exit codes. Knows nothing else.

::

    GpumoveError
     +- ConfigError      2   fix the call, the settings or the installation
     +- StoreError      10   the environment: it was retried, and is still wrong
     |   +- ObjectNotFoundError   the object that was asked for is not there
     +- IntegrityError  20   bytes are wrong: fall back to another checkpoint
     +- LayoutError     30   the checkpoint and the live objects do not fit
     +- FencedError     40   another owner has the run: stop now
     +- ParityError     50   the numbers are not those that they should be: look before going on

Every message says first what happened to which object, then what to do. ``code`` is stable and meant for programs:
``"<group>.<reason>"``. The exit code of the command line is the class's ``exit_code``.
"""

from __future__ import annotations

from typing import ClassVar


class GpumoveError(Exception):
    """Base of all errors that gpumove raises on purpose."""

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling by default, and errors cross ranks.
        return (_rebuild, (type(self), str(self), self.code))


def _rebuild(cls: type[GpumoveError], message: str, code: str) -> GpumoveError:
    return cls(message, code=code)


class ConfigError(GpumoveError):
    """The call, the settings or the installation are wrong; nothing was written."""

    exit_code = 2
    default_code = "config"


class StoreError(GpumoveError):
    """The object store failed, and went on failing for as long as it was retried."""

    exit_code = 10
    default_code = "store"


class ObjectNotFoundError(StoreError):
    """The object that was asked for does not exist."""

    default_code = "store.not_found"


class IntegrityError(GpumoveError):
    """Stored bytes are not the bytes that were written, or the record that describes them is damaged."""

    exit_code = 20
    default_code = "integrity"


class LayoutError(GpumoveError):
    """A checkpoint and the live objects do not fit; the message lists every difference."""

    exit_code = 30
    default_code = "layout"


class FencedError(GpumoveError):
    """Another writer has claimed the run. This process must stop writing."""

    exit_code = 40
    default_code = "fenced"


class ParityError(GpumoveError):
    """The job does not give the numbers that it gave before, or nobody can tell (code ``parity.unknown``)."""

    exit_code = 50
    default_code = "parity"


def describe(error: BaseException) -> tuple[str, str, str]:
    """An error as plain text, to cross ranks: (class, code, message)."""
    if isinstance(error, GpumoveError):
        return type(error).__name__, error.code, str(error)
    return GpumoveError.__name__, GpumoveError.default_code, f"{type(error).__name__}: {error}"


def rebuild(described: tuple[str, str, str]) -> GpumoveError:
    """The error again."""
    name, code, message = described
    known = (ConfigError, StoreError, ObjectNotFoundError, IntegrityError, LayoutError, FencedError, ParityError)
    return {k.__name__: k for k in known}.get(name, GpumoveError)(message, code=code)
