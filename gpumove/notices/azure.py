"""Azure: Scheduled Events, those of this VM only, and the acknowledgement that lets Azure go on."""

from __future__ import annotations

import json
import time
from typing import Any

from gpumove.notices.metadata import LINK_LOCAL, ask, moment
from gpumove.notices.notice import Notice, one_line

_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_HEADERS = {"Metadata": "true"}
_ENDS_THE_JOB = ("Preempt", "Terminate", "Reboot", "Redeploy")  # a Freeze is a pause of seconds
_AHEAD_S = 300.0
"""Redeployments may be announced a week ahead, and nothing is won by leaving earlier than a save may take."""


class Azure:
    """Scheduled Events of the VM that this runs on."""

    name = "azure"
    pause_s = 1.0  # what Azure recommends: a preemption gives 30 s

    def __init__(self, base: str = LINK_LOCAL, *, limit_s: float = 5.0, first_limit_s: float = 150.0) -> None:
        self._base, self._limit_s = base, limit_s
        self._events_limit_s = first_limit_s  # the first request switches the service on: up to two minutes
        self._vm = ""
        self._began: dict[
            str, float
        ] = {}  # by event: when it was first seen to have begun, for it has no time any more
        self._told: set[str] = set()

    def poll(self) -> Notice | None:
        """The event of this VM that begins first, if one does soon."""
        if not self._vm:
            self._vm = self._own_name()
        answer = ask(self._base + _EVENTS, limit_s=self._events_limit_s, headers=_HEADERS)
        events = answer.json().get("Events")
        self._events_limit_s = self._limit_s
        if not isinstance(events, list):
            raise ValueError("the answer has no list of events")  # noqa: TRY004 - what is wrong is the data
        return min(filter(None, map(self._notice, events)), key=lambda n: n.deadline or 0.0, default=None)

    def acknowledge(self) -> None:
        """Tell Azure that it need not wait any longer; only where nobody but this VM is concerned."""
        for event in sorted(self._told):
            body = json.dumps({"StartRequests": [{"EventId": event}]}).encode()
            headers = {**_HEADERS, "Content-Type": "application/json"}
            ask(self._base + _EVENTS, limit_s=self._limit_s, method="POST", headers=headers, body=body).text()
            self._told.discard(event)

    def _own_name(self) -> str:
        name = ask(self._base + _NAME, limit_s=self._limit_s, headers=_HEADERS).text()
        if not name or one_line(name) != name:
            raise ValueError("the answer is no name of a VM")
        return name.lower()

    def _notice(self, event: Any) -> Notice | None:
        """An event as a notice, if it ends this VM and is near."""
        if not isinstance(event, dict) or event.get("EventType") not in _ENDS_THE_JOB:
            return None
        names = event.get("Resources")
        names = [str(name).lower() for name in names] if isinstance(names, list) else []
        if self._vm not in names:
            return None
        key = str(event.get("EventId"))
        if event.get("EventStatus") == "Started":
            deadline: float | None = self._began.setdefault(key, time.time())
        else:
            deadline = moment(event.get("NotBefore"))
        if deadline is not None and deadline - time.time() > _AHEAD_S:
            return None
        if names == [self._vm]:
            self._told.add(key)
        return Notice(self.name, deadline, one_line(f"{event['EventType']} {event.get('Description') or ''}"))
