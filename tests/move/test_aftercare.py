"""After the handover: the mover follows what the job says of itself, and what it finds decides what follows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from gpumove.cli import main
from gpumove.errors import ConfigError, FencedError
from gpumove.format.manifest import LogEntry, Move
from gpumove.move import aftercare
from gpumove.move.moving import move
from gpumove.move.report import Event, Report, Wishes
from gpumove.parity.watch import told
from gpumove.store.gc import Retention, collect
from gpumove.store.view import View
from tests.move.runs import CONFIG, Place, memory, read
from tests.move.stage import WISHES, Killed, Stage

WATCH = replace(WISHES, watch="warn", gone_after_s=20.0)
ROLLBACK = replace(WATCH, watch="rollback", leave_timeout_s=0.0, arrive_timeout_s=0.0)
LOSS = {"what": "loss", "step": 12, "text": "the loss is 9"}
SLOW = {"what": "time", "step": 12, "text": "a step takes 9 s"}


@pytest.fixture
def stage(recorded: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(aftercare, "_POLL_S", 0.02)
    made = Stage(recorded)
    yield made
    made.close()


def newest(place: Place) -> Move:
    with place.log() as log:
        assert log.view.move is not None
        return log.view.move


def say(stage: Stage, **watch: Any) -> None:
    """The target's job tells how far it has compared itself."""
    with stage.target.log() as log:
        word = log.view.move
        assert word is not None
        facts = {**word.facts, "watch": {"handed": 3, "steps": 200, "epoch": 7, "step": 3, **watch}}
        log.move("watched", move=word.move, other=word.other, facts=facts, text=f"so far {watch}")


def script(stage: Stage, *words: dict[str, Any]) -> None:
    """What it says, one after the other, each once the mover has heard the one before."""
    rest = list(words)

    def speak(event: Event) -> None:
        if event.state == "watch" and rest:
            say(stage, **rest.pop(0))

    stage.hook = speak


def arrive(stage: Stage) -> None:
    """The stage's job, and one that says from the beginning that it compares itself."""
    original = stage.arrive

    def both() -> Any:
        log = original()
        say(stage)
        return log

    stage.arrive = both  # type: ignore[method-assign]


def watched(stage: Stage, wishes: Wishes, *words: dict[str, Any], **more: Any) -> Report:
    arrive(stage)
    script(stage, *words)
    return stage.move(wishes, **more)


def kept(place: Place) -> list[int]:
    """The steps that stay whatever retention says: the user's pins, and what a move keeps."""
    with place.log() as log:
        return [c.step for c in log.view.checkpoints if c.pinned or c.number == log.view.keeps]


def test_a_sound_job_is_watched_to_the_end_and_what_was_kept_is_given_free(stage: Stage) -> None:
    seen: list[list[int]] = []
    arrive(stage)
    rest = [{"step": 100}, {"step": 203, "over": True}]

    def speak(event: Event) -> None:
        if event.state == "watch" and rest:
            seen.append(kept(stage.source))
            say(stage, **rest.pop(0))

    stage.hook = speak
    done = stage.move(WATCH)
    assert seen == [[3], [3]]
    assert kept(stage.source) == []
    assert (done.phase, done.findings) == ("done", ())
    assert "nothing was found" in done.text
    end = newest(stage.source)
    assert (end.state, end.facts["findings"], end.facts["back"]) == ("watched", [], "")
    assert stage.claimable() == (False, True)
    with pytest.raises(ConfigError, match="has moved"):
        stage.move(WATCH)
    assert stage.move(WATCH, resume=True).phase == "done"  # there is nothing left to do


@pytest.mark.parametrize("when", ["sealed", "watch"])
@pytest.mark.parametrize("step", [1, 3])
def test_what_the_user_has_pinned_stays_pinned(stage: Stage, capsys: Any, when: str, step: int) -> None:
    """Also if it is the very checkpoint that the move keeps: that is another thing."""
    arrive(stage)
    todo = ["pin", "end"]

    def speak(event: Event) -> None:
        if event.state == when and "pin" in todo:
            todo.remove("pin")
            assert main(["pin", stage.source.url, str(step)]) == 0
            assert "already" not in capsys.readouterr().out
        if event.state == "watch" and "end" in todo:
            todo.remove("end")
            say(stage, step=203, over=True)

    stage.hook = speak
    stage.move(WATCH)
    assert not todo
    assert kept(stage.source) == [step]


