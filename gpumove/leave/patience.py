"""The store's pauses between retries, which end when the job has left: nobody waits for what comes of them."""

from __future__ import annotations

import threading

from gpumove.errors import StoreError
from gpumove.store.retry import Clock


class Patience:
    """One per store. Calls that are on their way end by themselves, within ``deadline_s``."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.clock = Clock(sleep=self._sleep)

    def end(self) -> None:
        """From now on nothing is retried."""
        self._over.set()

    def _sleep(self, seconds: float) -> None:
        if self._over.wait(seconds):
            raise StoreError("not retried: the job has left", code="store.abandoned")
