"""torchsnapshot's take and async_take."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlparse

from torchsnapshot import Snapshot

from benchmarks.compare.peers.contract import Peer, Wait
from benchmarks.compare.world import World
from benchmarks.places import Place
from benchmarks.workload import Job


class TorchSnapshot(Peer):
    """As its documentation uses it; the harness adds the fsync that it leaves out."""

    def __init__(self, job: Job, place: Place, world: World, *, background: bool) -> None:
        super().__init__(job, place, world)
        self._background = background
        if place.local is None:  # it takes no options: the client reads the environment
            os.environ["AWS_ENDPOINT_URL_S3"] = place.options["endpoint_url"]
            os.environ["AWS_ACCESS_KEY_ID"] = place.options["key"]
            os.environ["AWS_SECRET_ACCESS_KEY"] = place.options["secret"]

    def _url(self, name: str) -> str:
        if self.place.local is not None:
            return str(self.place.local / name)
        parsed = urlparse(self.place.child(name))
        return f"s3://{parsed.netloc}{parsed.path}"

    def _state(self) -> dict[str, Any]:
        return {"model": self.job.model, "optimizer": self.job.optimizer}

    def save(self) -> Wait:
        name = self.next_name()
        if not self._background:
            Snapshot.take(self._url(name), self._state())
            return lambda: self.sync(name)
        pending = Snapshot.async_take(self._url(name), self._state())

        def wait() -> None:
            pending.wait()
            self.sync(name)

        return wait

    def restore(self) -> dict[str, float]:
        Snapshot(self._url(self.place.newest())).restore(self._state())
        return {}
