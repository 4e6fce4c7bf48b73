"""What the contract suite needs: an open Store on each back end, also behind a faulty link, and a look at errors."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from gpumove.config import Config
from gpumove.errors import GpumoveError
from gpumove.store import retry
from gpumove.store.objects import Store
from tests.conftest import StoreAt
from tests.servers import Bucket, azure, s3
from tests.servers.proxy import Proxy

CLOUDS = {"s3": "s3_server", "gs": "gcs_server", "abfs": "azure_server"}
SECRETS = (s3.SECRET, azure.KEY)
IN_TIME_S = 30.0
"""What keeps to the bound that a test gives ends long before this; with the usual ones a call alone has a minute."""


@pytest.fixture
def store(store_url: StoreAt) -> Iterator[Store]:
    """An empty store on each of the five back ends."""
    url, options = store_url
    with contextlib.closing(Store.open(url, Config(), options=options)) as opened:
        yield opened


@pytest.fixture(params=CLOUDS)
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """The bucket on each of the three clouds."""
    found: Bucket = request.getfixturevalue(CLOUDS[request.param])
    return found


@dataclass(frozen=True)
class Faulty:
    """One place in a cloud, seen through a proxy that breaks things, and directly."""

    proxy: Proxy
    bucket: Bucket
    prefix: str
    stack: contextlib.ExitStack

    def open(self, *, direct: bool = False, hurry: float = 1.0, **settings: float) -> Store:
        """A store at the place; with ``direct``, past the proxy; with ``hurry``, so many times shorter pauses."""
        bucket = self.bucket if direct else self.bucket.via(self.proxy.endpoint)
        opened = Store.open(
            f"{bucket.url}/{self.prefix}",
            Config(**settings),  # type: ignore[arg-type]
            options=bucket.options,
            clock=retry.Clock(sleep=lambda seconds: time.sleep(seconds / hurry)),
        )
        self.stack.callback(opened.close)
        return opened


@pytest.fixture
def faulty(bucket: Bucket) -> Iterator[Faulty]:
    """A fresh place on each of the three clouds, and the proxy in front of it."""
    with Proxy(bucket.endpoint) as proxy, contextlib.ExitStack() as stack:
        yield Faulty(proxy, bucket, f"faults-{uuid.uuid4().hex[:8]}", stack)


def all_failing(calls: Sequence[Callable[[], object]], kind: type[GpumoveError], *codes: str) -> None:
    """Run calls at once, all of which have to fail in time."""

    def one(call: Callable[[], object]) -> float:
        start = time.monotonic()
        failing(call, kind, *codes)
        return time.monotonic() - start

    with ThreadPoolExecutor(len(calls)) as pool:
        took_s = list(pool.map(one, calls))
    assert max(took_s) < IN_TIME_S, took_s


def failing(call: Callable[[], object], kind: type[GpumoveError], *codes: str) -> GpumoveError:
    """Run a call that has to fail; check the class, the code, and that nothing it shows holds a secret."""
    with pytest.raises(kind) as caught:
        call()
    error: BaseException | None = caught.value
    if codes:
        assert caught.value.code in codes, caught.value
    while error is not None:  # a traceback prints the whole chain
        text = f"{error} {error!r}"
        assert not any(secret in text for secret in SECRETS), "a secret is in the text of an error"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return caught.value
