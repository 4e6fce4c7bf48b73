"""The metadata services of three clouds on loopback, as their documentation describes them, and servers that are wrong.

    with Imds() as imds:
        source = Aws(imds.base)
        imds.action = {"action": "terminate", "time": "2026-01-01T00:02:00Z"}

Real HTTP servers with real sockets. Each listens on a free port of 127.0.0.1 and answers only what the cloud answers.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: Service

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.service.requests.append(f"{self.command} {self.path}")
        status, headers, answer = self.service.answer(self.command, self.path, dict(self.headers.items()), body)
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

    do_GET = do_PUT = do_POST = _serve  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Quiet: ``requests`` has them."""


Answer = tuple[int, dict[str, str], bytes]


class Service:
    """An HTTP server in a thread of its own, between ``with`` and its end."""

    def __init__(self) -> None:
        handler = type("Handler", (_Handler,), {"service": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.base = f"http://127.0.0.1:{self._server.server_port}"
        self.requests: list[str] = []

    def __enter__(self) -> Any:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def encrypt(self, directory: Path) -> Path:
        """Speak TLS from now on, with a certificate of its own; the file to trust."""
        certificate, key = directory / "cert.pem", directory / "key.pem"
        new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=127.0.0.1"
        name = ["-addext", "subjectAltName=IP:127.0.0.1"]
        files = ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*new.split(), *name, *files], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.base = self.base.replace("http:", "https:")
        return certificate

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        raise NotImplementedError

    def count(self, start: str) -> int:
        return sum(request.startswith(start) for request in self.requests)


class Plain(Service):
    """One document at ``/leave``, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.status, self.headers, self.body = 404, {}, b""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        return self.status, self.headers, self.body


class Imds(Service):
    """EC2. Tokens are needed and expire, unless it is made to know IMDSv1 only, or both."""

    def __init__(self, *, tokens: str = "required") -> None:
        super().__init__()
        # "required", "optional", "unknown", "lost" (the hop limit swallows the answer), "refused" (none is ever valid)
        self.tokens = tokens
        self.action: Any = None
        self.rebalance: Any = None
        self._valid: set[str] = set()

    def expire(self) -> None:
        self._valid.clear()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        given = {name.lower(): value for name, value in headers.items()}
        if path == "/latest/api/token":
            return self._token(method, given)
        token = given.get("x-aws-ec2-metadata-token")
        # A request with a token is held to it, wherever tokens are known.
        needed = token is not None or self.tokens in ("required", "refused")
        if self.tokens != "unknown" and needed and token not in self._valid:
            return 401, {}, b"Unauthorized"
        documents = {
            "/latest/meta-data/spot/instance-action": self.action,
            "/latest/meta-data/events/recommendations/rebalance": self.rebalance,
        }
        if (found := documents.get(path)) is None:
            return 404, {"Content-Type": "text/html"}, b"<html>404 - Not Found</html>"
        return 200, {"Content-Type": "text/plain"}, found if isinstance(found, bytes) else json.dumps(found).encode()

    def _token(self, method: str, given: dict[str, str]) -> Answer:
        if self.tokens == "unknown":
            return 404, {}, b""
        if self.tokens == "lost":
            time.sleep(30)
        if method != "PUT" or "x-forwarded-for" in given:
            return (403 if method == "PUT" else 405), {}, b""
        ttl = given.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if not ttl.isdigit() or not 1 <= int(ttl) <= 21600:
            return 400, {}, b"Bad Request"
        token = uuid.uuid4().hex
        if self.tokens != "refused":
            self._valid.add(token)
        return 200, {"X-aws-ec2-metadata-token-ttl-seconds": ttl}, token.encode()


class Gce(Service):
    """Compute Engine, with requests that are answered when the value changes."""

    def __init__(self, *, waits: bool = True) -> None:
        super().__init__()
        self._waits = waits
        self._changed = threading.Condition()
        self._values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self._etags = dict.fromkeys(self._values, "1a2b")
        self.unavailable = 0

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key], self._etags[key] = value, uuid.uuid4().hex[:16]
            self._changed.notify_all()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        parts = urlsplit(path)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        flavour = {"Metadata-Flavor": "Google", "Content-Type": "application/text"}
        if headers.get("Metadata-Flavor") != "Google":
            return 403, flavour, b"Missing Metadata-Flavor:Google header."
        if self.unavailable:
            self.unavailable -= 1
            return 503, flavour, b""
        key = parts.path.removeprefix("/computeMetadata/v1/instance/")
        if key not in self._values:
            return 404, flavour, b""
        with self._changed:
            if self._waits and query.get("wait_for_change") == "true":
                before = query.get("last_etag") or self._etags[key]
                limit = float(query.get("timeout_sec") or 3600)
                self._changed.wait_for(lambda: self._etags[key] != before, timeout=limit)
            return 200, {**flavour, "ETag": self._etags[key]}, self._values[key].encode()


class AzureImds(Service):
    """Scheduled Events of a scale set, and the name of the VM that asks."""

    def __init__(self, name: str = "train-vmss_3", *, first_s: float = 0.0) -> None:
        super().__init__()
        self._name, self._first_s = name, first_s
        self.events: list[dict[str, Any]] = []
        self.started: list[str] = []

    def schedule(self, kind: str, resources: list[str], not_before: str, **more: Any) -> str:
        event = str(uuid.uuid4()).upper()
        self.events.append(
            {"EventId": event, "EventStatus": "Scheduled", "EventType": kind, "ResourceType": "VirtualMachine",
             "Resources": resources, "NotBefore": not_before, "Description": "", "EventSource": "Platform",
             "DurationInSeconds": -1, **more}
        )  # fmt: skip
        return event

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        parts = urlsplit(path)
        if headers.get("Metadata") != "true" or "api-version" not in parse_qs(parts.query):
            return 400, {}, b'{"error": "Bad request"}'
        if parts.path == "/metadata/instance/compute/name" and method == "GET":
            return 200, {"Content-Type": "text/plain"}, self._name.encode()
        if parts.path != "/metadata/scheduledevents":
            return 404, {}, b""
        if method == "POST":
            return self._start(body)
        wait, self._first_s = self._first_s, 0.0
        time.sleep(wait)
        answer = {"DocumentIncarnation": len(self.events), "Events": self.events}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def _start(self, body: bytes) -> Answer:
        try:
            asked = [request["EventId"] for request in json.loads(body)["StartRequests"]]
        except (ValueError, KeyError, TypeError):
            return 400, {}, b""
        found = [event for event in self.events if event["EventId"] in asked]
        if len(found) != len(asked):
            return 400, {}, b""
        for event in found:
            event.update(EventStatus="Started", NotBefore="")
        self.started += asked
        return 200, {}, b""


class Rude:
    """A server that does as it is told with each connection, once it has the request's head."""

    def __init__(self, behave: Callable[[socket.socket], None]) -> None:
        self._behave = behave
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.base = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.sent_bytes = 0

    def __enter__(self) -> Rude:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(30)
            client.recv(65536)
            self._behave(client)


def hangs(client: socket.socket) -> None:
    """Accepts and never answers."""
    client.recv(1)


def drips(client: socket.socket) -> None:
    """An answer that is right, a byte a quarter of a second."""
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\nMetadata-Flavor: Google\r\n\r\n" + b"T" * 400:
        client.sendall(bytes([byte]))
        time.sleep(0.25)


def floods(client: socket.socket) -> None:
    """A body of 1 GB, as much of it as is taken."""
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\nMetadata-Flavor: Google\r\n\r\n")
    for _ in range(1000):
        client.sendall(bytes(1_000_000))


def vanishes(client: socket.socket) -> None:
    """Gone in the middle of a body."""
    client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 60\r\nMetadata-Flavor: Google\r\n\r\n{"action":')


def resets(client: socket.socket) -> None:
    """A reset in place of an answer."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def rubbish(client: socket.socket) -> None:
    """What is no HTTP at all."""
    client.sendall(bytes(range(256)) * 20)


def cut_short(client: socket.socket) -> None:
    """A Content-Length that is less than the body."""
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nMetadata-Flavor: Google\r\n\r\nTRUE")


def page(client: socket.socket) -> None:
    """A page of something else that has this address: a captive portal, another cloud."""
    body = b"<html><body>Log in to continue</body></html>"
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def redirects_to(base: str) -> Callable[[socket.socket], None]:
    """A redirect to another server, for every path."""

    def redirect(client: socket.socket) -> None:
        client.sendall(f"HTTP/1.1 302 Found\r\nLocation: {base}/leave\r\nContent-Length: 0\r\n\r\n".encode())

    return redirect
