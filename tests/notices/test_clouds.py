"""What each cloud says, and what is made of it."""

from __future__ import annotations

import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from gpumove.notices.aws import Aws, AwsRebalance
from gpumove.notices.azure import Azure
from gpumove.notices.gcp import Gcp, GcpMaintenance
from gpumove.notices.notice import Notice
from tests.servers.metadata import AzureImds, Gce, Imds


def iso(seconds: float) -> str:
    """An AWS time so many seconds from now."""
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def rfc(seconds: float) -> str:
    """An Azure time so many seconds from now."""
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)


def left(notice: Notice | None) -> float:
    assert notice is not None
    assert notice.deadline is not None
    return notice.deadline - time.time()


@pytest.mark.parametrize("action", ["terminate", "stop"])
def test_aws_gives_two_minutes(action: str) -> None:
    with Imds() as imds:
        source = Aws(imds.base)
        assert source.poll() is None
        imds.action = {"action": action, "time": iso(120)}
        notice = source.poll()
        assert (notice and notice.source, notice and notice.detail) == ("aws", action)
        assert 100 <= left(notice) <= 120
        assert source.poll() == notice
        assert imds.count("PUT /latest/api/token") == 1


def test_aws_hibernation_leaves_no_time() -> None:
    with Imds() as imds:
        imds.action = {"action": "hibernate", "time": iso(120)}
        assert -10 < left(Aws(imds.base).poll()) <= 0


def test_aws_a_token_that_expired_is_fetched_again() -> None:
    with Imds() as imds:
        source = Aws(imds.base)
        source.poll()
        imds.expire()
        imds.action = {"action": "terminate", "time": iso(120)}
        assert source.poll() is not None
        assert imds.count("PUT") == 2


def test_aws_without_tokens() -> None:
    with Imds(tokens="unknown") as imds:
        imds.action = {"action": "terminate", "time": iso(120)}
        source = Aws(imds.base)
        assert source.poll() is not None
        assert source.poll() is not None
        assert imds.count("PUT") == 1


@pytest.mark.parametrize("tokens", ["optional", "unknown"])
def test_aws_where_tokens_come_into_use_later(tokens: str) -> None:
    with Imds(tokens=tokens) as imds:
        source = Aws(imds.base)
        source.poll()
        imds.tokens = "required"
        imds.action = {"action": "terminate", "time": iso(120)}
        assert source.poll() is not None


def test_aws_behind_a_bridge_that_swallows_the_token() -> None:
    with Imds(tokens="lost") as imds:
        imds.action = {"action": "terminate", "time": iso(120)}
        assert Aws(imds.base, limit_s=0.3).poll() is not None


def test_aws_tokens_that_are_never_taken_end_in_an_error() -> None:
    with Imds(tokens="refused") as imds:
        with pytest.raises(ConnectionError, match="401"):
            Aws(imds.base).poll()
        assert len(imds.requests) == 4


def test_aws_a_time_that_cannot_be_read_is_no_deadline() -> None:
    with Imds() as imds:
        imds.action = {"action": "terminate", "time": "soon"}
        notice = Aws(imds.base).poll()
        assert notice is not None
        assert notice.deadline is None


@pytest.mark.parametrize("document", [b"terminate", b"[]", b"{}", b'{"action": 3}', b"[" * 60000])
def test_aws_rubbish_is_no_notice(document: bytes) -> None:
    with Imds() as imds:
        imds.action = document
        with pytest.raises((ValueError, RecursionError)):
            Aws(imds.base).poll()


def test_aws_rebalance_has_no_deadline() -> None:
    with Imds() as imds:
        source = AwsRebalance(imds.base)
        assert source.poll() is None
        imds.rebalance = {"noticeTime": iso(0)}
        assert source.poll() == Notice("aws-rebalance", None, "elevated risk of interruption")
        imds.rebalance = {"other": 1}
        with pytest.raises(ValueError, match="noticeTime"):
            source.poll()


def test_gcp_hears_at_once() -> None:
    with Gce() as gce:
        source = Gcp(gce.base, wait_s=20)
        assert source.poll() is None
        threading.Timer(0.3, gce.set, ("preempted", "TRUE")).start()
        began = time.monotonic()
        notice = source.poll()
        assert 0.2 < time.monotonic() - began < 12
        assert notice is not None
        assert (notice.source, notice.detail) == ("gcp", "preempted")
        assert 15 < left(notice) <= 30


def test_gcp_with_the_two_minutes_variant() -> None:
    with Gce() as gce:
        gce.set("preempted", "TRUE")
        assert 115 < left(Gcp(gce.base, notice_s=120).poll()) <= 120


