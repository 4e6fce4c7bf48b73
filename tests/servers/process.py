"""Child processes that serve HTTP on loopback: a free port, a wait for our own child's answer, a sure end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".tools"
START_S = 150.0

RUNNING: list[Server] = []
"""What runs now; the test report reads the ends of the logs from here."""


class ServerError(Exception):
    """A server could not be started. That is a failure, never a reason to skip."""


@dataclass(frozen=True)
class Bucket:
    """One bucket (or container) as seen from one address: all that a client needs."""

    url: str
    """As gpumove takes it, for example ``s3://bucket``."""
    options: Mapping[str, Any]
    """Arguments of the fsspec file system."""
    env: Mapping[str, str]
    """The same for programs that take no options."""
    endpoint: str
    """Address of the HTTP server, or of a proxy in front of it."""
    describe: Callable[[str, str], Bucket] = field(repr=False)
    create: Callable[[Bucket], None] = field(repr=False)

    def via(self, endpoint: str) -> Bucket:
        """The same bucket seen through another address, such as a proxy's."""
        return self.describe(endpoint, self.name)

    def missing(self, name: str) -> Bucket:
        """A bucket of that name on the same server, which is not created."""
        return self.describe(self.endpoint, name)

    def another(self, name: str) -> Bucket:
        """A new bucket on the same server: the other cloud of a move."""
        bucket = self.missing(name)
        bucket.create(bucket)
        return bucket

    @property
    def name(self) -> str:
        return self.url.partition("://")[2]


@dataclass(frozen=True)
class Server:
    """A running child."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_tail(self, since: int = 0) -> str:
        """The end of what it wrote after the given offset."""
        return self.log.read_bytes()[since:][-4000:].decode(errors="replace")


def tool(path: str) -> Path:
    """A program under .tools, or the error that says how to get it."""
    found = TOOLS / path
    if not found.exists():
        raise ServerError(f"the test server {path} is not installed: run `make tools`")
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def run_server(
    name: str, command: Callable[[int], Sequence[str | Path]], *, log: Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run ``command(port)`` until the block ends; its whole process group is killed then.

    Raises:
        ServerError: three children in a row did not come up; the message ends with the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):  # another process may take the port between our look and the child's bind
        server = _spawn(name, free_port(), command, log, env or {})
        try:
            _wait_until_up(server)
            break
        except ServerError:
            _kill(server)
            if attempt == 2:
                raise
    RUNNING.append(server)
    try:
        yield server
    finally:
        RUNNING.remove(server)
        _kill(server)


def _spawn(
    name: str, port: int, command: Callable[[int], Sequence[str | Path]], log: Path, env: Mapping[str, str]
) -> Server:
    # The kernel ends the server even if the test process is killed and never reaches its `finally`.
    setpriv = shutil.which("setpriv")
    leash = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*leash, *map(str, command(port))],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
            start_new_session=True,
        )
    return Server(name, port, process, log)


def _wait_until_up(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if (status := server.process.poll()) is not None:
            raise ServerError(f"{server.name} ended with status {status} at its start; its log:\n{server.log_tail()}")
        if _listens(server) and _answers(server.endpoint):
            return
        time.sleep(0.05)
    raise ServerError(f"{server.name} did not answer within {START_S:.0f} s; its log:\n{server.log_tail()}")


def _listens(server: Server) -> bool:
    """Whether our own child, not a stranger, has the port; and on loopback only."""
    try:
        family = psutil.Process(server.process.pid)
        members = [family, *family.children(recursive=True)]
        sockets = [c for member in members for c in member.net_connections(kind="tcp")]
    except psutil.Error:
        return False
    addresses = {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN and c.laddr.port == server.port}
    if addresses - {"127.0.0.1", "::ffff:127.0.0.1"}:
        raise ServerError(f"{server.name} listens on {sorted(addresses)}: a test server must stay on loopback")
    return bool(addresses)


def _answers(endpoint: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # any status is an answer
    except OSError:
        return False
    return True


def _kill(server: Server) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=10)
