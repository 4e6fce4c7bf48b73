"""What a move decides by numbers, what logs say of it in words, and what a job makes of a request."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch

import gpumove
from gpumove.cli import main
from gpumove.config import Config
from gpumove.errors import ConfigError, FencedError
from gpumove.format.manifest import FORMAT, Checkpoint, Pack
from gpumove.format.stored import Stored
from gpumove.from_env import Word
from gpumove.inspection.condition import explain
from gpumove.job.outcome import MOVED, judge, stayed
from gpumove.job.progress import Progress
from gpumove.leave.departure import Departure
from gpumove.leave.requests import Requests, answer, standing
from gpumove.meeting import Chair, Report, Verdict
from gpumove.move.cutover import Standing, decide, leave_s, ship_or_replay, step_s
from gpumove.move.rounds import Forecast
from gpumove.notices.notice import MOVE, Outcome
from gpumove.save.chain import Chain
from gpumove.save.pace import Pace
from gpumove.steplog import Asked, StepLog
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.move.runs import CONFIG, Place, memory
from tests.move.stage import Stage
from tests.store.test_log import commit, new_log
from tests.store.test_moves import THERE, again, say


def expect(blackout_s: float | None, *, converges: bool = True, behind: bool = True) -> Forecast:
    return Forecast(blackout_s, {"behind": 1.0} if behind else {}, converges, "why")


@pytest.mark.parametrize(
    ("left", "rounds", "steady", "tries", "blackout", "converges", "limit", "step"),
    [
        (900, 0, 0, 0, None, False, None, "round"),  # nothing is there
        (None, 0, 0, 0, None, False, None, "cut"),  # all is there already
        (900, 1, 0, 0, 9.0, True, None, "round"),  # the link keeps up: go on until there is nothing but the last delta
        (900, 1, 0, 0, 9.0, False, None, "cut"),  # it does not
        (100, 2, 0, 0, 2.0, True, None, "round"),  # one commit behind is a whole delta more than none
        (100, 2, 0, 0, 2.0, False, None, "cut"),
        (100, 32, 30, 0, 2.0, True, None, "cut"),  # it never catches up
        (None, 3, 1, 0, 2.0, True, None, "cut"),
        (900, 1, 0, 0, 9.0, False, 5.0, "stop"),
        (900, 1, 0, 0, 9.0, True, 5.0, "round"),
        (900, 1, 0, 0, 4.0, True, 5.0, "cut"),  # short enough
        (None, 3, 0, 0, 9.0, True, 5.0, "wait"),
        (90, 3, 1, 1, 9.0, True, 5.0, "round"),
        (None, 9, 3, 3, 9.0, True, 5.0, "stop"),
        (None, 1, 0, 0, None, False, 5.0, "wait"),  # nothing was measured: never without knowing
        (90, 3, 1, 1, 9.0, False, 5.0, "stop"),
    ],
)
def test_when_to_stop_the_job(
    left: int | None,
    rounds: int,
    steady: int,
    tries: int,
    blackout: float | None,
    converges: bool,
    limit: float | None,
    step: str,
) -> None:
    now = Standing(expect(blackout, converges=converges), left, 100.0, rounds, steady, tries)
    assert decide(now, limit).step == step


def test_what_goes_over_before_the_job_has_left_is_not_caught_up_with() -> None:
    hidden = Standing(expect(2.0, behind=False), 100, 100.0, 2)
    assert decide(hidden, None).step == "cut"
    assert decide(hidden, 1.0).step == "round", "a later commit may be smaller, and short enough"
    assert decide(Standing(expect(2.0, behind=False), 900, 100.0, 2), None).step == "round", "more than one commit is"


def commits(*at: tuple[float, int], epoch: int = 1) -> list[Checkpoint]:
    return [
        Checkpoint(
            format=FORMAT, number=n, epoch=epoch, writer="w", time=seconds, step=step, attempt=f"{epoch:08d}-{n:08d}",
            manifest="0" * 32, manifest_bytes=1, world_size=1, state_bytes=1, new_bytes=1,
        )
        for n, (seconds, step) in enumerate(at, 1)
    ]  # fmt: skip


def test_seconds_per_step_are_those_of_one_start() -> None:
    assert step_s(commits((100.0, 10), (110.0, 20), (130.0, 40))) == 1.0
    assert step_s([*commits((0.0, 10)), *commits((1000.0, 20), (1010.0, 40), epoch=2)]) == 0.5
    assert step_s(commits((0.0, 10))) is None
    assert step_s([]) is None


@pytest.mark.parametrize(("rate", "save"), [(10.0, False), (1000.0, True), (None, True)])
def test_ship_or_replay(rate: float | None, save: bool) -> None:
    """Some 11 steps of a second each against 1000 bytes."""
    line = commits((90.0, 0), (100.0, 10))
    choice = ship_or_replay(line, now=110.0, rate_bytes_s=rate, delta_bytes=1000.0, save_s=0.0)
    assert choice.save is save
    if rate is not None:
        assert (choice.send_s, choice.replay_s) == (1000.0 / rate, 11.0)
    late = ship_or_replay(line, now=110.0, rate_bytes_s=10.0, delta_bytes=1000.0, save_s=95.0)
    assert late.replay_s == 106.0
    assert late.save is False  # a save that takes long is one more reason not to


def test_single_steps_are_saved_where_a_move_asks_and_as_long_as_they_are_in_time() -> None:
    asked = Asked()
    log = StepLog(Config(every_steps=100), asked)
    assert not log.watching
    assert not log.wants()
    asked.every_step = True
    for step in range(1, 9):
        assert log.watching
        assert log.wants()
        log.came_out(step, 0.1, in_time=step % 3 == 0)
    for step in range(9, 12):
        log.came_out(step, 0.1, in_time=False)
    assert not log.wants()
    assert not log.watching
    asked.every_step = False
    assert not log.wants()
    asked.every_step = True
    assert log.wants()


def test_what_a_move_asks_of_the_writers() -> None:
    assert Asked().thrift == 0
    assert Asked(under_way=True).thrift == 1
    assert Asked(under_way=True, every_step=True).thrift == 2
    pace = Pace(always=False, never=False, threads=1)
    for _ in range(40):  # raw is quicker by far: it is not coded any more
        pace.begin()
        if pace.share:
            time.sleep(0.002)
        pace.put_begins()
        pace.put_ends(2 << 30)
        pace.end(2 << 20)
    pace.begin()
    assert pace.share == 0.0
    pace.insist(always=True)
    pace.begin()
    assert pace.share == 1.0
    raw = Pace(always=False, never=True, threads=1)
    raw.insist(always=True)
    raw.begin()
    assert raw.share == 0.0, "who wants it raw gets it raw"


def test_chains_go_on_while_a_move_asks_for_single_steps() -> None:
    def save(number: int, *bases: Stored) -> Stored:
        name = f"00000001-{number:08d}"
        pack = Pack(attempt=name, nbytes=600, digest="d" * 32)
        return Stored(pack, 0, 600, "delta", "d" * 32, 1000, bases)

    row = [save(1)]
    for number in range(2, 70):
        row.append(save(number, row[-1]))
    chain = Chain(max_chain=16, max_amplification=2.0)
    assert chain.goes_on([row[0]], "adam")
    assert not chain.goes_on([row[5]], "adam")
    chain.lift(lifted=True)
    assert chain.goes_on([row[5]], "adam")
    assert chain.goes_on([row[60]], "adam")
    assert not chain.goes_on([row[66]], "adam")
    chain.lift(lifted=False)
    assert not chain.goes_on([row[5]], "adam")


def test_no_save_that_is_only_due_is_begun_while_a_move_copies() -> None:
    asked = Asked(under_way=True, hold=True)
    chair = Chair(Config(every_steps=10, every_s=None), 0.0, lambda vitals, step: None, asked)

    def meet(step: int, *, force: bool = False) -> Verdict:
        verdict = chair.decide(step, [msgspec.msgpack.encode(Report(step))], None, force=force, now=float(step))
        assert verdict.error is None
        return verdict

    assert meet(10).save is False
    assert meet(15, force=True).save is True, "who asks for one gets it"
    assert meet(20).save is False
    asked.hold = False
    assert (meet(30).save, meet(30).thrift) == (True, 1)


def test_a_move_that_asks_for_single_steps_gets_them_from_the_next_meeting_and_that_is_soon() -> None:
    asked = Asked()
    chair = Chair(Config(every_steps=1000, every_s=None), 0.0, lambda vitals, step: None, asked)
    step, meetings, saves = 1, [], []
    for now in range(1, 2001):  # half a second a step
        asked.under_way |= now == 700
        asked.every_step |= now == 900
        if now == step:
            verdict = chair.decide(step, [msgspec.msgpack.encode(Report(step))], None, force=False, now=now / 2)
            assert verdict.error is None
            meetings.append(now)
            saves += [now] if verdict.save else []
            step = verdict.next_meeting
    apart = [(before, after - before) for before, after in pairwise(meetings)]
    assert all(gap <= 60 for at, gap in apart), "about half a minute"
    assert all(gap <= 4 for at, gap in apart if at >= 760), "about two seconds"
    assert any(gap > 40 for at, gap in apart), "not more often than that, without a move"
    assert 900 <= saves[0] <= 904
    assert saves == list(range(saves[0], 2001))


# -------------------------------------------------------------------- in words


def test_every_condition_of_a_log_is_explained() -> None:
    store = Store.open(memory().url, CONFIG)
    owner = new_log(store)
    owner.claim()
    commit(owner, 1, 1)
    url = store.url

    def now() -> str:
        return explain(again(store).view, url)

    assert now() == ""
    told = []
    for state in ("begin", "request", "left"):
        say(again(store), state)
        told.append(now())
        assert THERE in told[-1]
        assert "--resume` or --rollback" in told[-1]
    assert len(set(told)) == 3
    say(again(store), "cancelled")
    assert now() == ""
    say(again(store), "sealed")
    assert "nobody is known to train" in now()
    say(again(store), "done")
    assert now() == f"moved to {THERE}, where it trains: no job may write here"
    say(again(store), "handover")
    assert f"gpumove run {url}" in now()
    job = again(store)
    job.claim()
    assert now() == ""
    say(job, "done")
    assert now() == f"the run was moved here from {THERE}"
    again(store).claim(follows=THERE)
    assert now().startswith(f"replica of {THERE}")
    store.close()


@pytest.fixture
def stage(recorded: Place) -> Iterator[Stage]:
    made = Stage(recorded, deaf=True)
    yield made
    made.close()


FORCED = ("--force", "--leave-timeout", "0", "--no-wait")


def test_the_command_line(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = stage.source.url, stage.target.url
    assert main(["move", here, "--to", there, "--resume"]) == 2
    assert "no move" in capsys.readouterr().err
    assert main(["move", here, "--to", there, *FORCED]) == 0
    shown, told = capsys.readouterr()
    assert "handover" in shown
    assert "nobody has trained at the target yet" in shown
    assert "sealed" in told
    assert main(["ls", here]) == 0
    assert f"moved to {there}" in capsys.readouterr().out
    assert main(["show", there]) == 0
    assert f"gpumove run {there}" in capsys.readouterr().out
    assert main(["move", here, "--to", there]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["move", here, "--to", there, "--rollback", "--json", *FORCED]) == 0
    text = capsys.readouterr().out
    events = [json.loads(line) for line in text.splitlines() if line.startswith('{"at"')]
    assert [e["state"] for e in events] == ["begin", "sealed", "handover"]
    report = json.loads(text[text.index("{\n") :])
    assert (report["source"], report["target"]) == (there, here)
    assert stage.claimable() == (True, False)


@pytest.mark.parametrize(
    "wrong",
    [("--max-blackout", "soon"), ("--slow", "1s"), ("--leave-timeout", "-1"), ("--in-flight", "0"), ("--limit", "0")],
)
def test_wrong_options_are_refused_before_anything_is_done(
    stage: Stage, wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["move", stage.source.url, "--to", stage.target.url, *wrong]) == 2
    assert wrong[1] in capsys.readouterr().err or wrong[0] == "--slow"
    assert stage.look(stage.source).move is None


def test_a_target_in_a_region_that_is_not_allowed_is_refused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUMOVE_ALLOWED_REGIONS", "eu-*")
    go = ["move", stage.source.url, "--to", stage.target.url, *FORCED]
    for more in ((), ("--to-region", "us-east-1")):
        assert main([*go, *more]) == 2
        assert "eu-*" in capsys.readouterr().err
        assert stage.look(stage.source).move is None
    assert main([*go, "--to-region", "eu-central-1"]) == 0


# -------------------------------------------------------------------- the job's side


def until(what: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


class Rank0:
    """A job's log and departure, with the thread that watches the log."""

    def __init__(self, store: Store) -> None:
        self.took = [1.5]
        self.log = again(store) if store.exists("format.json") else new_log(store)
        self.log.claim()
        self.departure = Departure(grace_s=5.0, peer_s=60.0)
        self.requests = Requests(self.log, self.departure, patience_s=60.0, took=self.took)
        self.requests.open()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr("gpumove.leave.requests._POLL_S", 0.05)
    opened = Store.open(memory().url, CONFIG)
    yield opened
    opened.close()