def test_no_retention_takes_what_was_handed_over_until_the_watch_is_over(stage: Stage) -> None:
    """Also where newer checkpoints come to the source meanwhile."""
    seen: list[list[int]] = []

    def make(view: View, number: int) -> LogEntry:
        return msgspec.structs.replace(view.checkpoints[-1], number=number, epoch=view.epoch, step=9)

    def retain() -> None:
        with stage.source.log() as log:
            if not seen:
                log.append(make)
            collect(log, Retention(keep_last=1))
            seen.append([c.step for c in log.view.checkpoints])

    arrive(stage)

    def speak(event: Event) -> None:
        if event.state == "watch" and not seen:
            retain()
            retain()
            say(stage, step=203, over=True)

    stage.hook = speak
    stage.move(WATCH)
    retain()
    assert seen == [[3, 9], [3, 9], [9]]


def test_what_a_killed_watch_has_kept_is_free_once_the_run_is_moved_back(stage: Stage) -> None:
    arrive(stage)

    stage.killed_at("watch", WATCH)
    assert kept(stage.source) == [3]
    alone = replace(WISHES, leave_timeout_s=0.0, arrive_timeout_s=0.0, force=True)
    done = move(stage.target.url, stage.source.url, alone, config=CONFIG)
    assert done.phase == "handed"
    assert stage.claimable() == (True, False)
    assert kept(stage.source) == kept(stage.target) == []


def test_a_finding_is_told_and_the_watch_goes_on(stage: Stage) -> None:
    done = watched(stage, WATCH, {"step": 12, "findings": [LOSS]}, {"step": 203, "over": True, "findings": [LOSS]})
    assert done.findings == ("step 12: the loss is 9",)
    assert done.phase == "done"
    assert stage.claimable() == (False, True)


def test_a_loss_that_has_risen_takes_the_run_back_to_what_was_handed_over(stage: Stage) -> None:
    done = watched(stage, ROLLBACK, {"step": 12, "findings": [LOSS]})
    assert stage.claimable() == (True, False)
    assert done.findings == ("step 12: the loss is 9",)
    assert "taken back" in done.text
    assert (done.source, done.target) == (stage.target.url, stage.source.url)
    assert newest(stage.source).state == "handover"
    assert newest(stage.source).facts["back_to"] == 3
    assert newest(stage.target).facts["back_to"] == 3
    assert kept(stage.source) == []
    assert read(stage.source)[0] == 3
    assert done.sent_bytes == 0


def test_slow_steps_bring_along_what_was_trained(stage: Stage) -> None:
    watched(stage, ROLLBACK, {"step": 12, "findings": [SLOW]})
    assert stage.claimable() == (True, False)
    assert "back_to" not in newest(stage.source).facts


def test_a_job_that_ends_with_an_error_is_a_finding_and_one_that_leaves_is_none(stage: Stage) -> None:
    done = watched(stage, ROLLBACK, {"step": 9, "ended": "left"}, {"step": 12, "ended": "ValueError"})
    assert done.findings == ("the job at the target ended with ValueError after step 12",)
    assert stage.claimable() == (True, False)


def test_a_job_that_comes_to_its_end_is_no_finding(stage: Stage) -> None:
    done = watched(stage, ROLLBACK, {"step": 9, "ended": "finished"})
    assert (done.phase, done.findings) == ("done", ())


def test_silence_is_a_finding(stage: Stage) -> None:
    began = time.monotonic()
    done = watched(stage, replace(ROLLBACK, gone_after_s=0.5))
    assert 0.5 < time.monotonic() - began < 15
    assert "nothing was heard" in done.findings[0]
    assert stage.claimable() == (True, False)


@pytest.mark.parametrize("ended", ["ParityError", "ValueError"])
def test_a_watch_that_only_warns_ends_with_a_job_that_has_stopped(stage: Stage, ended: str) -> None:
    done = watched(stage, replace(WATCH, gone_after_s=1.0), {"step": 12, "findings": [LOSS], "ended": ended})
    assert done.findings == ("step 12: the loss is 9",)
    assert done.phase == "done"
    assert stage.claimable() == (False, True)


def test_a_job_that_is_started_again_and_again_is_a_finding(stage: Stage) -> None:
    arrive(stage)
    starts = [4]

    def start(event: Event) -> None:
        if event.state == "watch" and starts[0]:
            starts[0] -= 1
            with stage.target.log() as log:
                log.claim(resumed=log.view.find().number)  # type: ignore[union-attr]

    stage.hook = start
    done = stage.move(ROLLBACK)
    assert done.findings == ("the job at the target was started 3 times, and got no further",)


def test_a_job_that_does_not_compare_itself_is_not_watched(stage: Stage) -> None:
    done = stage.move(WATCH)
    assert (done.phase, done.findings) == ("done", ())
    assert any("does not compare itself" in event.text for event in done.events)
    assert kept(stage.source) == []


