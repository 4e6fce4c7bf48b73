"""A proxy in front of an object store that makes the way to it slow, lossy or wrong. HTTP/1.1, no TLS.

    with Proxy(bucket.endpoint, up=Link(200, delay_s=0.02), down=Link(200, delay_s=0.02)) as proxy:
        fault = proxy.fail("lost_ack", r"^PUT .*entry", times=1)
        ... use bucket.via(proxy.endpoint) ...
        assert fault.fired == 1

Every request of a kept-alive connection is looked at on its own, and goes to the server on a connection of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from tests.servers.link import Lane, Link

Kind = Literal[
    "reset",  # the connection is reset when the request's head has arrived; the server sees nothing
    "lost_ack",  # the server does it all, its answer is lost and the connection reset
    "status",  # an answer with this status instead of the server's
    "stall",  # silence, from the head on
    "reset_up", "reset_down", "stall_up", "stall_down", "corrupt_up", "corrupt_down",  # after `after` bytes of a body
]  # fmt: skip


@dataclass
class Fault:
    """What happens to requests whose head (request line and headers) matches."""

    kind: Kind
    pattern: re.Pattern[str]
    times: float
    skip: int
    status: int
    after: int
    fired: int = 0
    """How often it has really happened."""

    def takes(self, head: str) -> bool:
        if self.times <= 0 or not self.pattern.search(head):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class _BrokenError(Exception):
    """A fault has ended this connection."""


class Proxy:
    """Listens on its own loopback port; runs in a thread of its own between ``with`` and its end."""

    def __init__(self, target: str, *, up: Link | None = None, down: Link | None = None) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._up, self._down = up or Link(), down or Link()
        self._faults: list[Fault] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self.endpoint = ""
        self.requests: list[str] = []
        """The first line of every request so far."""
        self.bytes_up = self.bytes_down = 0
        """Body bytes that have passed."""

    def __enter__(self) -> Proxy:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    def fail(
        self, kind: Kind, pattern: str = "", *, times: float = 1, skip: int = 0, status: int = 503, after: int = 0
    ) -> Fault:
        """Arrange a fault for the next ``times`` requests that match, after letting ``skip`` of them pass."""
        fault = Fault(kind, re.compile(pattern), times, skip, status, after)
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults and counts."""
        self._faults.clear()
        self.requests.clear()
        self.bytes_up = self.bytes_down = 0

    async def _cancel_all(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lane = Lane(self._down, writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError, _BrokenError):
            await asyncio.sleep(self._up.delay_s + self._down.delay_s)  # the handshake
            while await self._one_request(reader, lane):
                pass
            await lane.flush()
        if not writer.is_closing():
            writer.close()

    async def _one_request(self, reader: asyncio.StreamReader, lane: Lane) -> bool:
        """Serve one request; returns whether another may follow on this connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        text = head.decode("latin-1")
        self.requests.append(text.partition("\r\n")[0])
        fault = next((f for f in self._faults if f.takes(text)), None)
        if fault and fault.kind in ("reset", "stall", "status"):
            return await self._refuse(fault, text, reader, lane)
        server_reader, server_writer = await asyncio.open_connection(*self._target, limit=1 << 20)
        upload = asyncio.create_task(self._upload(fault, head, reader, Lane(self._up, server_writer), lane))
        answer = asyncio.create_task(self._answer(fault, text, server_reader, lane))
        try:
            await asyncio.wait({upload, answer}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and (error := upload.exception()):
                # A server that has heard enough answers, and stops reading: its answer is still to come.
                done, _ = await asyncio.wait({answer}, timeout=5 if isinstance(error, OSError) else 0)
                if not done:
                    return False
            again = await answer
            return again and upload.done() and not upload.exception()
        finally:
            upload.cancel()
            answer.cancel()
            await asyncio.gather(upload, answer, return_exceptions=True)
            server_writer.close()

    async def _refuse(self, fault: Fault, text: str, reader: asyncio.StreamReader, lane: Lane) -> bool:
        fault.fired += 1
        if fault.kind == "reset":
            raise self._reset(lane)
        if fault.kind == "stall":
            await asyncio.sleep(3600)
        if "100-continue" not in text.lower():
            async for _, _ in _body(text, reader):
                pass
        reply = f"HTTP/1.1 {fault.status} Injected\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        await lane.send(reply.encode())
        return False

    async def _upload(
        self, fault: Fault | None, head: bytes, reader: asyncio.StreamReader, up: Lane, client: Lane
    ) -> None:
        await up.send(head)
        passed = 0
        async for data, payload in _body(head.decode("latin-1"), reader):
            await up.send(await self._touch(fault, "up", data, passed, client) if payload else data)
            passed += len(data) if payload else 0
            self.bytes_up += len(data)

    async def _answer(self, fault: Fault | None, request: str, reader: asyncio.StreamReader, lane: Lane) -> bool:
        head = b""
        while not head or head.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):  # 100 Continue comes before the answer
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):
                await lane.send(head)
        text = head.decode("latin-1")
        lost = fault is not None and fault.kind == "lost_ack"
        if not lost:
            await lane.send(head)
        passed = 0
        async for data, payload in _body(text, reader, request=request):
            if not lost:
                await lane.send(await self._touch(fault, "down", data, passed, lane) if payload else data)
            passed += len(data) if payload else 0
            self.bytes_down += len(data)
        if fault is not None and lost:
            fault.fired += 1
            raise self._reset(lane)
        return not re.search(r"(?im)^connection: *close", text) and _framed(text)

    async def _touch(self, fault: Fault | None, way: str, data: bytes, passed: int, client: Lane) -> bytes:
        """Let a piece of a body pass, or do to it what the fault says, at its byte number ``after``."""
        if fault is None or not fault.kind.endswith(way) or not passed <= fault.after < passed + len(data):
            return data
        fault.fired += 1
        at = fault.after - passed
        if fault.kind.startswith("corrupt"):
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if fault.kind.startswith("stall"):
            await asyncio.sleep(3600)
        raise self._reset(client)

    def _reset(self, lane: Lane) -> _BrokenError:
        sock: socket.socket = lane.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
        lane.writer.transport.abort()
        return _BrokenError()


def _framed(head: str) -> bool:
    return re.search(r"(?im)^(content-length:|transfer-encoding:.*chunked)|^HTTP/1.1 (204|304)", head) is not None


async def _body(head: str, reader: asyncio.StreamReader, *, request: str = "") -> AsyncIterator[tuple[bytes, bool]]:
    """The body behind a head, as (bytes, whether they are payload and not chunk framing)."""
    answer = head.startswith("HTTP/")
    if answer and (request.startswith("HEAD ") or re.match(r"HTTP/1.. (204|304)", head)):
        return
    length = re.search(r"(?im)^content-length: *(\d+)", head)
    if re.search(r"(?im)^transfer-encoding:.*chunked", head):
        size = -1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line, False
            left = size
            while left:
                data = await reader.read(min(left, 1 << 18))
                if not data:
                    raise asyncio.IncompleteReadError(b"", left)
                left -= len(data)
                yield data, True
            yield await reader.readuntil(b"\r\n"), False  # after the last chunk: no trailers are sent by our clients
        return
    left = int(length[1]) if length else (1 << 62 if answer else 0)
    while left:
        data = await reader.read(min(left, 1 << 18))
        if not data:
            if length:
                raise asyncio.IncompleteReadError(b"", left)
            return
        left -= len(data)
        yield data, True
