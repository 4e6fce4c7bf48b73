"""How long a job that is asked to leave is waited for."""

from __future__ import annotations

import time

_ASKED_AGAIN = 2.0


class Patience:
    """Each request has the whole time; all requests of one move together have it twice.

    A job that was started again is asked again. One that crashes and is started again and again would otherwise be
    waited for without an end, as each of its lives is too short to read what is asked of it.

    Args:
        timeout_s: for a request.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._number, self._until, self._first = 0, 0.0, 0.0

    def ended(self, number: int) -> bool:
        """Whether the time of the request with this number is over; it began when this was asked first."""
        now = time.monotonic()
        if self._number != number:
            self._first = self._first or now
            self._number = number
            self._until = min(now + self.timeout_s, self._first + _ASKED_AGAIN * self.timeout_s)
        return now >= self._until

    @property
    def given_s(self) -> float:
        """From the first request to the end."""
        return round(self._until - self._first, 1)
