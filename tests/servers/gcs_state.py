"""Buckets and objects of the GCS test server: conditions, checksums, atomic publication. Knows no HTTP.

Everything that decides (condition checked, object published) happens in one plain function call on the server's event
loop, so of racing writers exactly one wins. With a directory, an object is one file (a JSON line, then the bytes) that
is renamed into place: it is there whole or not at all, and survives SIGKILL.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import google_crc32c

_CONDITIONS = ("ifGenerationMatch", "ifGenerationNotMatch", "ifMetagenerationMatch", "ifMetagenerationNotMatch")


class ApiError(Exception):
    """One refusal, with the HTTP status and the reason word of the real service."""

    def __init__(self, status: int, message: str, reason: str) -> None:
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason


@dataclass(frozen=True)
class Blob:
    """Bytes of one object: in memory, or in a file behind its first line."""

    nbytes: int
    data: bytes = b""
    path: Path | None = None
    skip: int = 0

    def read(self, start: int, stop: int) -> bytes | memoryview:
        if self.path is None:
            return memoryview(self.data)[start:stop]
        with self.path.open("rb") as file:
            file.seek(self.skip + start)
            return file.read(stop - start)


@dataclass(frozen=True)
class Object:
    """One generation of one object: its JSON resource and its bytes."""

    resource: dict[str, Any]
    blob: Blob

    @property
    def generation(self) -> int:
        return int(self.resource["generation"])


def digests(data: bytes) -> dict[str, str]:
    """Both checksums in the spelling of the JSON API."""
    crc = google_crc32c.value(data).to_bytes(4, "big")
    md5 = hashlib.md5(data, usedforsecurity=False).digest()
    return {"crc32c": base64.b64encode(crc).decode(), "md5Hash": base64.b64encode(md5).decode()}


def check_conditions(current: Object | None, query: Mapping[str, str], *, source: bool = False) -> None:
    """Raise 412 unless every condition of the query holds; generation 0 stands for "no object"."""
    resource = current.resource if current else {"generation": 0, "metageneration": 0}
    for condition in _CONDITIONS:
        name = condition.replace("if", "ifSource", 1) if source else condition
        if name not in query:
            continue
        value = resource["metageneration" if "Metageneration" in name else "generation"]
        if (int(query[name]) == int(value)) is ("Not" in name):
            raise ApiError(412, "At least one of the pre-conditions you specified did not hold.", "conditionNotMet")


class State:
    """All buckets of one server."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.buckets: dict[str, dict[str, Object]] = {}
        self.places: dict[str, dict[str, Any]] = {}
        """Where buckets were made, as their creators said."""
        self._last_generation = 0
        if directory is not None:
            (directory / "tmp").mkdir(parents=True, exist_ok=True)
            (directory / "buckets").mkdir(exist_ok=True)
            for path in sorted((directory / "buckets").iterdir()):
                self.buckets[path.name] = dict(self._load(path))

    def _load(self, bucket: Path) -> Iterator[tuple[str, Object]]:
        for path in bucket.iterdir():
            with path.open("rb") as file:
                line = file.readline()
            resource = json.loads(line)
            self._last_generation = max(self._last_generation, int(resource["generation"]))
            yield resource["name"], Object(resource, Blob(int(resource["size"]), path=path, skip=len(line)))

    def create_bucket(self, name: str, place: dict[str, Any] | None = None) -> None:
        if name in self.buckets:
            raise ApiError(409, "Your previous request to create the named bucket succeeded.", "conflict")
        if self.directory is not None:
            (self.directory / "buckets" / name).mkdir()
        self.buckets[name], self.places[name] = {}, place or {}

    def bucket(self, name: str) -> dict[str, Object]:
        if name not in self.buckets:
            raise ApiError(404, "The specified bucket does not exist.", "notFound")
        return self.buckets[name]

    def find(self, bucket: str, name: str, query: Mapping[str, str] | None = None) -> Object:
        """The object, if it is there and is of the generation that the query asks for."""
        found = self.bucket(bucket).get(name)
        wanted = (query or {}).get("generation")
        if found is None or (wanted is not None and int(wanted) != found.generation):
            raise ApiError(404, f"No such object: {bucket}/{name}", "notFound")
        return found

    def publish(self, bucket: str, given: dict[str, Any], data: bytes, query: Mapping[str, str]) -> Object:
        """Check checksums and conditions, then make the object visible, in one step. The last word on every write."""
        objects, name, real = self.bucket(bucket), given["name"], digests(data)
        for key, value in real.items():
            if given.get(key, value) != value:
                message = f"Provided {key} {given[key]!r} doesn't match calculated {key} {value!r}."
                raise ApiError(400, message, "invalid")
        check_conditions(objects.get(name), query)
        self._last_generation = max(self._last_generation + 1, time.time_ns() // 1000)
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        resource: dict[str, Any] = {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self._last_generation}",
            "contentType": "application/octet-stream",
            **given,
            **real,
            "bucket": bucket,
            "size": str(len(data)),
            "generation": str(self._last_generation),
            "metageneration": "1",
            "etag": base64.b64encode(self._last_generation.to_bytes(8, "big")).decode(),
            "timeCreated": now,
            "updated": now,
            "storageClass": "STANDARD",
        }
        if "componentCount" in resource:  # as the real service, which knows no MD5 of what it has composed
            del resource["md5Hash"]
        return self._put(objects, resource, data)

    def patch(self, bucket: str, name: str, changes: dict[str, Any], query: Mapping[str, str]) -> Object:
        """Change metadata only: same bytes and generation, next metageneration."""
        old = self.find(bucket, name, query)
        check_conditions(old, query)
        allowed: dict[str, Any] = {
            key: changes[key] for key in ("metadata", "contentType", "customTime") if key in changes
        }
        metageneration = str(int(old.resource["metageneration"]) + 1)
        resource = {**old.resource, **allowed, "metageneration": metageneration}
        return self._put(self.bucket(bucket), resource, bytes(old.blob.read(0, old.blob.nbytes)))

    def delete(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        found = self.find(bucket, name, query)
        check_conditions(found, query)
        if found.blob.path is not None:
            found.blob.path.unlink()
        del self.bucket(bucket)[name]

    def _put(self, objects: dict[str, Object], resource: dict[str, Any], data: bytes) -> Object:
        blob = Blob(len(data), data=data)
        if self.directory is not None:
            line = json.dumps(resource).encode() + b"\n"
            with tempfile.NamedTemporaryFile(dir=self.directory / "tmp", delete=False) as file:
                file.write(line)
                file.write(data)
            name = hashlib.sha256(resource["name"].encode()).hexdigest()
            path = self.directory / "buckets" / resource["bucket"] / name
            os.replace(file.name, path)
            blob = Blob(len(data), path=path, skip=len(line))
        objects[resource["name"]] = found = Object(resource, blob)
        return found
