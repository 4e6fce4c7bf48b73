"""A network link in numbers: a rate shared by all connections, a one-way delay, slow start. Knows no HTTP."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field

_PIECE = 64 << 10
_FIRST_WINDOW = 10 * 1460  # what TCP sends before it has heard anything
_LAST_WINDOW = 4 << 20


@dataclass
class Link:
    """One direction of a link. Several proxies may share one: two clouds behind the same uplink.

    ``rate_mbit_s=None`` is as fast as the machine.
    """

    rate_mbit_s: float | None = None
    delay_s: float = 0.0
    _free_at: float = field(default=0.0, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def direct(self) -> bool:
        return self.rate_mbit_s is None and not self.delay_s

    def reserve(self, nbytes: int) -> float:
        """Queue so many bytes; returns the time.monotonic() at which the last of them arrives."""
        with self._lock:
            seconds = nbytes * 8e-6 / self.rate_mbit_s if self.rate_mbit_s else 1e-9
            self._free_at = max(self._free_at, time.monotonic()) + seconds
            return self._free_at + self.delay_s


class Lane:
    """One connection's use of a link in one direction: bytes go in by send() and come out at the writer, later.

    Bytes under way are bounded by a window that grows by what is acknowledged, one round trip later: it doubles every
    round trip up to 4 MiB, so a single stream over a long link is slower than the link, as in reality.
    """

    def __init__(self, link: Link, writer: asyncio.StreamWriter) -> None:
        self.link, self.writer = link, writer
        self._window, self._under_way = _FIRST_WINDOW, 0
        self._acknowledged = asyncio.Event()

    async def send(self, data: bytes) -> None:
        if self.link.direct:
            self.writer.write(data)
            await self.writer.drain()
            return
        loop = asyncio.get_running_loop()  # its clock is time.monotonic()
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            while self._under_way and self._under_way + len(piece) > self._window:
                await self._next_acknowledgement()
            await self.writer.drain()
            self._under_way += len(piece)
            arrival = self.link.reserve(len(piece))
            loop.call_at(arrival, self._deliver, piece)
            loop.call_at(arrival + self.link.delay_s, self._acknowledge, len(piece))

    async def flush(self) -> None:
        """Wait until everything sent has arrived."""
        while self._under_way:
            await self._next_acknowledgement()
        await self.writer.drain()

    async def _next_acknowledgement(self) -> None:
        self._acknowledged.clear()
        await self._acknowledged.wait()

    def _deliver(self, piece: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(piece)

    def _acknowledge(self, nbytes: int) -> None:
        self._under_way -= nbytes
        self._window = min(self._window + nbytes, _LAST_WINDOW)
        self._acknowledged.set()
