"""A file or a URL that appears: for schedulers that can only run a hook, and for people."""

from __future__ import annotations

import json
import math
import os
import stat
import time
from urllib.parse import urlsplit, urlunsplit

from gpumove.notices.metadata import ask
from gpumove.notices.notice import Notice, one_line

_MOST_BYTES = 64 << 10


class _Content:
    """What was written there, as a notice. ``in_s`` counts from when that content was first seen."""

    def __init__(self, name: str, place: str) -> None:
        self._name, self._place = name, place
        self._seen: dict[bytes, float] = {}

    def notice(self, body: bytes) -> Notice:
        """A notice in any case: with a deadline if the content is JSON that has one."""
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            return Notice(self._name, None, self._place)
        deadline, in_s = _number(told.get("deadline")), _number(told.get("in_s"))
        if deadline is None and in_s is not None:
            if body not in self._seen:
                self._seen = {body: time.time()}
            deadline = self._seen[body] + in_s
        source, detail = told.get("source"), told.get("detail")
        return Notice(
            one_line(source, 32) if isinstance(source, str) and source.strip() else self._name,
            deadline,
            one_line(detail) if isinstance(detail, str) and detail.strip() else self._place,
        )


def _number(value: object) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if known and math.isfinite(value) else None  # type: ignore[arg-type]


class File:
    """A file: there or not."""

    name = "file"
    pause_s = 0.5

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(os.path.expanduser(path))
        self._content = _Content(self.name, one_line(f"{self._path} appeared"))

    def poll(self) -> Notice | None:
        """Look for it."""
        try:
            # Not blocking: a fifo would wait for a writer for ever.
            fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError(f"{self._path} is no file")
            return self._content.notice(os.read(fd, _MOST_BYTES))
        finally:
            os.close(fd)


class Url:
    """A URL: 200 is a notice, 204, 404 and 410 are none, everything else is a failure."""

    name = "url"
    pause_s = 5.0

    def __init__(self, url: str, *, limit_s: float = 10.0) -> None:
        self._url, self._limit_s = url, limit_s
        self._content = _Content(self.name, one_line(f"{public(url)} appeared"))

    def poll(self) -> Notice | None:
        """Ask for it."""
        answer = ask(self._url, limit_s=self._limit_s)
        if answer.status in (204, 404, 410):
            return None
        answer.text()  # raises for every other status
        return self._content.notice(answer.body)


def public(url: str) -> str:
    """A URL without what may be secret in it: the credentials and the query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
