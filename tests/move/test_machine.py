"""The move as a state machine: every state from every crash, both ways out, and never two logs that may be claimed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from gpumove.errors import ConfigError, FencedError, StoreError
from gpumove.format import keys
from gpumove.move.entries import OvertakenError
from gpumove.move.herald import Herald
from gpumove.move.report import Event, Wishes
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.move.runs import CONFIG, Place, read, train
from tests.move.stage import TRAINED, WISHES, Stage
from tests.store.faults import Crash, FaultyStore, Mode


def _wishes(**given: Any) -> Wishes:
    return replace(WISHES, **given)


def states(stage: Stage) -> list[str]:
    return [event.state for event in stage.events if event.state not in ("round", "wait")]


def test_a_move_from_its_begin_to_its_end(stage: Stage) -> None:
    done = stage.move()
    assert states(stage) == ["begin", "request", "sealed", "handover", "done"]
    assert stage.steps(stage.target) == [2, 3]
    assert stage.claimable() == (False, True)
    assert (done.phase, done.step, done.blackout_s) == ("done", 3, 1.5)
    assert done.sent_bytes > 0
    assert read(stage.target)[0] == 3
    here, there = stage.look(stage.source), stage.look(stage.target)
    assert here.move is not None
    assert there.move is not None
    assert here.move.state == there.move.state == "done"
    assert here.move.move == there.move.move == done.move
    assert (here.sealed, there.follows) == (stage.target.url, "")
    with pytest.raises(FencedError) as caught:
        stage.commit()
    assert caught.value.code == "fenced.moved"
    with pytest.raises(ConfigError, match="has moved"):
        stage.move()


def test_the_facts_travel_from_entry_to_entry(stage: Stage) -> None:
    stage.move()
    told = {event.state: event.facts for event in stage.events}
    assert told["sealed"]["step"] == told["handover"]["step"] == 3
    assert told["sealed"]["stopped_at"] == told["handover"]["stopped_at"] == 1000.0
    assert told["sealed"]["sent_bytes"] >= told["sealed"]["last_bytes"] > 0
    assert [r["step"] for r in told["request"]["rounds"]] == [2]
    assert told["done"]["blackout_s"] == 1.5


def crashes(recorded: Place, mode: Mode, stride: int, wishes: Wishes = WISHES) -> Iterator[tuple[Stage, str]]:
    """The mover dies at its k-th call, at either end, for every k; then the jobs do what they have read."""
    at = 1
    while True:
        stage = Stage(recorded)
        calls = [0, 0]
        for end in (0, 1):
            stage = Stage(recorded)
            raw = [Store.open(place.url, CONFIG) for place in (stage.source, stage.target)]
            faulty = [FaultyStore(store, at=at * (end == number), mode=mode) for number, store in enumerate(raw)]
            try:
                stage.mover(*faulty, wishes).run()  # type: ignore[arg-type]
            except Crash:
                pass
            assert sum(stage.claimable()) <= 1, f"two owners after call {at} of end {end}: {faulty[end].trail[-1]}"
            calls[end] = faulty[end].calls
            stage.react()
            yield stage, f"{mode}, end {end}, call {at}: {faulty[end].trail[at - 1 : at]}"
            for store in raw:
                store.close()
            stage.close()
        if at > max(calls):
            assert at > 30, "a move makes more calls than that"
            return
        at += stride


def under_way(stage: Stage) -> bool:
    move = stage.look(stage.source).move
    return move is not None


_EVERY_CALL = [pytest.param(mode, 1, marks=pytest.mark.slow) for mode in ("before", "after", "lost")]


@pytest.mark.parametrize(("mode", "stride"), [("before", 3), ("after", 4), ("lost", 7), *_EVERY_CALL])
def test_whenever_it_dies_it_is_resumed(recorded: Place, mode: Mode, stride: int) -> None:
    for stage, when in crashes(recorded, mode, stride):
        had = stage.steps(stage.source)
        try:
            done = stage.move(resume=under_way(stage))
            assert done.phase == "done"
            assert stage.claimable() == (False, True)
            assert set(stage.steps(stage.target)) >= {had[-1]}
            assert read(stage.target)[0] == stage.steps(stage.source)[-1]
        except BaseException as error:
            error.add_note(when)
            raise


@pytest.mark.parametrize(("mode", "stride"), [("before", 4), ("after", 3), *_EVERY_CALL[:2]])
def test_whenever_it_dies_it_is_taken_back(recorded: Place, mode: Mode, stride: int) -> None:
    for stage, when in crashes(recorded, mode, stride):
        had = stage.steps(stage.source)
        try:
            if not under_way(stage):
                with pytest.raises(ConfigError, match="nothing to take back"):
                    stage.move(rollback=True)
                continue
            # After the handover the target's job has to leave in its turn: none of the stage's does.
            stage.move(_wishes(leave_timeout_s=0.0, arrive_timeout_s=0.0, force=True), rollback=True)
            assert stage.claimable() == (True, False)
            assert stage.steps(stage.source)[-1] >= had[-1]
            with stage.source.log() as log:
                log.claim()
        except BaseException as error:
            error.add_note(when)
            raise


# -------------------------------------------------------------------- the ways back


def test_taken_back_before_the_seal_the_job_goes_on(recorded: Place) -> None:
    stage = Stage(recorded, deaf=True)
    with pytest.raises(StoreError, match="did not leave") as caught:
        stage.move(_wishes(leave_timeout_s=0.3))
    assert caught.value.code == "store.no_answer"
    assert states(stage) == ["begin", "request", "cancelled"]
    stage.commit()
    assert stage.claimable() == (True, False)
    with pytest.raises(ConfigError, match="no move"):
        stage.move(resume=True)


def test_taken_back_between_the_seal_and_the_handover_nobody_else_can_hand_over(stage: Stage) -> None:
    stage.killed_at("sealed")
    with stage.source.open() as here, stage.target.open() as there:
        slow = stage.mover(here, there)  # another mover, which has seen the seal and is about to hand over
        assert slow.look().name == "SEALED"
        done = stage.move(rollback=True)
        assert stage.claimable() == (True, False)
        assert "withdrawn" in done.text
        with pytest.raises(OvertakenError):
            slow._hand_over()
    assert stage.claimable() == (True, False)


def test_a_withdrawal_that_was_cut_short_is_finished_by_whoever_comes(stage: Stage) -> None:
    stage.killed_at("sealed")
    with stage.source.open() as here, stage.target.open() as there:
        mover = stage.mover(here, there)
        mover.look()
        mover._entries.enter("cancelled", at=mover.target, text="withdrawn after the seal")
    assert stage.claimable() == (False, False)
    done = stage.move(resume=True)
    assert done.text == "the run was handed back to the source"
    assert stage.claimable() == (True, False)
    stage.events.clear()
    assert stage.move(WISHES).phase == "done"  # and it may move again, with nobody there to be asked
    assert states(stage) == ["begin", "sealed", "handover", "done"]


def test_taken_back_after_the_handover_before_a_claim(stage: Stage) -> None:
    stage.killed_at("handover")
    done = stage.move(_wishes(arrive_timeout_s=0.0), rollback=True)
    assert stage.claimable() == (True, False)
    assert done.source == stage.target.url
    assert [e.state for e in done.events] == ["begin", "sealed", "handover"]
    with pytest.raises(FencedError, match="cannot be claimed"):
        stage.arrive()


def test_what_was_trained_at_the_target_comes_back_along(recorded: Place, stage: Stage) -> None:
    stage.move()
    truth = train(stage.target, 6)
    stage.move(_wishes(leave_timeout_s=0.2, arrive_timeout_s=0.0, force=True), rollback=True)
    assert stage.claimable() == (True, False)
    assert read(stage.source) == (6, truth[6])
    assert stage.steps(stage.source) == [1, 2, 3, 6]
    train(stage.source, 7)
    stage.left, stage.deaf = True, True
    done = stage.move(_wishes(leave_timeout_s=0.2, force=True))  # and there again
    assert done.phase == "done"
    assert stage.claimable() == (False, True)
    assert stage.steps(stage.target)[-1] == 7


# -------------------------------------------------------------------- who comes between


def test_a_job_that_is_started_again_is_asked_again(stage: Stage) -> None:
    """A scheduler that requeues: the claim comes between what the mover has seen and its seal."""
    claims = []

    def requeue(event: Event) -> None:
        if event.state == "round" and stage.left and not claims:
            stage.job.epoch = None
            claims.append(stage.job.claim())
            stage.left = False
            stage.commit()

    stage.hook = requeue
    stage.move()
    assert claims
    assert states(stage) == ["begin", "request", "request", "sealed", "handover", "done"]
    assert stage.steps(stage.target)[-1] == 5


@pytest.mark.parametrize("force", [False, True])
def test_a_job_that_is_started_again_and_again_is_not_waited_for_without_end(recorded: Place, force: bool) -> None:
    """Each of its lives is too short to read what is asked of it."""
    stage, asked, lives = Stage(recorded, deaf=True), [], []

    def begin_anew() -> None:
        with contextlib.suppress(FencedError):  # after the seal
            stage.job.claim()

    def crash_soon(event: Event) -> None:
        if event.state == "request":
            asked.append(time.monotonic())
            lives.append(threading.Timer(0.2, begin_anew))
            lives[-1].start()

    stage.hook = crash_soon
    wishes = _wishes(leave_timeout_s=0.5, force=force)
    if force:
        assert stage.move(wishes).phase == "done"
    else:
        with pytest.raises(StoreError, match="did not leave within 1 s, and the request is withdrawn"):
            stage.move(wishes)
    for life in lives:
        life.cancel()
        life.join()
    assert len(asked) > 2
    assert time.monotonic() - asked[0] >= 1.0
    assert stage.claimable() == ((False, True) if force else (True, False))


def test_a_commit_just_before_the_seal_is_not_lost(recorded: Place) -> None:
    """A job that is only slow, while the user goes on without it."""
    stage = Stage(recorded, deaf=True)
    committed = []
    with stage.source.open() as here, stage.target.open() as there:
        mover = stage.mover(here, there, _wishes(leave_timeout_s=0.0, force=True))
        genuine = mover.source.move

        def late(state: str, **more: object) -> object:
            if state == "sealed" and not committed:
                committed.append(stage.commit().step)
            return genuine(state, **more)  # type: ignore[arg-type]

        mover.source.move = late  # type: ignore[method-assign,assignment]
        mover.run()
    assert committed == [3]
    assert stage.steps(stage.target)[-1] == 3
    with stage.zombie():
        pass
    stage.close()


def test_of_two_movers_the_older_one_is_fenced(recorded: Place) -> None:
    stage = Stage(recorded, deaf=True)
    with stage.source.open() as here, stage.target.open() as there:
        first = stage.mover(here, there)
        first.look()
        first._begin()
        with pytest.raises(StoreError, match="did not leave"):
            stage.move(_wishes(leave_timeout_s=0.2), resume=True)
        with pytest.raises(FencedError):
            first.run()
        stage.deaf = False
        assert stage.move().phase == "done"
        assert stage.mover(here, there).run().phase == "done"
    assert states(stage).count("handover") == states(stage).count("sealed") == 1
    stage.close()


@pytest.mark.parametrize("state", ["begin", "sealed"])
def test_a_move_that_is_under_way_is_not_begun_again_by_mistake(stage: Stage, state: str) -> None:
    stage.killed_at(state)
    with pytest.raises(ConfigError, match="--resume") as caught:
        stage.move()
    assert caught.value.code == "config.moving"
    assert stage.move(resume=True).phase == "done"


def test_a_replica_is_not_moved_from(stage: Stage) -> None:
    stage.killed_at("begin")
    stage.move(rollback=True)
    stage.source, stage.target = stage.target, stage.source
    with pytest.raises(ConfigError, match=r"back to|is a replica"):
        stage.move()


def test_nothing_is_begun_where_the_target_cannot_take_it(stage: Stage) -> None:
    train(stage.target, 1)
    with pytest.raises(ConfigError, match="another run") as caught:
        stage.move()
    assert caught.value.code == "config.other_run"
    assert stage.look(stage.source).move is None


@pytest.mark.parametrize("state", ["sealed", "handover", "done"])
@pytest.mark.parametrize("end", ["source", "target"])
def test_an_entry_that_cannot_be_read_any_more_hands_nothing_out_twice(stage: Stage, state: str, end: str) -> None:
    stage.killed_at(state)
    stage.react()
    place = getattr(stage, end)
    with place.log() as log:
        move = log.view.move
        if move is not None:
            log.store.put(keys.entry_key(move.number), b"rot")
    assert sum(stage.claimable()) <= 1
    if (end, stage.claimable()) == ("target", (False, True)):
        train(stage.target, 5)  # what its job commits tells as much as its own word would have
    assert stage.move(resume=True).phase == "done"
    assert stage.claimable() == (False, True)
    assert read(stage.target)[0] >= 3


# -------------------------------------------------------------------- what is asked of the blackout


def test_no_job_is_stopped_for_longer_than_allowed(recorded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumove.move.machine._POLL_S", 0.01)
    stage = Stage(recorded)

    def go_on(event: Event) -> None:
        if event.state == "wait" and len(stage.steps(stage.source)) < TRAINED:
            stage.commit()

    stage.hook = go_on
    with pytest.raises(ConfigError, match=r"a blackout of at most 1e-09 s cannot be had: a blackout of") as caught:
        stage.move(_wishes(max_blackout_s=1e-9))
    assert caught.value.code == "config.blackout"
    assert states(stage) == ["begin", "cancelled"]
    assert stage.claimable() == (True, False)
    assert stage.steps(stage.target)[-1] == 5, "later commits were given a chance"
    assert stage.move(_wishes(max_blackout_s=60.0)).phase == "done"
    stage.close()


def test_single_steps_that_the_link_does_not_keep_up_with_end_as_the_job_leaves(
    recorded: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last difference is then one of a single step."""
    stage = Stage(recorded, apart_s=1e-5)
    monkeypatch.setattr("gpumove.move.machine._POLL_S", 0.01)
    monkeypatch.setattr("gpumove.move.precopy._COMMIT_S", 0.2)

    def step_by_step(event: Event) -> None:
        steps = [e for e in stage.events if e.facts.get("every_step")]
        if steps and event.state in ("wait", "round") and len(stage.steps(stage.source)) < TRAINED:
            stage.commit()

    stage.hook = step_by_step
    stage.move(_wishes(every_step=True))
    told = [(e.state, e.facts.get("every_step")) for e in stage.events if e.state in ("begin", "request")]
    assert told == [("begin", None), ("begin", True), ("request", True)]
    stage.close()