def test_a_job_hears_answers_and_is_asked(store: Store) -> None:
    job, tool = Rank0(store), again(store)
    say(tool, "begin", facts={"idle": True})
    until(lambda: again(store).view.move.facts == {"job": {"save_s": 1.5, "sight_s": 0.0}})  # type: ignore[union-attr]
    job.took += [0.2, 0.3]
    until(lambda: again(store).view.move.facts == {"job": {"save_s": 0.3, "sight_s": 0.0}})  # type: ignore[union-attr]
    head = again(store).view.head
    time.sleep(0.3)
    assert again(store).view.head == head, "what is no news is not told"
    tool.follow()
    say(tool, "begin", facts={"job": {"save_s": 0.3}, "every_step": True, "slow_s": 0.1})
    until(lambda: job.requests.asked.every_step)
    assert (job.requests.asked.slow_s, job.requests.asked.thrift) == (0.1, 2)
    assert job.departure.notice is None
    say(tool, "request", save=False)
    until(lambda: job.departure.notice is not None)
    assert not job.requests.saves
    assert not job.requests.asked.every_step
    notice = job.departure.notice
    assert notice is not None
    assert (notice.source, notice.detail) == (MOVE, f"to {THERE}")
    assert 50 < job.departure.left_s(margin=0.0) <= 60, "nobody takes the machine: the grace period does not count"
    assert answer(job.log, 7, Outcome(True, 7, 0), stopped_at=3.0, seconds=5)
    tool.follow()
    left = tool.view.move
    assert left is not None
    assert (left.state, left.epoch) == ("left", 1)
    assert left.facts == {"step": 7, "durable": True, "newest": 7, "stopped_at": 3.0}
    assert not answer(job.log, 7, Outcome(True, 7, 0), stopped_at=3.0, seconds=5), "said once"
    job.requests.close()