def test_the_run_moves_on_while_it_is_watched(stage: Stage) -> None:
    def begin(event: Event) -> None:
        if event.state == "watch":
            with stage.target.log() as log:
                log.move("begin", move="f" * 16, other="memory://elsewhere")

    arrive(stage)
    stage.hook = begin
    done = stage.move(ROLLBACK)
    assert (done.phase, done.findings) == ("done", ())
    assert kept(stage.source) == []


@pytest.mark.parametrize("at", [1, 2])
def test_a_watch_that_was_killed_is_taken_up_again(stage: Stage, at: int) -> None:
    """What was asked for is in the log: the one that resumes need not know it."""
    arrive(stage)
    seen = [0]

    def kill(event: Event) -> None:
        if event.state == "watch":
            seen[0] += 1
            if seen[0] == at:
                raise Killed
            say(stage, step=8)

    stage.hook = kill
    with pytest.raises(Killed):
        stage.move(ROLLBACK)
    assert kept(stage.source) == [3]
    script(stage, {"step": 12, "findings": [LOSS]})
    done = stage.move(replace(WISHES, leave_timeout_s=0.0, arrive_timeout_s=0.0), resume=True)
    assert done.findings == ("step 12: the loss is 9",)
    assert stage.claimable() == (True, False)


def test_a_rollback_that_was_killed_before_it_began_is_begun(stage: Stage) -> None:
    arrive(stage)
    script(stage, {"step": 12, "findings": [LOSS]})
    stage.killed_at("watched", ROLLBACK)
    assert stage.claimable() == (False, True)
    done = stage.move(replace(WISHES, leave_timeout_s=0.0, arrive_timeout_s=0.0), resume=True)
    assert "taken back" in done.text
    assert stage.claimable() == (True, False)
    assert newest(stage.source).facts["back_to"] == 3


@pytest.mark.parametrize("state", ["begin", "request", "sealed"])
def test_a_way_back_without_what_was_trained_is_resumed_wherever_it_was_killed(stage: Stage, state: str) -> None:
    stage.move()
    back = replace(WISHES, leave_timeout_s=0.0, arrive_timeout_s=0.0, force=True)
    stage.killed_at(state, replace(back, discard=True), rollback=True)
    stage.move(back, resume=True)
    assert stage.claimable() == (True, False)
    assert newest(stage.source).facts["back_to"] == 3
    assert read(stage.source)[0] == 3


def test_the_way_back_leaves_out_what_came_over_before(recorded: Place, stage: Stage) -> None:
    """A rollback that copies was begun and given up; the one without it goes on from the step of before."""
    stage.move()
    with recorded.log() as log, recorded.open() as store:
        fourth = log.view.checkpoints[3]
        with stage.target.open() as there:
            for info in store.list(""):
                if not info.key.startswith("log/") and there.exists(info.key) is None:
                    there.put(info.key, store.get(info.key))
    with stage.target.log() as log:
        log.append(lambda view, number: msgspec.structs.replace(fourth, number=number, epoch=view.epoch))
    back = replace(WISHES, leave_timeout_s=0.0, arrive_timeout_s=0.0, force=True)
    stage.killed_at("request", back, rollback=True)
    assert stage.steps(stage.source)[-1] == 4
    move(stage.target.url, stage.source.url, WISHES, config=CONFIG, rollback=True)
    assert stage.claimable() == (False, True)
    stage.move(replace(back, discard=True), rollback=True)
    assert stage.claimable() == (True, False)
    assert read(stage.source)[0] == 3


def commit(stage: Stage, step: int) -> None:
    """The target's job commits."""
    with stage.target.log() as log:
        newest = log.view.checkpoints[-1]
        log.append(lambda view, number: msgspec.structs.replace(newest, number=number, epoch=view.epoch, step=step))


def test_a_checkpoint_may_come_before_the_first_word(stage: Stage) -> None:
    def arrive() -> Any:
        with stage.target.log() as log:
            log.claim(resumed=log.view.find().number)  # type: ignore[union-attr]
        commit(stage, 4)
        return log

    stage.arrive = arrive  # type: ignore[method-assign]
    late = threading.Timer(0.5, lambda: say(stage, step=203, over=True, findings=[LOSS]))

    def speak(event: Event) -> None:
        if event.state == "watch" and not late.ident:
            late.start()

    stage.hook = speak
    assert stage.move(WATCH).findings == ("step 12: the loss is 9",)


def test_a_watch_ends_where_the_job_goes_on_past_it_and_says_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aftercare, "_WORD_S", 0.1)
    arrive(stage)
    seen: list[str] = []

    def speak(event: Event) -> None:
        if event.state == "watch" and not seen:
            seen.append(event.text)
            commit(stage, 300)

    stage.hook = speak
    done = stage.move(WATCH)
    assert (done.phase, done.findings) == ("done", ())
    assert "gone on past the watch" in done.text
    assert kept(stage.source) == []


