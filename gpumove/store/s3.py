"""The back end for S3 and what speaks it: single PUTs with a checksum, conditional creates, ranged GETs.

It makes one call per method, without retries; it knows keys and bytes, and never why they are moved.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import s3fs
from botocore.handlers import add_expect_header

from gpumove.config import Config
from gpumove.store import retry
from gpumove.store.address import Address
from gpumove.store.backends import Buffer, ObjectInfo, Ranges
from gpumove.store.clouds import NO_CREDENTIALS, SLICE, CloudBackend, Gather, RefusedError, fill, hex_sum

_NAMES: dict[str, retry.Fault] = {
    "NoCredentialsError": NO_CREDENTIALS,
    "PartialCredentialsError": NO_CREDENTIALS,
    "CredentialRetrievalError": NO_CREDENTIALS,
    "ProfileNotFound": NO_CREDENTIALS,
    "SSOTokenLoadError": NO_CREDENTIALS,
    "UnauthorizedSSOTokenError": NO_CREDENTIALS,
    "TokenRetrievalError": NO_CREDENTIALS,
    "FlexibleChecksumError": retry.DAMAGED,
    "ParamValidationError": retry.Fault("permanent", "store.refused", "the name of the bucket or key is not allowed"),
    "NoRegionError": retry.Fault("permanent", "store.refused", "set the region of the bucket"),
}
_SMALL = 64 << 10


class S3Backend(CloudBackend):
    """A bucket of S3. Objects are single PUTs of up to 5 GB, so that one is there whole or not at all."""

    access = "the options key, secret and token, the AWS_* variables, ~/.aws, or the role of the machine"

    def _connect(self, address: Address, config: Config, options: dict[str, Any]) -> Any:
        # Retries of the package multiply (125 tries of a stalled GET); ours replace them all. No region is given:
        # botocore finds it, and a wrong guess here would break what it finds.
        ours = {
            "retries": {"max_attempts": 0},
            "connect_timeout": min(10.0, config.deadline_s),
            "read_timeout": config.deadline_s,
            "max_pool_connections": max(10, config.concurrency),
        }
        self._config = {**ours, **options.pop("config_kwargs", {})}
        fs = s3fs.S3FileSystem(config_kwargs=self._config, **options)
        fs.retries = 1
        self._client: Any = None
        return fs

    async def _api(self, fs: Any, method: str, **arguments: Any) -> Any:
        client = await fs.set_session()
        if client is not self._client:
            self._client = client
            # A server that never says "100 Continue" would hang every PUT: aiohttp waits for it without a limit.
            client.meta.events.unregister("before-call.s3", add_expect_header)
            # Our CRC32 covers the body. SHA-256 for the signature costs a core, and over plain HTTP, whose answers
            # nobody signs, protects half of the way. Who wants it all the same sets payload_signing_enabled.
            client.meta.config.s3 = {"payload_signing_enabled": False, **(client.meta.config.s3 or {})}
        return await fs._call_s3(method, Bucket=self._bucket, **arguments)

    def _sums(self, data: Sequence[memoryview]) -> dict[str, str]:
        """The checksum to send: CRC32, or MD5 for stores that know no other (their users say "when_required")."""
        if self._config.get("request_checksum_calculation") == "when_required":
            md5 = hashlib.md5(usedforsecurity=False)
            for view in data:
                md5.update(view)
            return {"ContentMD5": base64.b64encode(md5.digest()).decode()}
        crc = 0
        for view in data:
            crc = zlib.crc32(view, crc)
        return {"ChecksumCRC32": base64.b64encode(crc.to_bytes(4, "big")).decode()}

    def put(self, key: str, data: Sequence[memoryview], seconds: float) -> None:
        """One PUT that the server checks, then a HEAD that is compared with it."""
        sums, nbytes = self._sums(data), sum(view.nbytes for view in data)
        body = Gather(data, SLICE) if nbytes > _SMALL else b"".join(data)

        async def work(fs: Any) -> None:
            await self._api(fs, "put_object", Key=self._key(key), Body=body, **sums)
            head = await self._api(fs, "head_object", Key=self._key(key), ChecksumMode="ENABLED")
            crc = head.get("ChecksumCRC32")
            if head["ContentLength"] != nbytes or ("-" not in (crc or "-") and crc != sums.get("ChecksumCRC32", crc)):
                raise retry.MismatchError(
                    f"the store has {head['ContentLength']} bytes, CRC32 {crc}; sent {nbytes}, {sums}"
                )

        self._call(work, seconds)

    def create(self, key: str, data: bytes, seconds: float) -> None:
        """One PUT with If-None-Match: *."""
        sums = self._sums([memoryview(data)])
        self._call(
            lambda fs: self._api(fs, "put_object", Key=self._key(key), Body=data, IfNoneMatch="*", **sums), seconds
        )

    def get(self, key: str, seconds: float) -> bytes:
        """One GET; its checksum is verified if the store sends it."""

        async def work(fs: Any) -> bytes:
            answer = await self._api(fs, "get_object", Key=self._key(key))
            async with answer["Body"] as body:
                return bytes(await body.read())

        return self._call(work, seconds)

    def read(self, key: str, ranges: Ranges, out: Sequence[memoryview] | None, seconds: float) -> list[Buffer]:
        """One GET per range."""

        async def work(fs: Any) -> list[Buffer]:
            views = out or [memoryview(bytearray(end - start)) for start, end in ranges]
            return [await self._range(fs, key, r, view) for r, view in zip(ranges, views)]

        return self._call(work, seconds)

    async def _range(self, fs: Any, key: str, span: tuple[int, int], view: memoryview) -> Buffer:
        try:
            answer = await self._api(fs, "get_object", Key=self._key(key), Range=f"bytes={span[0]}-{span[1] - 1}")
        except Exception as error:
            if any((self._answer(e) or (0,))[0] == 416 for e in (error, error.__cause__) if e):
                return b""  # beyond the end
            raise
        async with answer["Body"] as body:
            if answer["ResponseMetadata"]["HTTPStatusCode"] == 200:  # ranges are not known there
                return bytes((await body.read())[span[0] : span[1]])
            return await fill(body.read, view)

    def info(self, key: str, seconds: float) -> ObjectInfo | None:
        """One HEAD."""
        try:
            head = self._call(
                lambda fs: self._api(fs, "head_object", Key=self._key(key), ChecksumMode="ENABLED"), seconds
            )
        except Exception as error:
            if self._is_missing(error):
                return None
            raise
        crc = hex_sum("crc32", head.get("ChecksumCRC32"))
        return ObjectInfo(key, head["ContentLength"], head["LastModified"].timestamp(), crc)

    def regions(self, seconds: float) -> tuple[str, ...]:
        """One HEAD of the bucket. us-east-1 is what most servers say that are not Amazon's, wherever they stand."""
        try:
            answer = self._call(lambda fs: self._api(fs, "head_bucket"), seconds)
        except Exception as error:
            link = error.__cause__ or error
            if (self._answer(link) or (0,))[0] != 403:  # which names the region all the same
                raise
            answer = getattr(link, "response", {})
        region = str(answer["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region", "")).lower()
        host = urlsplit(self._client.meta.endpoint_url).hostname or ""
        theirs = host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".amazonaws.eu"))
        return (region,) if region and (theirs or region != "us-east-1") else ()

    def page(self, prefix: str, token: str | None, seconds: float) -> tuple[list[ObjectInfo], str | None]:
        """One page of up to 1,000 keys."""
        more = {"ContinuationToken": token} if token else {}
        found = self._call(
            lambda fs: self._api(fs, "list_objects_v2", Prefix=self._key(prefix), **more),
            seconds,
        )
        infos = [
            ObjectInfo(item["Key"][len(self._prefix) :], item["Size"], item["LastModified"].timestamp())
            for item in found.get("Contents", ())
            if not item["Key"].endswith("/")
        ]
        return infos, found.get("NextContinuationToken") if found.get("IsTruncated") else None

    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """One request for up to 1,000 keys, which may fail for each of them."""
        objects = {"Objects": [{"Key": self._key(key)} for key in keys], "Quiet": True}
        answer = self._call(lambda fs: self._api(fs, "delete_objects", Delete=objects), seconds)
        for failed in answer.get("Errors", ()):
            if failed.get("Code") != "NoSuchKey":
                status = 403 if failed.get("Code") == "AccessDenied" else 500
                raise RefusedError(status, failed.get("Code", ""), f"{failed.get('Key')}: {failed.get('Message', '')}")

    def _answer(self, error: BaseException) -> tuple[int, str] | None:
        if isinstance(error, RefusedError):
            return error.status, error.code
        response = getattr(error, "response", None)
        if not isinstance(response, Mapping):
            return None
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
        return status, str(response.get("Error", {}).get("Code", ""))

    def fault(self, error: Exception, verb: str) -> retry.Fault:
        """botocore's own exceptions first: they carry no answer."""
        names = [kind.__name__ for link in (error, error.__cause__) if link for kind in type(link).__mro__]
        return next((_NAMES[name] for name in names if name in _NAMES), None) or super().fault(error, verb)

    def close(self) -> None:
        """Close the session on its own loop. The package's finalizer, which then finds nothing left to do, does it in
        whatever thread collects garbage: one with another event loop, such as a notebook's, is the wrong one."""
        if creator := getattr(self._fs, "_s3creator", None):
            with contextlib.suppress(Exception):
                self._call(lambda fs: creator.__aexit__(None, None, None), 5.0)
        self._client = None
