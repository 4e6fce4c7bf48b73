"""Who may claim a log that is moved, and who is fenced: at most one of two logs, whatever is read back or collected."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from gpumove.config import Config
from gpumove.errors import FencedError
from gpumove.format import keys
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.view import View
from tests.store.test_log import commit, new_log

ID = "ab" * 8
THERE = "gs://there/run"


@pytest.fixture
def store() -> Iterator[Store]:
    opened = Store.open(f"memory://{uuid.uuid4().hex}", Config())
    yield opened
    opened.close()


def say(log: Log, state: str, **more: Any) -> None:
    log.move(state, move=ID, other=THERE, **more)


def again(store: Store) -> Log:
    """The log as somebody else reads it."""
    log = Log(store)
    log.open(create=False)
    log.read()
    return log


def test_what_comes_before_the_seal_changes_no_ownership(store: Store) -> None:
    owner = new_log(store)
    owner.claim()
    commit(owner, 1, 1)
    tool = again(store)
    for state in ("begin", "request"):
        say(tool, state, facts={"rate": 2.5}, save=False)
    commit(owner, 2, 2)
    assert owner.view.move is not None
    assert (owner.view.move.state, owner.view.move.save, owner.view.move.facts) == ("request", False, {"rate": 2.5})
    say(owner, "left", facts={"step": 2})
    say(tool, "cancelled")
    assert again(store).view.refusal() == ""
    assert again(store).claim().epoch == 2


def test_a_seal_fences_the_owner_and_every_later_claim_and_a_handover_undoes_it(store: Store) -> None:
    owner = new_log(store)
    owner.claim()
    commit(owner, 1, 1)
    tool = again(store)
    say(tool, "sealed")
    with pytest.raises(FencedError, match=f"moved to {THERE}"):
        commit(owner, 2, 2)
    with pytest.raises(FencedError, match=f"moved to {THERE}") as caught:
        again(store).claim()
    assert caught.value.code == "fenced.moved"
    say(tool, "done")
    assert again(store).view.sealed == THERE
    say(tool, "handover")
    claimed = again(store)
    assert claimed.claim().epoch == 4
    assert claimed.view.checkpoints[-1].step == 1


def test_a_replica_is_not_to_be_claimed_before_the_handover_and_its_replicator_not_to_write_after_it(
    store: Store,
) -> None:
    replicator = Log(store)
    assert replicator.open(create=True, run="cd" * 16) == "cd" * 16
    replicator.read()
    assert replicator.claim(follows=THERE, epoch=7).epoch == 7
    commit(replicator, 5, 1)
    with pytest.raises(FencedError, match=f"replica of {THERE}"):
        again(store).claim()
    second = again(store)
    second.claim(follows=THERE, epoch=7)
    assert second.epoch == 8
    with pytest.raises(FencedError):
        commit(replicator, 6, 2)
    say(again(store), "handover")
    with pytest.raises(FencedError):
        commit(second, 6, 2)
    job = again(store)
    assert job.claim().epoch == 10
    say(job, "done")
    assert again(store).view.refusal() == ""


def test_a_check_sees_the_log_as_it_is_just_before_the_entry(store: Store) -> None:
    owner = new_log(store)
    owner.claim()
    tool = again(store)
    again(store).claim()  # a requeued job, between the tool's look and its seal

    def unclaimed(view: View) -> None:
        if view.epoch != 1:
            raise FencedError("claimed meanwhile")

    with pytest.raises(FencedError, match="claimed meanwhile"):
        say(tool, "sealed", check=unclaimed)
    assert again(store).view.refusal() == ""


@pytest.mark.parametrize("state", ["begin", "sealed", "handover"])
def test_a_collection_keeps_what_the_entries_said(store: Store, state: str) -> None:
    replicator = new_log(store)
    replicator.claim(follows=THERE)
    commit(replicator, 1, 1)
    say(again(store), state)
    before = again(store)
    for _ in range(2):
        collect(again(store), Retention(1))
    after = again(store)
    assert after.view.first > before.view.head
    assert (after.view.follows, after.view.sealed) == (before.view.follows, before.view.sealed)
    assert after.view.move == before.view.move
    assert after.view.refusal() == before.view.refusal()
    assert after.view.epoch == before.view.epoch


def test_an_unreadable_entry_behind_a_request_may_be_the_seal(store: Store) -> None:
    owner = new_log(store)
    owner.claim()
    say(again(store), "request")
    say(again(store), "sealed")
    store.put(keys.entry_key(3), b"rot")
    with pytest.raises(FencedError, match="entry 3, which cannot be read"):
        again(store).claim()
    tool = again(store)
    say(tool, "cancelled")
    assert again(store).claim().epoch == 3


def test_where_a_run_may_lie_stays_with_it_until_an_owner_says_otherwise(store: Store) -> None:
    owner = new_log(store)
    owner.claim(regions="eu-*")
    commit(owner, 1, 1)
    collect(again(store), Retention(1))
    again(store).claim()
    assert again(store).view.regions == "eu-*"
    again(store).claim(regions="us-east-1,us-west-2")
    assert again(store).view.regions == "us-east-1,us-west-2"
    again(store).claim(regions="*")
    assert again(store).view.regions == ""