def test_what_was_not_compared_is_told(stage: Stage) -> None:
    done = watched(stage, WATCH, {"step": 203, "over": True, "unjudged": ["the loss, because of nothing"]})
    assert "not compared: the loss, because of nothing" in done.text


def test_how_long_silence_may_last_is_remembered(stage: Stage) -> None:
    arrive(stage)

    stage.killed_at("watch", replace(ROLLBACK, gone_after_s=0.5))
    began = time.monotonic()
    done = stage.move(replace(WISHES, leave_timeout_s=0.0, arrive_timeout_s=0.0), resume=True)
    assert time.monotonic() - began < 15
    assert "nothing was heard" in done.findings[0]


@pytest.mark.parametrize("standing", [{}, {"s": 100.0}, {"s_expected": 100.0}])
def test_how_long_silence_may_last_follows_from_what_a_step_takes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, standing: dict[str, float]
) -> None:
    """Where a step takes 100 s, as the job tells or its source did, half a second says nothing."""
    if standing:
        monkeypatch.setattr(aftercare, "step_s", lambda commits: None)
    monkeypatch.setattr(aftercare, "_LEAST_S", 0.1)
    monkeypatch.setattr(aftercare, "_UNKNOWN_S", 0.1)
    arrive(stage)
    late = threading.Timer(0.5, lambda: say(stage, step=203, over=True))

    def speak(event: Event) -> None:
        if event.state == "watch" and not late.ident:
            say(stage, standing=standing)
            late.start()

    stage.hook = speak
    done = stage.move(replace(ROLLBACK, gone_after_s=None))
    late.join()
    assert (done.phase, done.findings) == ("done", ())


@pytest.mark.parametrize("asked", [{"max_blackout_s": 60.0}, {"every_step": True, "slow_s": 0.5}])
def test_the_way_back_is_not_held_to_what_was_asked_of_the_way_there(
    recorded: Place, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """That was for a job that trains as it should, and commits."""
    monkeypatch.setattr(aftercare, "_POLL_S", 0.02)
    monkeypatch.setattr("gpumove.move.machine._POLL_S", 0.01)
    monkeypatch.setattr("gpumove.move.precopy._COMMIT_S", 0.2)
    stage = Stage(recorded, apart_s=0.01)
    arrive(stage)
    stage.move()
    script(stage, {"step": 12, "findings": [SLOW]})
    stage.events.clear()
    done = stage.move(replace(ROLLBACK, **asked), resume=True)
    assert "taken back" in done.text
    assert stage.claimable() == (True, False)
    told = [event for event in stage.events if event.state in ("begin", "request")]
    assert told
    assert not any(event.facts.get("every_step") or event.facts.get("slow_s") for event in told), told
    stage.close()


def test_of_two_who_watch_one_ends_it_and_the_other_says_so(stage: Stage) -> None:
    arrive(stage)

    def overtake(event: Event) -> None:
        if event.state == "watch":
            stage.hook = lambda event: None
            say(stage, step=203, over=True)
            other = move(stage.source.url, stage.target.url, WATCH, config=CONFIG, resume=True)
            assert other.phase == "done"

    stage.hook = overtake
    with pytest.raises(FencedError, match="somebody else has carried on what this watch is of"):
        stage.move(ROLLBACK)
    assert stage.claimable() == (False, True)
    assert newest(stage.source).facts["back"] == ""
    assert kept(stage.source) == []


def test_wrong_wishes_are_refused(stage: Stage) -> None:
    with pytest.raises(ConfigError, match="--rollback"):
        stage.move(replace(WISHES, discard=True))
    with pytest.raises(ConfigError, match="not watched"):
        stage.move(WATCH, rollback=True)


def test_what_the_job_says_is_read_with_care() -> None:
    assert told(None) is None
    assert told(said()) is None
    for wrong in (1, "rollback", [], {}, {"handed": "x", "steps": 1, "epoch": 1}):
        assert told(said(watch=wrong)) is None


def said(**facts: Any) -> Move:
    return Move(format=1, number=1, epoch=1, writer="", time=0.0, move="", state="done", other="", facts=facts)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--on-parity", "rollback"], "are for a --watch"),
        (["--gone-after", "5s"], "are for a --watch"),
        (["--step-ratio", "0"], "--step-ratio takes a number"),
        (["--step-ratio", "nan"], "--step-ratio takes a number"),
        (["--watch", "--rollback"], "not watched"),
        (["--watch", "--no-wait"], "leave out --no-wait"),
        (["--discard"], "is for a way back"),
    ],
)
def test_wrong_options_are_refused(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["move", memory().url, "--to", memory().url, *options]) == 2
    assert why in capsys.readouterr().err
