"""The back end for Azure Blob Storage: the clients of azure-storage-blob that adlfs sets up.

It makes one call per method, without retries; it knows keys and bytes, and never why they are moved.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from adlfs import AzureBlobFileSystem
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError

from gpumove.config import Config
from gpumove.store import retry
from gpumove.store.address import Address
from gpumove.store.backends import Buffer, ObjectInfo, Ranges
from gpumove.store.clouds import NO_CREDENTIALS, CloudBackend, Gather, hex_sum

_AT_ONCE = 16
# The package sends nothing but bytes, so each request's part is copied: small ones hold the interpreter some 3 ms, not
# the 70 ms of a whole pack. Five requests for a pack of 32 MiB instead of one are 1 dollar per TB.
_BLOCK = 8 << 20


class AzureBackend(CloudBackend):
    """A container of Azure Blob Storage. Up to 8 MiB an object is one request, above that blocks and one commit."""

    access = "the options connection_string, account_key, sas_token or credential, the AZURE_* variables, or the login"
    batch = 256

    def _connect(self, address: Address, config: Config, options: dict[str, Any]) -> Any:
        given = {**AzureBlobFileSystem._get_kwargs_from_urls(address.raw), **options}
        fs = AzureBlobFileSystem(**given)
        settings = fs.service_client._config
        settings.retry_policy.total_retries = 0  # it waits 15 s before its first retry, and ours knows more
        settings.max_single_get_size = 1 << 30  # a range is one request, not a chain of 4 MiB ones
        settings.max_single_put_size = settings.max_block_size = _BLOCK
        self._timeouts = {"connection_timeout": min(10.0, config.deadline_s), "read_timeout": config.deadline_s}
        return fs

    def _blob(self, fs: Any, key: str) -> Any:
        return fs.service_client.get_blob_client(self._bucket, self._key(key))

    async def _upload(self, fs: Any, key: str, data: bytes | Gather, nbytes: int, *, overwrite: bool) -> None:
        # validate_content sends an MD5 with every request; without it a flipped bit is stored silently.
        async with self._blob(fs, key) as blob:
            await blob.upload_blob(
                data, length=nbytes, overwrite=overwrite, validate_content=True, max_concurrency=2, **self._timeouts
            )

    def put(self, key: str, data: Sequence[memoryview], seconds: float) -> None:
        """Blocks that the server checks and one commit of them, then the size is asked for."""
        nbytes = sum(view.nbytes for view in data)
        body = b"".join(data) if nbytes <= _BLOCK else Gather(data, _BLOCK)

        async def work(fs: Any) -> None:
            await self._upload(fs, key, body, nbytes, overwrite=True)
            async with self._blob(fs, key) as blob:
                found = (await blob.get_blob_properties(**self._timeouts)).size
            if found != nbytes:
                raise retry.MismatchError(f"the store has {found} bytes instead of {nbytes}")

        self._call(work, seconds)

    def create(self, key: str, data: bytes, seconds: float) -> None:
        """One upload with If-None-Match: *."""
        self._call(lambda fs: self._upload(fs, key, data, len(data), overwrite=False), seconds)

    async def _download(self, fs: Any, key: str, start: int | None, length: int | None) -> bytes:
        async with self._blob(fs, key) as blob:
            stream = await blob.download_blob(offset=start, length=length, max_concurrency=1, **self._timeouts)
            return bytes(await stream.readall())

    def get(self, key: str, seconds: float) -> bytes:
        """One GET."""
        return self._call(lambda fs: self._download(fs, key, None, None), seconds)

    def read(self, key: str, ranges: Ranges, out: Sequence[memoryview] | None, seconds: float) -> list[Buffer]:
        """One GET per range, in buffers of the package's own."""

        async def work(fs: Any) -> list[Buffer]:
            return [await self._range(fs, key, start, end) for start, end in ranges]

        return self._call(work, seconds)

    async def _range(self, fs: Any, key: str, start: int, end: int) -> bytes:
        try:
            return await self._download(fs, key, start, end - start)
        except HttpResponseError as error:
            if error.status_code == 416:
                return b""  # beyond the end
            raise

    def info(self, key: str, seconds: float) -> ObjectInfo | None:
        """One HEAD."""

        async def work(fs: Any) -> ObjectInfo | None:
            try:
                async with self._blob(fs, key) as blob:
                    found = await blob.get_blob_properties(**self._timeouts)
            except ResourceNotFoundError:
                return None
            md5 = found.content_settings.content_md5
            return ObjectInfo(key, found.size, found.last_modified.timestamp(), hex_sum("md5", md5 and bytes(md5)))

        return self._call(work, seconds)

    def page(self, prefix: str, token: str | None, seconds: float) -> tuple[list[ObjectInfo], str | None]:
        """One page of up to 5,000 keys."""

        async def work(fs: Any) -> tuple[list[ObjectInfo], str | None]:
            async with fs.service_client.get_container_client(self._bucket) as container:
                pages = container.list_blobs(
                    name_starts_with=self._key(prefix) or None, include=["metadata"], **self._timeouts
                ).by_page(token)
                async for page in pages:
                    blobs = [blob async for blob in page if not _is_directory(blob)]
                    infos = [
                        ObjectInfo(blob.name[len(self._prefix) :], blob.size, blob.last_modified.timestamp())
                        for blob in blobs
                    ]
                    return infos, pages.continuation_token or None
            return [], None

        return self._call(work, seconds)

    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """One request per key, some at once."""

        async def work(fs: Any) -> None:
            free = asyncio.Semaphore(_AT_ONCE)

            async def drop(key: str) -> None:
                async with free, self._blob(fs, key) as blob:
                    with contextlib.suppress(ResourceNotFoundError):
                        await blob.delete_blob(**self._timeouts)

            await asyncio.gather(*map(drop, keys))

        self._call(work, seconds)

    def _answer(self, error: BaseException) -> tuple[int, str] | None:
        if not isinstance(error, HttpResponseError) or error.status_code is None:
            return None
        code = getattr(error, "error_code", None)
        return int(error.status_code), str(getattr(code, "value", code) or "")

    def fault(self, error: Exception, verb: str) -> retry.Fault:
        """Logins fail without an answer of the store."""
        names = {kind.__name__ for kind in type(error).__mro__}
        if self._answer(error) is None and "ClientAuthenticationError" in names:
            return NO_CREDENTIALS
        return super().fault(error, verb)

    def close(self) -> None:
        """Close the sessions; what is left the package closes at the end of the process."""
        with contextlib.suppress(Exception):
            self._call(lambda fs: fs.service_client.close(), 5.0)


def _is_directory(blob: Any) -> bool:
    """Accounts with a hierarchical namespace list their directories as empty blobs."""
    marks = blob.metadata or {}
    return blob.name.endswith("/") or "true" in (marks.get("hdi_isfolder"), marks.get("is_directory"))
