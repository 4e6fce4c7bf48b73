"""Google Compute Engine: preemption and host maintenance, by requests that the server answers when a value changes."""

from __future__ import annotations

import time
from urllib.parse import quote

from gpumove.notices.metadata import LINK_LOCAL, ask
from gpumove.notices.notice import Notice

_NEVER_SEEN = "0"
"""An etag that no value has: the server answers at once."""


class _Key:
    """One value below ``instance/``."""

    def __init__(self, base: str, key: str, *, wait_s: int, limit_s: float) -> None:
        self._url = f"{base}/computeMetadata/v1/instance/{key}?wait_for_change=true&timeout_sec={wait_s}&last_etag="
        self._limit_s = wait_s + limit_s
        self._etag = _NEVER_SEEN

    def wait(self) -> str:
        """The value, as soon as it is another one than last time, or after a while."""
        etag, self._etag = self._etag, _NEVER_SEEN  # after a failure the value is asked for, whatever it is
        answer = ask(self._url + quote(etag, safe=""), limit_s=self._limit_s, headers={"Metadata-Flavor": "Google"})
        text = answer.text()
        if answer.headers.get("metadata-flavor") != "Google":
            raise ValueError("this is not Google's metadata server")
        self._etag = answer.headers.get("etag") or _NEVER_SEEN
        return text


class _Announced:
    """A value that says that the machine will be stopped, and how long that takes from then on."""

    pause_s = 1.0  # for a server that does not wait; the etag lets nothing slip between two requests

    name = ""
    alarm = ""
    others: tuple[str, ...] = ()
    detail = ""

    def __init__(self, key: _Key, notice_s: float) -> None:
        self._key, self._notice_s = key, notice_s
        self._deadline: float | None = None

    def poll(self) -> Notice | None:
        """Wait for a change, and tell whether it is the one."""
        value = self._key.wait()
        if value != self.alarm:
            if value not in self.others:
                raise ValueError("the value is none of those that Google documents")
            return None
        if self._deadline is None:  # the server says that, not when
            self._deadline = time.time() + self._notice_s
        return Notice(self.name, self._deadline, self.detail)


class Gcp(_Announced):
    """Preemption of a spot VM: 30 s at best, or 120 s where the VM was created so."""

    name = "gcp"
    alarm = "TRUE"
    others = ("FALSE",)
    detail = "preempted"

    def __init__(
        self, base: str = LINK_LOCAL, *, notice_s: float = 30.0, wait_s: int = 60, limit_s: float = 10.0
    ) -> None:
        super().__init__(_Key(base, "preempted", wait_s=wait_s, limit_s=limit_s), notice_s)


class GcpMaintenance(_Announced):
    """Host maintenance that ends the VM, as it does for all with GPUs: these cannot be migrated."""

    name = "gcp-maintenance"
    alarm = "TERMINATE_ON_HOST_MAINTENANCE"
    others = ("NONE", "MIGRATE_ON_HOST_MAINTENANCE")
    detail = "terminated for host maintenance"

    def __init__(
        self, base: str = LINK_LOCAL, *, notice_s: float = 60.0, wait_s: int = 60, limit_s: float = 10.0
    ) -> None:
        super().__init__(_Key(base, "maintenance-event", wait_s=wait_s, limit_s=limit_s), notice_s)
