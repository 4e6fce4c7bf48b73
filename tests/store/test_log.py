"""The log: numbers have one writer, epochs fence, lost answers are found out, holes and damage are named."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import pytest

from gpumove.config import Config
from gpumove.errors import ConfigError, FencedError, IntegrityError
from gpumove.format import keys
from gpumove.format.codec import digest
from gpumove.format.manifest import FORMAT, Checkpoint, Claim, LogEntry
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.view import View


@pytest.fixture
def store() -> Iterator[Store]:
    opened = Store.open(f"memory://{uuid.uuid4().hex}", Config())
    yield opened
    opened.close()


def new_log(store: Store) -> Log:
    log = Log(store)
    log.open(create=True)
    log.read()
    return log


def commit(log: Log, step: int, serial: int) -> Checkpoint:
    """A checkpoint entry without the objects behind it: enough for the log's own rules."""

    def make(view: View, number: int) -> LogEntry:
        return Checkpoint(
            format=FORMAT, number=number, epoch=log.epoch or 0, writer=log.writer, time=time.time(), step=step,
            attempt=keys.attempt_name(log.epoch or 0, serial), manifest="0" * 32, manifest_bytes=1, world_size=1,
            state_bytes=1, new_bytes=1,
        )  # fmt: skip

    return log.append(make)  # type: ignore[return-value]


def test_a_new_run_gets_an_id_and_a_second_opener_the_same(store: Store) -> None:
    first, second = Log(store), Log(store)
    assert second.open(create=False) == ""
    run = first.open(create=True)
    assert len(run) == 32
    assert second.open(create=True) == run


def test_entries_are_numbered_and_read_back_in_order(store: Store) -> None:
    log = new_log(store)
    log.claim()
    for step in range(1, 71):  # more than one batch of reading
        commit(log, step, step)
    view = new_log(store).view
    assert (view.head, view.epoch) == (71, 1)
    assert [c.step for c in view.checkpoints] == list(range(1, 71))
    assert view == log.view


def test_a_claim_fences_the_older_owner(store: Store) -> None:
    old, new = new_log(store), new_log(store)
    old.claim()
    commit(old, 1, 1)
    new.claim()
    assert new.epoch == 2
    with pytest.raises(FencedError, match=r"owned epoch 1, .* claimed epoch 2 .* step 1"):
        commit(old, 2, 2)
    commit(new, 2, 1)
    assert [c.step for c in new_log(store).view.checkpoints] == [1, 2]


def test_a_zombie_stays_fenced_after_gc_has_removed_the_entries_that_fenced_it(store: Store) -> None:
    old, new = new_log(store), new_log(store)
    old.claim()
    commit(old, 1, 1)
    new.claim()
    for serial in range(1, 4):
        commit(new, serial + 1, serial)
        collect(new, Retention(keep_last=1), reach=lambda _: set())
    # The zombie's next number is free again: it was taken by the claim, and gc has deleted that.
    assert store.exists(keys.entry_key(old.view.head + 1)) is None
    with pytest.raises(FencedError):
        commit(old, 99, 2)
    view = new_log(store).view
    assert [c.step for c in view.checkpoints] == [4]
    commit(new, 5, 4)
    assert [c.step for c in new_log(store).view.checkpoints] == [4, 5]


def test_a_sleeping_claimer_cannot_claim_into_the_past(store: Store) -> None:
    owner = new_log(store)
    owner.claim()
    sleeper = new_log(store)
    for serial in range(1, 4):
        commit(owner, serial, serial)
        collect(owner, Retention(keep_last=1), reach=lambda _: set())
    assert store.exists(keys.entry_key(sleeper.view.head + 1)) is None
    sleeper.claim()
    assert sleeper.epoch == 2
    assert new_log(store).view.writer == sleeper.writer
    with pytest.raises(FencedError):
        commit(owner, 9, 9)


def test_what_falls_on_the_number_of_a_checkpoint_that_was_kept_is_said_again(store: Store) -> None:
    """Its entry is gone, its number free; that there is a checkpoint of that number is another one's doing."""
    owner = new_log(store)
    owner.claim()
    claimer, tool = new_log(store), new_log(store)
    owner.pin(commit(owner, 1, 1), pinned=True)
    for serial in range(2, 5):
        commit(owner, serial, serial)
        collect(owner, Retention(keep_last=1), reach=lambda _: set())
    number = claimer.view.head + 1
    assert owner.view.checkpoints[0].number == number
    assert store.exists(keys.entry_key(number)) is None
    claimer.claim()
    assert new_log(store).view.writer == claimer.writer
    store.delete([keys.entry_key(number)])
    tool.move("begin", move="0" * 16, other="memory://elsewhere")
    said = new_log(store).view.move
    assert said is not None
    assert said.writer == tool.writer
    with pytest.raises(FencedError):
        commit(owner, 9, 9)


