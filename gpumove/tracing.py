"""What ran when during one save: spans by thread, as JSON that chrome://tracing and Perfetto open."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Span(NamedTuple):
    """One piece of work. Times are seconds of ``time.perf_counter``."""

    name: str
    thread: int
    began: float
    ended: float
    details: dict[str, Any]


class Trace:
    """Collects the spans of one save, from any thread. One that is not ``on`` costs a comparison per span."""

    def __init__(self, *, on: bool) -> None:
        self.on = on
        self._spans: list[Span] = []
        self._threads: dict[int, str] = {}

    @contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        """Time what runs inside."""
        if not self.on:
            yield
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, began, time.perf_counter(), **details)

    def add(self, name: str, began: float, ended: float, **details: Any) -> None:
        """Something that was timed elsewhere; it belongs to the calling thread."""
        if self.on:
            thread = threading.current_thread()
            self._threads[thread.ident or 0] = thread.name
            self._spans.append(Span(name, thread.ident or 0, began, ended, details))  # one bytecode: no lock is needed

    def seconds(self) -> dict[str, float]:
        """Seconds by name, all threads together."""
        total: dict[str, float] = {}
        for span in self._spans:
            total[span.name] = total.get(span.name, 0.0) + span.ended - span.began
        return total

    def write(self, path: Path, *, rank: int) -> None:
        """Store the trace as one JSON file, whole or not at all; ``path``'s folder is made if it is not there."""
        events: list[dict[str, Any]] = [
            {"ph": "X", "name": s.name, "pid": rank, "tid": s.thread, "ts": s.began * 1e6,
             "dur": (s.ended - s.began) * 1e6, "args": s.details}
            for s in sorted(self._spans, key=lambda s: s.began)
        ]  # fmt: skip
        events += [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": ident, "args": {"name": name}}
            for ident, name in self._threads.items()
        ]
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        os.replace(partial, path)