def test_wishes_that_nobody_repeats_are_forgotten_and_saves_are_not_held_back_for_long(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumove.leave.requests.WISH_S", 1.5)
    job, tool = Rank0(store), again(store)
    asked = job.requests.asked

    def wish() -> None:
        tool.follow()
        say(tool, "begin", facts={"job": {"save_s": 1.5}, "hold": True})
        time.sleep(0.1)

    began = time.monotonic()
    wish()
    until(lambda: asked.hold)
    while asked.hold:
        wish()
        assert time.monotonic() - began < 20
    assert time.monotonic() - began > 1.4
    assert asked.under_way, "that was repeated"
    until(lambda: not asked.under_way)
    job.requests.close()


def test_a_request_that_was_withdrawn_or_was_for_an_earlier_start_is_none(store: Store) -> None:
    Rank0(store).requests.close()
    tool = again(store)
    say(tool, "request")
    second = Rank0(store)
    time.sleep(0.3)
    assert second.departure.notice is None
    tool.follow()
    assert standing(tool.view, 2) is None
    second.requests.close()
    say(tool, "request")
    say(tool, "cancelled")
    assert not answer(second.log, 7, Outcome(True, 7, 0), stopped_at=3.0, seconds=5)
    second.requests.open()
    time.sleep(0.3)
    assert second.departure.notice is None
    second.requests.close()


def test_the_first_step_after_a_handover_is_told_once(store: Store) -> None:
    replicator = new_log(store)
    replicator.claim(follows=THERE)
    commit(replicator, 5, 1)
    stopped = time.time() - 3
    say(again(store), "handover", facts={"stopped_at": stopped, "forced": True})
    job = Rank0(store)
    job.departure.step = 5  # what restore() tells
    time.sleep(2.0)
    assert again(store).view.move.state == "handover"  # type: ignore[union-attr]
    job.departure.step = 6
    until(lambda: again(store).view.move.state == "done")  # type: ignore[union-attr]
    facts = again(store).view.move.facts  # type: ignore[union-attr]
    assert facts["step"] == 6
    assert facts["forced"] is True
    assert 3 < facts["blackout_s"] < facts["at"] - stopped - 1.0, "over as soon as the next step could be begun"
    head = again(store).view.head
    job.departure.step = 7
    time.sleep(0.2)
    job.requests.close()
    assert again(store).view.head == head


def test_a_job_that_ends_at_once_still_tells_that_it_has_arrived(store: Store) -> None:
    replicator = new_log(store)
    replicator.claim(follows=THERE)
    commit(replicator, 5, 1)
    say(again(store), "handover")
    job = Rank0(store)
    job.departure.step = 6
    job.requests.close()
    assert again(store).view.move.state == "done"  # type: ignore[union-attr]


def test_a_store_that_fails_costs_only_the_request(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    job = Rank0(store)
    store.close()
    until(lambda: "is not seen meanwhile" in caplog.text)
    assert job.departure.notice is None
    job.requests.close()


def test_what_a_save_takes_as_the_job_leaves_is_less_than_beside_long_steps() -> None:
    """Beside the training a save waits to see the training thread; as the job leaves it is there."""
    model = torch.nn.Linear(512, 512)
    optimizer = torch.optim.AdamW(model.parameters())
    with gpumove.Checkpointer(memory().url, model=model, optimizer=optimizer, every_steps=1) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            model(torch.ones(1, 512)).sum().backward()
            optimizer.step()
            ckpt.step(step)
            time.sleep(1.8)
        assert ckpt.last is not None
        ckpt.last.wait(30)
        requests = ckpt._way_out.requests
        waited, took = list(ckpt._runner.sights), list(ckpt._runner.took)
        assert max(waited) > 0.8
        assert max(took) < 0.8
        assert requests.save_s == statistics.median(took)
        assert requests.sight_s == statistics.median(waited)


# -------------------------------------------------------------------- exit codes


def word(state: str, source: str, *, durable: bool = True, code: str = "") -> Word:
    outcome = Outcome(durable, 9, 0 if durable else 4) if state == "left" else None
    error = "FencedError: it was moved" if code else None
    return Word(pid=1, state=state, outcome=outcome, source=source, error=error, exit_code=40, code=code)  # type: ignore[arg-type]


def test_a_job_that_was_moved_ends_with_77() -> None:
    for durable, words in ((True, "durable: step 9"), (False, "not durable: resumes from step 9, 4 steps lost")):
        verdict = judge(0, [word("left", MOVE, durable=durable)], asked=False)
        assert (verdict.exit_code, verdict.text) == (MOVED, f"moved: do not start it again here ({words})")
    fenced = judge(1, [word("failed", "", code="fenced.moved")], asked=False)
    assert fenced.exit_code == MOVED == 77
    assert judge(1, [word("failed", "", code="fenced")], asked=False).exit_code == FencedError.exit_code
    assert judge(0, [word("left", "aws")], asked=True).exit_code == 75


def test_a_job_that_left_for_a_move_that_was_withdrawn_is_to_be_started_again() -> None:
    place = memory()
    with place.open() as store:
        owner = new_log(store)
        owner.claim()
        progress = Progress(place.url, CONFIG, {})
        for state, stays in (("request", False), ("left", False), ("cancelled", True), ("sealed", False)):
            say(again(store), state)
            assert progress.stays(10.0) is stays
    assert Progress(memory().url, CONFIG, {}).stays(10.0) is False
    for durable, code in ((True, 75), (False, 76)):
        verdict = stayed(Outcome(durable, 9, 0 if durable else 4))
        assert verdict.exit_code == code
        assert "withdrawn" in verdict.text


def test_words_tell_the_error_code() -> None:
    said = msgspec.json.decode(msgspec.json.encode(word("failed", "", code="fenced.moved")), type=Word)
    assert said.code == "fenced.moved"


def test_a_checkpoint_is_needed(stage: Stage) -> None:
    empty = memory()
    with empty.open() as store:
        new_log(store)
    stage.source = empty
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        stage.move()


def test_the_log_of_a_fenced_owner_tells_that_it_was_moved() -> None:
    with memory().open() as store:
        owner = new_log(store)
        owner.claim()
        say(Log(store) if not store.exists("format.json") else again(store), "sealed")
        with pytest.raises(FencedError) as caught:
            commit(owner, 1, 1)
        assert caught.value.code == "fenced.moved"


@pytest.mark.parametrize(
    ("save_s", "send_s", "packs", "adds"),
    [
        (10.0, 60.0, 1, 10.0),  # one piece: sent when all of it is there
        (10.0, 60.0, 20, 0.5),  # the first of twenty is there after half a second, and the link is busy from then on
        (10.0, 2.0, 10, 8.2),  # a fast link waits for the save, and sends the last piece after it
        (10.0, 0.0, 4, 10.0),
        (10.0, 60.0, 0, 10.0),
    ],
)
def test_what_leaving_adds_to_the_last_bytes_time(save_s: float, send_s: float, packs: int, adds: float) -> None:
    assert leave_s(save_s, send_s, packs) == pytest.approx(adds)


def test_a_save_in_many_packs_is_sent_where_one_in_a_single_pack_is_not() -> None:
    line = commits((90.0, 0), (100.0, 10))
    in_one = ship_or_replay(line, now=104.0, rate_bytes_s=100.0, delta_bytes=1000.0, save_s=8.0)
    in_many = ship_or_replay(line, now=104.0, rate_bytes_s=100.0, delta_bytes=1000.0, save_s=8.0, packs=16)
    assert (in_one.save, in_many.save) == (False, True)
    assert (in_one.send_s, in_many.send_s) == (18.0, pytest.approx(10.5))
