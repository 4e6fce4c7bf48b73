"""The back end for Google Cloud Storage: its JSON API over gcsfs's session and credentials.

gcsfs itself neither sends a checksum with an upload nor keeps the server's text of a 404, and retries on its own, so
this room makes the requests. It makes one call per method, without retries; it knows keys and bytes, and never why
they are moved.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

import aiohttp
import google_crc32c
from gcsfs.core import GCSFileSystem

from gpumove.config import Config
from gpumove.store import retry
from gpumove.store.address import Address
from gpumove.store.backends import Buffer, ObjectInfo, Ranges
from gpumove.store.clouds import NO_CREDENTIALS, CloudBackend, RefusedError, fill, hex_sum, slices

_BOUNDARY = "gpumove-7bd3a1c05e"
_AT_ONCE = 16


class GcsBackend(CloudBackend):
    """A bucket of GCS. Objects are single uploads, so that one is there whole or not at all."""

    access = "the option token, GOOGLE_APPLICATION_CREDENTIALS, gcloud's login, or the machine's service account"
    batch = 256

    def _connect(self, address: Address, config: Config, options: dict[str, Any]) -> Any:
        self._timeout = aiohttp.ClientTimeout(sock_connect=min(10.0, config.deadline_s), sock_read=config.deadline_s)
        # The plain class, not the extended one: that asks about every bucket over gRPC first.
        return GCSFileSystem(**options)

    async def _api(
        self,
        fs: Any,
        method: str,
        path: str,
        *,
        view: memoryview | None = None,
        headers: dict[str, str] | None = None,
        data: Any = None,
        **params: str | None,
    ) -> tuple[Any, Any]:
        """One request; the headers and the body of the answer, which goes into ``view`` if one is given."""
        await fs._set_session()
        async with fs.session.request(
            method,
            f"{fs._location}{path}",
            params=fs._get_params(params),
            headers=fs._get_headers(headers),
            data=data,
            timeout=self._timeout,
        ) as answer:
            if answer.status >= 400:
                raise _refused(answer.status, await answer.read())
            if view is not None and answer.status == 206:
                return answer.headers, await fill(answer.content.read, view)
            return answer.headers, await answer.read()

    def _object(self, key: str, root: str = "/storage/v1") -> str:
        return f"{root}/b/{quote(self._bucket, safe='')}/o/{quote(self._key(key), safe='')}"

    async def _upload(self, fs: Any, key: str, data: Sequence[memoryview], *, only_new: bool = False) -> dict[str, Any]:
        """One multipart request that names our CRC32C: the server stores nothing if it does not agree."""
        meta = json.dumps({"name": self._key(key), "crc32c": _crc32c(data)})
        head = (
            f"--{_BOUNDARY}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{meta}\r\n"
            f"--{_BOUNDARY}\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode()
        tail = f"\r\n--{_BOUNDARY}--\r\n".encode()
        nbytes = len(head) + sum(view.nbytes for view in data) + len(tail)

        async def body() -> AsyncIterator[bytes | memoryview]:
            yield head
            for piece in slices(iter(data)):
                yield piece
            yield tail

        _, text = await self._api(
            fs,
            "POST",
            f"/upload/storage/v1/b/{quote(self._bucket, safe='')}/o",
            headers={"Content-Type": f"multipart/related; boundary={_BOUNDARY}", "Content-Length": str(nbytes)},
            data=body(),
            uploadType="multipart",
            ifGenerationMatch="0" if only_new else None,
        )
        found: dict[str, Any] = json.loads(text)
        return found

    def put(self, key: str, data: Sequence[memoryview], seconds: float) -> None:
        """One upload, whose answer holds the size and the CRC32C of what is stored."""

        async def work(fs: Any) -> None:
            found, nbytes = await self._upload(fs, key, data), sum(view.nbytes for view in data)
            if int(found.get("size", -1)) != nbytes or found.get("crc32c") != _crc32c(data):
                await self._api(fs, "DELETE", self._object(key))
                raise retry.MismatchError(
                    f"the store had {found.get('size')} bytes, CRC32C {found.get('crc32c')}; sent {nbytes} bytes"
                )

        self._call(work, seconds)

    def create(self, key: str, data: bytes, seconds: float) -> None:
        """One upload with ifGenerationMatch=0."""
        self._call(lambda fs: self._upload(fs, key, [memoryview(data)], only_new=True), seconds)

    def get(self, key: str, seconds: float) -> bytes:
        """One GET, verified with the CRC32C in its headers."""
        path = self._object(key, "/download/storage/v1")
        headers, body = self._call(lambda fs: self._api(fs, "GET", path, alt="media"), seconds)
        sums = [part.strip() for part in headers.get("x-goog-hash", "").split(",")]
        given = next((part.partition("=")[2] for part in sums if part.startswith("crc32c=")), None)
        if given is not None and given != _crc32c([memoryview(body)]):
            raise retry.MismatchError(f"{len(body)} bytes came whose CRC32C is not the {given} that the store names")
        return bytes(body)

    def read(self, key: str, ranges: Ranges, out: Sequence[memoryview] | None, seconds: float) -> list[Buffer]:
        """One GET per range."""

        async def work(fs: Any) -> list[Buffer]:
            views = out or [memoryview(bytearray(end - start)) for start, end in ranges]
            return [await self._range(fs, key, r, view) for r, view in zip(ranges, views)]

        return self._call(work, seconds)

    async def _range(self, fs: Any, key: str, span: tuple[int, int], view: memoryview) -> Buffer:
        path, bounds = self._object(key, "/download/storage/v1"), {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        try:
            _, body = await self._api(fs, "GET", path, view=view, headers=bounds, alt="media")
        except RefusedError as error:
            if error.status == 416:
                return b""  # beyond the end
            raise
        return body if isinstance(body, memoryview) else bytes(body)[span[0] : span[1]]

    def info(self, key: str, seconds: float) -> ObjectInfo | None:
        """One GET of the metadata."""
        try:
            _, text = self._call(
                lambda fs: self._api(fs, "GET", self._object(key), fields="name,size,updated,crc32c"), seconds
            )
        except RefusedError as error:
            if self._is_missing(error):
                return None
            raise
        return self._info(json.loads(text))

    def page(self, prefix: str, token: str | None, seconds: float) -> tuple[list[ObjectInfo], str | None]:
        """One page of up to 1,000 keys."""
        _, text = self._call(
            lambda fs: self._api(
                fs,
                "GET",
                f"/storage/v1/b/{quote(self._bucket, safe='')}/o",
                prefix=self._key(prefix) or None,
                pageToken=token,
                fields="items(name,size,updated),nextPageToken",
            ),
            seconds,
        )
        found = json.loads(text)
        infos = [self._info(item) for item in found.get("items", ()) if not item["name"].endswith("/")]
        return infos, found.get("nextPageToken")

    def _info(self, item: dict[str, Any]) -> ObjectInfo:
        updated = item.get("updated")
        mtime = datetime.fromisoformat(updated.replace("Z", "+00:00")).timestamp() if updated else None
        return ObjectInfo(
            item["name"][len(self._prefix) :], int(item["size"]), mtime, hex_sum("crc32c", item.get("crc32c"))
        )

    def regions(self, seconds: float) -> tuple[str, ...]:
        """One GET of the bucket: its region, or those that it is spread over. Not every role may ask."""
        path = f"/storage/v1/b/{quote(self._bucket, safe='')}"
        try:
            _, text = self._call(
                lambda fs: self._api(fs, "GET", path, fields="location,customPlacementConfig"), seconds
            )
        except RefusedError as error:
            if error.status == 403:
                return ()
            raise
        found = json.loads(text)
        spread = found.get("customPlacementConfig", {}).get("dataLocations")
        return tuple(place.lower() for place in spread or filter(None, [found.get("location")]))

    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """One request per key, some at once."""

        async def work(fs: Any) -> None:
            free = asyncio.Semaphore(_AT_ONCE)

            async def drop(key: str) -> None:
                async with free:
                    try:
                        await self._api(fs, "DELETE", self._object(key))
                    except RefusedError as error:
                        if not self._is_missing(error):
                            raise

            await asyncio.gather(*map(drop, keys))

        self._call(work, seconds)

    def _answer(self, error: BaseException) -> tuple[int, str] | None:
        return (error.status, error.code) if isinstance(error, RefusedError) else None

    def fault(self, error: Exception, verb: str) -> retry.Fault:
        """Google's login library has exceptions of its own."""
        names = {kind.__name__ for kind in type(error).__mro__}
        if "GoogleAuthError" in names and not getattr(error, "retryable", "TransportError" in names):
            return NO_CREDENTIALS
        if isinstance(error, RefusedError) and error.status == 404 and "bucket does not exist" in str(error):
            return retry.NO_BUCKET
        return super().fault(error, verb)

    def close(self) -> None:
        """Close the session on its own loop: gcsfs's finalizer would do it from this thread, which is not allowed."""
        if session := self._fs._session:
            with contextlib.suppress(Exception):
                self._call(lambda fs: session.close(), 5.0)


def _refused(status: int, body: bytes) -> RefusedError:
    """The answer's reason and message, as far as it has any."""
    text = body.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        reasons = error.get("errors") or [{}]
        return RefusedError(status, str(reasons[0].get("reason", "")), str(error.get("message", "")))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return RefusedError(status, "", text[:300])


def _crc32c(data: Sequence[memoryview]) -> str:
    """CRC32C as GCS writes it: base64 of the big-endian number."""
    crc = 0
    for piece in slices(iter(data)):
        crc = google_crc32c.extend(crc, bytes(piece))  # it takes nothing but bytes
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