def test_gcp_between_two_requests_nothing_is_missed() -> None:
    with Gce() as gce:
        source = Gcp(gce.base, wait_s=20)
        source.poll()
        gce.set("preempted", "TRUE")
        began = time.monotonic()
        assert source.poll() is not None
        assert time.monotonic() - began < 12


def test_gcp_comes_back_without_a_change_and_asks_again() -> None:
    with Gce() as gce:
        source = Gcp(gce.base, wait_s=1)
        for _ in range(2):
            assert source.poll() is None
        assert "last_etag=0" in gce.requests[0]
        assert "last_etag=1a2b" in gce.requests[1]


def test_gcp_preempted_twice_keeps_the_first_deadline() -> None:
    with Gce() as gce:
        gce.set("preempted", "TRUE")
        source = Gcp(gce.base)
        first = source.poll()
        gce.set("preempted", "TRUE")
        assert source.poll() == first


def test_gcp_is_asked_for_the_value_after_a_failure() -> None:
    with Gce() as gce:
        source = Gcp(gce.base, wait_s=20)
        source.poll()
        gce.unavailable = 1
        with pytest.raises(ConnectionError, match="503"):
            source.poll()
        assert source.poll() is None
        assert "last_etag=0" in gce.requests[-1]


def test_gcp_maintenance_that_migrates_is_no_reason_to_leave() -> None:
    with Gce() as gce:
        source = GcpMaintenance(gce.base)
        assert source.poll() is None
        gce.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        assert source.poll() is None
        gce.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        notice = source.poll()
        assert notice is not None
        assert notice.source == "gcp-maintenance"
        assert 55 < left(notice) <= 60


def test_azure_preempts_this_vm_only() -> None:
    with AzureImds("Train-vmss_3") as azure:
        source = Azure(azure.base)
        assert source.poll() is None
        azure.schedule("Preempt", ["train-vmss_1"], rfc(30))
        azure.schedule("Freeze", ["train-vmss_3"], rfc(30))
        assert source.poll() is None
        azure.schedule("Preempt", ["train-vmss_3"], rfc(30), Description="evicted")
        notice = source.poll()
        assert notice is not None
        assert (notice.source, notice.detail) == ("azure", "Preempt evicted")
        assert 15 < left(notice) <= 30
        assert source.poll() == notice
        assert azure.count("GET /metadata/instance/compute/name") == 1


def test_azure_is_given_time_for_its_first_answer_only() -> None:
    with AzureImds(first_s=0.8) as azure:
        source = Azure(azure.base, limit_s=0.5, first_limit_s=10)
        assert source.poll() is None
        azure._first_s = 0.8
        with pytest.raises(TimeoutError):
            source.poll()


def test_azure_an_event_far_away_waits() -> None:
    with AzureImds() as azure:
        source = Azure(azure.base)
        azure.schedule("Redeploy", ["train-vmss_3"], rfc(86400))
        assert source.poll() is None
        azure.schedule("Terminate", ["train-vmss_3"], rfc(280))
        azure.schedule("Preempt", ["train-vmss_3"], rfc(30))
        notice = source.poll()
        assert notice is not None
        assert notice.detail == "Preempt"


def test_azure_one_that_has_begun_has_no_time_left() -> None:
    with AzureImds() as azure:
        azure.schedule("Reboot", ["train-vmss_3"], "", EventStatus="Started")
        source = Azure(azure.base)
        notice = source.poll()
        assert -10 < left(notice) <= 0
        time.sleep(0.01)
        assert source.poll() == notice


def test_azure_acknowledges_what_concerns_nobody_else() -> None:
    with AzureImds() as azure:
        source = Azure(azure.base)
        own = azure.schedule("Preempt", ["train-vmss_3"], rfc(30))
        azure.schedule("Preempt", ["train-vmss_3", "train-vmss_4"], rfc(30))
        source.acknowledge()
        assert azure.started == []
        source.poll()
        source.acknowledge()
        source.acknowledge()
        assert azure.started == [own]


@pytest.mark.parametrize("events", ["none", [3, {"EventType": "Preempt"}, {"EventType": "Preempt", "Resources": "x"}]])
def test_azure_rubbish_is_no_notice(events: object) -> None:
    with AzureImds() as azure:
        azure.events = events  # type: ignore[assignment]
        if isinstance(events, list):
            assert Azure(azure.base).poll() is None
        else:
            with pytest.raises(ValueError, match="no list"):
                Azure(azure.base).poll()