def test_what_the_source_drops_while_it_is_copied_is_dropped_at_the_target(
    recorded: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumove.move.machine._POLL_S", 0.01)
    stage = Stage(recorded)
    had: list[list[int]] = []

    def drop(event: Event) -> None:
        if event.state == "wait" and stage.steps(stage.source)[-1] < TRAINED:
            stage.commit()
            collect(stage.job, Retention(keep_last=2))
        if event.state == "round":
            had.append(stage.steps(stage.target))

    stage.hook = drop
    with pytest.raises(ConfigError, match="a blackout of at most"):
        stage.move(_wishes(max_blackout_s=1e-9))
    assert stage.steps(stage.target)[-1] == 5
    assert max(map(len, had)) <= 3, had
    assert read(stage.target)[0] == 5
    stage.close()


def test_a_commit_is_not_waited_for_for_ever(recorded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(recorded, apart_s=0.01)
    monkeypatch.setattr("gpumove.move.machine._POLL_S", 0.01)
    monkeypatch.setattr("gpumove.move.precopy._COMMIT_S", 0.2)
    with pytest.raises(StoreError, match="has committed nothing") as caught:
        stage.move(_wishes(max_blackout_s=1e-9))
    assert caught.value.code == "store.no_answer"
    assert stage.move(resume=True).phase == "done"
    stage.close()


def test_beside_a_long_round_saves_are_held_back_and_the_mover_says_that_it_is_there(
    recorded: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumove.move.herald._TICK_S", 0.01)
    stage = Stage(recorded, deaf=True)
    stage.killed_at("begin")

    def facts() -> dict[str, Any]:
        move = stage.look(stage.source).move
        assert move is not None
        assert move.state == "begin"
        return move.facts

    with stage.source.log() as tool:  # the job has heard
        begun = tool.view.move
        assert begun is not None
        tool.move("begin", move=begun.move, other=begun.other, facts={"job": {"save_s": 2.0}})
    crowded = False
    with stage.source.log() as log, Herald(log, lambda: crowded) as herald:
        head = stage.look(stage.source).head
        crowded = True
        time.sleep(0.2)
        assert stage.look(stage.source).head == head, "it speaks while a round runs only"
        herald.copying = True
        until(lambda: facts().get("hold"))
        assert facts() == {"hold": True, "job": {"save_s": 2.0}}
        log.follow()  # what the mover does between two rounds
        head = stage.look(stage.source).head
        time.sleep(0.2)
        assert stage.look(stage.source).head == head, "once is enough"
        monkeypatch.setattr("gpumove.move.herald._AGAIN_S", 0.05)
        until(lambda: stage.look(stage.source).head > head)
        assert facts() == {"hold": True, "job": {"save_s": 2.0}}
    stage.deaf = False
    assert stage.move(resume=True).phase == "done"
    stage.close()


def until(what: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


# -------------------------------------------------------------------- an end that cannot be reached


def unreachable(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    genuine = Store._run

    def run(self: Store, verb: str, key: str, *more: object) -> object:
        if self.url == place.url:
            raise StoreError(f"{verb} {self.url}/{key} failed: no route to host", code="store.unavailable")
        return genuine(self, verb, key, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_run", run)


def test_a_source_that_is_lost_is_left_behind_only_by_force(recorded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(recorded, deaf=True)
    stage.killed_at("begin")
    with stage.source.open() as here, stage.target.open() as there:
        stage.mover(here, there).rounds.once()
    with monkeypatch.context() as patch:
        unreachable(patch, stage.source)
        with pytest.raises(StoreError):
            stage.move(resume=True)
        assert stage.look(stage.target).refusal()
        done = stage.move(_wishes(force=True), resume=True)
        assert "NOT sealed" in done.text
        assert "two histories" in done.text
        assert stage.look(stage.target).refusal() == ""
        handed = stage.look(stage.target).move
        assert handed is not None
    stage.commit()  # it can: it cannot know, and harms nobody
    again = stage.move(resume=True)
    assert again.phase == "done"
    assert stage.claimable() == (False, True)
    assert "steps [3]" in "".join(e.text for e in stage.events if e.state == "sealed")
    with stage.zombie():
        pass
    assert stage.steps(stage.target) == [2]
    stage.close()


def test_a_target_that_is_lost_gives_the_run_back_only_by_force(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.killed_at("sealed")
    with monkeypatch.context() as patch:
        unreachable(patch, stage.target)
        with pytest.raises(StoreError):
            stage.move(rollback=True)
        assert stage.look(stage.source).refusal()
        done = stage.move(_wishes(force=True), rollback=True)
        assert "two histories" in done.text
        assert stage.look(stage.source).refusal() == ""
    with stage.source.open() as store:
        log = Log(store)
        log.open(create=False)
        log.read()
        log.claim()


def test_a_damaged_checkpoint_that_comes_while_the_job_is_asked_is_passed_over(stage: Stage) -> None:
    """The one after it is sound, and is what the job leaves with."""

    def spoil(event: Event) -> None:
        if event.state == "request":
            made = stage.commit()
            stage.deaf = True  # the job goes on for one more step
            with stage.source.open() as store:
                store.delete([made.manifest_key])
        elif event.state == "damaged":
            stage.deaf = False

    stage.hook = spoil
    done = stage.move()
    assert "damaged" in states(stage)
    assert (done.phase, done.step) == ("done", 4)
    assert read(stage.target)[0] == 4
