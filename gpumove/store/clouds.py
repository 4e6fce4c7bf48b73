"""What the three clouds share: calls on fsspec's event loop with a deadline, and the meaning of HTTP answers.

It makes one call per method, without retries; it knows keys and bytes, and never why they are moved.
"""

from __future__ import annotations

import abc
import asyncio
import base64
import bisect
import io
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from gpumove.config import Config
from gpumove.store import retry
from gpumove.store.address import Address
from gpumove.store.backends import Backend

T = TypeVar("T")
SLICE = 256 << 10  # bytes copied at a time: the interpreter is held for some 30 us
_UNWIND_S = 5.0
"""For a call that was cancelled to let go."""


class RefusedError(Exception):
    """A store's answer that is not a success, where its package has no exception of its own for it."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(f"{status} {code}: {text}" if code else f"{status}: {text}")
        self.status = status
        self.code = code


class Gather(io.RawIOBase):
    """Buffers as one seekable file, without joining them: each read copies one piece of at most ``most`` bytes."""

    def __init__(self, data: Sequence[memoryview], most: int) -> None:
        super().__init__()
        self._data = [view for view in data if view.nbytes]
        self._ends = list(itertools.accumulate(view.nbytes for view in self._data))
        self._most = most
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes: what sends it may start again."""
        return True

    def tell(self) -> int:
        """Bytes before the next read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As for any file."""
        size = self._ends[-1] if self._ends else 0
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: size}[whence]
        self._at = max(0, min(size, base + offset))
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Fewer bytes than asked for, if that is more than ``most``; callers loop."""
        left = self._most if size is None or size < 0 else min(size, self._most)
        pieces = []
        index = bisect.bisect_right(self._ends, self._at)
        while left and index < len(self._data):
            view = self._data[index]
            start = self._at - (self._ends[index] - view.nbytes)
            piece = view[start : start + left]
            pieces.append(piece)
            self._at += piece.nbytes
            left -= piece.nbytes
            index += 1
        return b"".join(pieces)


class CloudBackend(Backend):
    """A bucket, and the keys below one prefix of it."""

    missing_bucket = ("NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted", "InvalidBucketName")

    def __init__(self, address: Address, config: Config, options: Mapping[str, Any]) -> None:
        bucket, _, prefix = address.root.partition("/")
        self._bucket = bucket
        self._prefix = prefix + "/" if prefix else ""
        # An instance of our own: the caller's keep their settings, and no listing is cached that others write to.
        ours = {"skip_instance_cache": True, "use_listings_cache": False, **options}
        # Some constructors ask a metadata server for credentials, so this is bounded like any call.
        self._fs = retry.in_thread(lambda ticket: self._connect(address, config, ours), config.deadline_s)

    @abc.abstractmethod
    def _connect(self, address: Address, config: Config, options: dict[str, Any]) -> Any:
        """The fsspec file system, its own retries turned off."""

    @abc.abstractmethod
    def _answer(self, error: BaseException) -> tuple[int, str] | None:
        """Status and error code, if the failure is an answer of the store."""

    def _key(self, key: str) -> str:
        return self._prefix + key

    def _call(self, call: Callable[[Any], Awaitable[T]], seconds: float) -> T:
        """Run a coroutine on the file system's loop; it is cancelled, and the connection dropped, when time is up or
        nobody wants it any more."""
        ended = threading.Event()

        async def body() -> T:
            try:
                return await call(self._fs)
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(body(), self._fs.loop)
        if not retry.wait_for(ended, seconds):
            future.cancel()
            ended.wait(_UNWIND_S)  # until then it may read from the caller's buffers
            raise TimeoutError(f"no answer within {seconds:.1f} s")
        return future.result(_UNWIND_S)

    def fault(self, error: Exception, verb: str) -> retry.Fault:
        """By the store's answer if there is one, else by the kind of exception."""
        for link in _chain(error):
            if answer := self._answer(link):
                if answer[1] in self.missing_bucket:
                    return retry.NO_BUCKET
                return judge_answer(*answer, text=str(link), verb=verb)
        return retry.judge(error)

    def _is_missing(self, error: Exception) -> bool:
        """Whether the object, or its bucket, is not there."""
        return self.fault(error, "get").kind == "missing"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from; packages translate, and keep the answer in the cause."""
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__


_DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "Md5Mismatch")
_QUOTA = ("QuotaExceeded", "quotaExceeded", "XMinioAdminBucketQuotaExceeded", "AccountStorageLimitExceeded")
_SLOW = ("SlowDown", "ServerBusy", "TooManyRequests", "RequestLimitExceeded", "Throttling", "ThrottlingException")
_SLOW_GOOGLE = ("rateLimitExceeded", "userRateLimitExceeded")
# Another create is under way; or two writers upload the same blocks of one object.
_RACING = ("ConditionalRequestConflict", "OperationAborted", "InvalidBlockList", "InvalidBlobOrBlock")
_TAKEN = ("PreconditionFailed", "BlobAlreadyExists", "ConditionNotMet", "UnauthorizedBlobOverwrite")
_BY_CODE: dict[str, retry.Fault] = {
    **dict.fromkeys(_DAMAGED, retry.DAMAGED),
    **dict.fromkeys(_QUOTA, retry.QUOTA),
    **dict.fromkeys(_SLOW + _SLOW_GOOGLE, retry.SLOW_DOWN),
    **dict.fromkeys(_TAKEN, retry.TAKEN),
    "XMinioStorageFull": retry.FULL,
    "RequestTimeout": retry.FLAKY,
}
_DENIED = retry.Fault("permanent", "store.denied")
NO_CREDENTIALS = retry.Fault("permanent", "store.credentials")
_REGION = retry.Fault("permanent", "store.refused", "the bucket is in another region: set the region or the endpoint")
_REFUSED = retry.Fault("permanent", "store.refused", "the store does not accept this call; its text says why")


def judge_answer(status: int, code: str, *, text: str, verb: str) -> retry.Fault:
    """What an HTTP answer means for one of our calls."""
    if known := _BY_CODE.get(code):
        return known
    if code in _RACING:  # another create is under way: only a look at what lies there decides
        return retry.TAKEN if verb == "create" else retry.FLAKY
    if status == 404:  # writing and listing name no object that could be missing
        return retry.NO_BUCKET if verb in ("put", "create", "list", "regions") else retry.ABSENT
    if status == 400 and any(word in text.lower() for word in ("crc32", "md5", "checksum", "digest")):
        return retry.DAMAGED
    if status == 429 or "reduce your request rate" in text.lower():
        return retry.SLOW_DOWN
    if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
        return _REGION
    by_status = {401: NO_CREDENTIALS, 403: _DENIED, 412: retry.TAKEN, 507: retry.FULL}
    if status in by_status:
        return by_status[status]
    return retry.FLAKY if status >= 500 or status in (408, 425) else _REFUSED


def hex_sum(kind: str, value: bytes | str | None) -> str:
    """A checksum as ObjectInfo has it, from the base64 of clouds; "" if there is none, or not one of whole objects."""
    if not value or (isinstance(value, str) and "-" in value):
        return ""
    return f"{kind}:{(base64.b64decode(value) if isinstance(value, str) else bytes(value)).hex()}"


async def fill(read: Callable[[int], Awaitable[bytes]], view: memoryview) -> memoryview:
    """Read an answer's body into ``view``; the filled part. Nothing is joined and nothing is held twice."""
    at = 0
    while chunk := await read(SLICE):
        if at + len(chunk) > view.nbytes:
            raise retry.MismatchError(f"the answer has more than the {view.nbytes} bytes that were asked for")
        view[at : at + len(chunk)] = chunk
        at += len(chunk)
    return view[:at]


def slices(data: Iterator[memoryview]) -> Iterator[memoryview]:
    """The buffers in pieces that are small enough to hold the interpreter only shortly."""
    for view in data:
        for start in range(0, view.nbytes, SLICE):
            yield view[start : start + SLICE]
