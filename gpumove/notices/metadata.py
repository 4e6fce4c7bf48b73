"""One HTTP call that ends: no proxy, no redirect, 64 KiB at most, and a bound on the whole of it. Knows no cloud.

What ``http.client`` bounds is one receive, so a server that sends a byte a second would hold it for ever.
"""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, cast
from urllib.parse import urlsplit

LINK_LOCAL = "http://169.254.169.254"
"""Where all three clouds answer. An address, since looking a name up has no bound."""
_MOST_BYTES = 64 << 10
_CONNECT_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What came back, whatever its status."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    def text(self) -> str:
        """The body of a 200, stripped.

        Raises:
            ConnectionError: another status; redirects are among these, for they are never followed.
        """
        if self.status != 200:
            raise ConnectionError(f"it answered with status {self.status}")
        return self.body.decode("utf-8", "replace").strip()

    def json(self) -> dict[str, Any]:
        """The body of a 200 that holds a JSON object.

        Raises:
            ConnectionError: another status.
            ValueError: something else.
        """
        found = json.loads(self.text())
        if not isinstance(found, dict):
            raise ValueError("it answered with JSON that is no object")  # noqa: TRY004 - what is wrong is the data
        return found


class _Until(io.RawIOBase):
    """A socket to read from until a moment, however little comes at a time."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock, self._end = sock, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("no whole answer in time")
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What ``HTTPResponse`` asks a socket for."""
        return io.BufferedReader(self)


def ask(
    url: str,
    *,
    limit_s: float,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> Answer:
    """Call, and return whatever answer came whole within ``limit_s`` seconds.

    Raises:
        OSError: no connection, or no whole answer in time.
        http.client.HTTPException: what came is not HTTP, or less than was announced.
        ValueError: more than 64 KiB.
    """
    end = time.monotonic() + limit_s
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=min(limit_s, _CONNECT_S))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request(method, target, body, {"Connection": "close", **(headers or {})})
        response = HTTPResponse(cast("socket.socket", _Until(connection.sock, end)), method=method)
        response.begin()
        data = _read(response)
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, data)
    finally:
        connection.close()


def _read(response: HTTPResponse) -> bytes:
    data = b""
    while len(data) <= _MOST_BYTES and (piece := response.read(_MOST_BYTES + 1 - len(data))):
        data += piece
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it answered with more than {_MOST_BYTES >> 10} KiB")
    if response.length:  # http.client tells this by itself only where the whole is read in one go
        raise ConnectionError(f"the answer ended {response.length} bytes early")
    return data


def moment(text: object) -> float | None:
    """A date as clouds write them (ISO 8601 or RFC 1123) as seconds since the epoch; None for anything else."""
    if not isinstance(text, str):
        return None
    for parse in (lambda t: datetime.fromisoformat(t.replace("Z", "+00:00")), parsedate_to_datetime):
        try:
            found = parse(text.strip())
            return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()
        except (ValueError, TypeError, OverflowError, IndexError):
            continue
    return None