def test_racing_claims_have_different_epochs_and_one_owner(store: Store) -> None:
    logs = [new_log(store) for _ in range(8)]
    threads = [threading.Thread(target=log.claim) for log in logs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(log.epoch or 0 for log in logs) == list(range(1, 9))
    owners = []
    for serial, log in enumerate(logs, 1):
        try:
            commit(log, serial, serial)
            owners.append(log)
        except FencedError:
            continue
    assert [log.epoch for log in owners] == [8]


def test_entries_of_tools_do_not_stop_the_owner(store: Store) -> None:
    owner, tool = new_log(store), new_log(store)
    owner.claim()
    first = commit(owner, 1, 1)
    tool.read()
    tool.pin(first, pinned=True)
    tool.note("looked at it")
    assert commit(owner, 2, 2).number == 5
    assert [c.pinned for c in owner.view.checkpoints] == [True, False]
    tool.read()
    tool.pin(first, pinned=False)
    assert not any(c.pinned for c in new_log(store).view.checkpoints)


def test_resumed_and_damaged_are_remembered_until_the_epoch_commits(store: Store) -> None:
    log = new_log(store)
    log.claim()
    one, two = commit(log, 1, 1), commit(log, 2, 2)
    again = new_log(store)
    again.claim()
    again.note("fell back", resumed=one.number, damaged=[two.number])
    view = new_log(store).view
    assert (view.resumed, view.damaged) == (one.number, {two.number})
    commit(again, 3, 1)
    assert new_log(store).view.resumed is None


def test_a_hole_is_named(store: Store) -> None:
    log = new_log(store)
    log.claim()
    for serial in range(1, 6):
        commit(log, serial, serial)
    store.delete([keys.entry_key(3)])
    with pytest.raises(IntegrityError, match=f"{keys.entry_key(3)} is missing.*{keys.entry_key(6)} exists") as caught:
        new_log(store)
    assert caught.value.code == "integrity.log_hole"


def test_a_damaged_or_renamed_entry_is_named_and_skipped(store: Store) -> None:
    log = new_log(store)
    log.claim()
    commit(log, 1, 1)
    commit(log, 2, 2)
    good = store.get(keys.entry_key(3))
    for bad in (good.replace(b'"step":2', b'"step":7'), good[:-4], store.get(keys.entry_key(1))):
        store.put(keys.entry_key(3), bad)
        view = new_log(store).view
        assert [c.step for c in view.checkpoints] == [1]
        assert [b.number for b in view.broken] == [3]
        assert keys.entry_key(3) in view.broken[0].error


def test_a_damaged_claim_still_fences_and_its_epoch_is_not_given_twice(store: Store) -> None:
    old, hidden, new = new_log(store), new_log(store), new_log(store)
    old.claim()
    hidden.claim()
    store.put(keys.entry_key(2), b"rubbish")
    new.read()
    new.claim()
    assert (hidden.epoch, new.epoch) == (2, 3)
    with pytest.raises(FencedError):
        commit(hidden, 1, 1)
    for _ in range(2):  # whoever asks again is refused again
        with pytest.raises(FencedError, match=f"{keys.entry_key(2)}.*may have been a claim"):
            commit(old, 1, 1)
    commit(new, 1, 1)


def test_a_fenced_owner_stays_fenced(store: Store) -> None:
    old, new = new_log(store), new_log(store)
    old.claim()
    new.claim()
    for _ in range(3):
        with pytest.raises(FencedError):
            commit(old, 1, 1)
    assert new_log(store).view.checkpoints == ()


def test_what_was_left_by_going_back_is_tried_last(store: Store) -> None:
    log = new_log(store)
    log.claim()
    one, *_ = [commit(log, n, n) for n in (1, 2, 3)]
    log.claim(resumed=one.number)
    assert [c.step for c in new_log(store).view.candidates()] == [1, 3, 2]
    commit(log, 2, 1)
    assert [(c.step, c.epoch) for c in new_log(store).view.candidates()] == [(2, 2), (1, 1), (3, 1), (2, 1)]
    collect(log, Retention(), reach=lambda _: set())
    assert [(c.step, c.epoch) for c in new_log(store).view.candidates()] == [(2, 2), (1, 1), (3, 1), (2, 1)]


def test_a_foreign_or_damaged_format_is_refused(store: Store) -> None:
    store.put("format.json", b'{"format":1,"name":"other","run":"x","check":"00"}')
    with pytest.raises(IntegrityError, match=r"format\.json.*delete it"):
        Log(store).open(create=True)
    store.delete(["format.json"])
    assert Log(store).open(create=True)
    body = b'{"format":9,"name":"gpumove"'
    store.put("format.json", body + b',"check":"' + digest(body).encode() + b'"}')
    with pytest.raises(ConfigError, match="upgrade gpumove"):
        Log(store).open(create=True)


def test_retention_keeps_newest_pinned_and_every_kth() -> None:
    def at(number: int, step: int, *, pinned: bool = False) -> Checkpoint:
        return Checkpoint(
            format=FORMAT, number=number, epoch=1, writer="w", time=0.0, step=step, attempt=f"00000001-{number:08d}",
            manifest="", manifest_bytes=0, world_size=1, state_bytes=0, new_bytes=0, pinned=pinned,
        )  # fmt: skip

    found = tuple(at(n, 10 * n, pinned=n == 2) for n in range(1, 11))
    view = View(head=10, epoch=1, checkpoints=found)

    def kept(retention: Retention, view: View = view) -> list[int]:
        return [c.number for c in retention.kept(view)]

    assert kept(Retention()) == list(range(1, 11))
    assert kept(Retention(keep_last=2)) == [2, 9, 10]
    assert kept(Retention(keep_last=1, keep_every=40)) == [2, 4, 8, 10]
    # A damaged one does not count as one of the newest; the newest of all stays whatever it is.
    damaged = View(head=10, epoch=1, checkpoints=found, damaged=frozenset({9, 10}))
    assert kept(Retention(keep_last=1), damaged) == [2, 8, 10]
    resumed = View(head=11, epoch=2, checkpoints=found, resumed=5)
    assert kept(Retention(keep_last=1), resumed) == [2, 5, 10]


def test_claim_entries_carry_the_host(store: Store) -> None:
    log = new_log(store)
    claim = log.claim()
    assert isinstance(claim, Claim)
    assert new_log(store).view.host == claim.host


@pytest.mark.parametrize("parallel", [False, True])
def test_what_came_since_is_followed_whatever_a_gc_has_removed(store: Store, parallel: bool) -> None:
    store._now().backend.parallel = parallel
    owner, reader = new_log(store), new_log(store)

    def known(log: Log) -> tuple[object, ...]:
        return log.view.head, log.view.epoch, log.view.checkpoints

    reader.follow()
    assert reader.view.head == 0
    owner.claim()
    for step in range(1, 13):
        commit(owner, step, step)
        if step in (1, 4, 5, 12):
            reader.follow()
            assert known(reader) == known(owner)
            reader.follow()
            assert known(reader) == known(owner), "nothing new"
        if step in (2, 8, 11):  # a reader that comes later finds its own newest entry gone, or not
            collect(owner, Retention(keep_last=1))
    fenced = owner
    claimer = new_log(store)
    claimer.claim()
    with pytest.raises(FencedError):
        fenced.follow()


def test_where_calls_wait_for_a_network_both_questions_are_asked_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = new_log(store), new_log(store)
    owner.claim()
    reader.follow()
    exists, get, asked = store.exists, store.get, threading.Barrier(2, timeout=20)

    def first(key: str) -> object:
        asked.wait()
        return exists(key)

    def second(key: str) -> bytes:
        if key == keys.entry_key(2):
            asked.wait()
        return get(key)

    store._now().backend.parallel = True
    monkeypatch.setattr(store, "exists", first)
    monkeypatch.setattr(store, "get", second)
    reader.follow()
    assert reader.view.head == 1
    commit(owner, 1, 1)
    reader.follow()
    assert reader.view.head == 2


def test_at_the_end_of_the_interpreter_one_is_asked_after_the_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = new_log(store), new_log(store)
    owner.claim()
    reader.follow()
    commit(owner, 1, 1)
    store._now().backend.parallel = True
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)
    reader.follow()
    assert reader.view.head == 2
