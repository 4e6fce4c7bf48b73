"""Amazon EC2: the spot interruption notice, and the rebalance recommendation that may come before it. IMDSv2."""

from __future__ import annotations

import time

from gpumove.notices.metadata import LINK_LOCAL, Answer, ask, moment
from gpumove.notices.notice import Notice, one_line

_TOKEN = "X-aws-ec2-metadata-token"
_TOKEN_TTL_S = 21600


class _Imds:
    """The instance metadata service, with a token that is fetched when there is none or the old one is refused."""

    def __init__(self, base: str, limit_s: float) -> None:
        self._base, self._limit_s = base, limit_s
        self._token: str | None = None

    def get(self, path: str) -> Answer | None:
        """A document, or None where there is none."""
        answer = self._get(path)
        if answer.status == 401:
            self._token = None
            answer = self._get(path)
        return None if answer.status == 404 else answer

    def _get(self, path: str) -> Answer:
        if self._token is None:
            self._token = self._fetch_token()
        headers = {_TOKEN: self._token} if self._token else {}
        return ask(f"{self._base}/latest/meta-data/{path}", limit_s=self._limit_s, headers=headers)

    def _fetch_token(self) -> str:
        """A token; an empty one where none is given out, and IMDSv1 has to do."""
        headers = {f"{_TOKEN}-ttl-seconds": str(_TOKEN_TTL_S)}
        try:
            answer = ask(f"{self._base}/latest/api/token", limit_s=self._limit_s, method="PUT", headers=headers)
        except TimeoutError:  # the answer does not pass a container's bridge where the hop limit is 1
            return ""
        return "" if 400 <= answer.status < 500 else answer.text()


class Aws:
    """The interruption notice: two minutes for terminate and stop, nothing for hibernate."""

    name = "aws"
    pause_s = 5.0  # what AWS recommends

    def __init__(self, base: str = LINK_LOCAL, *, limit_s: float = 2.0) -> None:
        self._imds = _Imds(base, limit_s)

    def poll(self) -> Notice | None:
        """What ``spot/instance-action`` says."""
        answer = self._imds.get("spot/instance-action")
        if answer is None:
            return None
        told = answer.json()
        action = told.get("action")
        if not isinstance(action, str):
            raise ValueError("the answer names no action")  # noqa: TRY004 - another service has this address
        deadline = moment(told.get("time"))
        if action == "hibernate":  # it begins at once: the time given is no time to use
            deadline = min(deadline or time.time(), time.time())
        return Notice(self.name, deadline, one_line(action))


class AwsRebalance:
    """The recommendation to move: earlier than the notice, or at the same time, or not followed by one at all."""

    name = "aws-rebalance"
    pause_s = 5.0

    def __init__(self, base: str = LINK_LOCAL, *, limit_s: float = 2.0) -> None:
        self._imds = _Imds(base, limit_s)

    def poll(self) -> Notice | None:
        """What ``events/recommendations/rebalance`` says; it never has a deadline."""
        answer = self._imds.get("events/recommendations/rebalance")
        if answer is None:
            return None
        if moment(answer.json().get("noticeTime")) is None:
            raise ValueError("the answer has no noticeTime")
        return Notice(self.name, None, "elevated risk of interruption")
