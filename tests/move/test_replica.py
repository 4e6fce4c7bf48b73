"""A replica: what it takes, what it refuses, what it keeps; on stores in memory, where every order can be had."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import gpumove
from gpumove.errors import ConfigError, FencedError, IntegrityError
from gpumove.format import keys
from gpumove.move.copier import Copier
from gpumove.move.replica import Replica
from gpumove.move.rounds import as_source
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.jobs import new_job
from tests.move.runs import SETTINGS, Place, check, memory, read, replicate, train
from tests.move.stage import Stage
from tests.store.faults import FaultyStore


@pytest.fixture(scope="module")
def trained() -> tuple[Place, dict[int, str]]:
    """A run of five checkpoints, which no test changes."""
    place = memory()
    return place, train(place, 5)


def copy_of(place: Place) -> Place:
    """The same bytes under another URL, as a copy with other tools would be."""
    other = memory()
    with place.open() as source, other.open() as target:
        for info in source.list(""):
            target.put(info.key, source.get(info.key))
    return other


def replica(source: Store, target: Store, **more: Any) -> Replica:
    log = Log(source)
    log.open(create=False)
    log.read()
    return Replica(log, Log(target), Copier(source, target, in_flight=2, budget_bytes=1 << 20), **more)


# -------------------------------------------------------------------- what it takes


@pytest.mark.parametrize(
    ("step", "expected"), [(None, [5]), ("latest", [5]), ("all", [1, 2, 3, 4, 5]), (3, [3]), (5, [5])]
)
def test_the_steps_that_were_asked_for(trained: tuple[Place, dict[int, str]], step: Any, expected: list[int]) -> None:
    source, truth = trained
    target = memory()
    done = replicate(source, target, step=step)
    assert (list(done.steps), done.newest, done.problems) == (expected, expected[-1], ())
    check(target, truth, expected)
    with source.log() as there, target.log() as here:
        assert here.run == there.run == done.run
        assert here.view.follows == source.url
        with pytest.raises(FencedError, match="replica of"):
            here.claim()


def test_a_second_time_sends_nothing_and_writes_nothing(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = trained[0], memory()
    first = replicate(source, target)
    before = target.keys()
    again = replicate(source, target)
    assert first.objects > 0
    assert (again.objects, again.nbytes, again.steps, again.newest) == (0, 0, (), 5)
    assert target.keys() == before


def test_only_what_lacks_is_sent(trained: tuple[Place, dict[int, str]]) -> None:
    source, truth = trained
    target = memory()
    replicate(source, target, step=3)
    had = set(target.keys())
    with source.open() as raw, target.open() as inner:
        log = Log(raw)
        log.open(create=False)
        log.read()
        faulty = FaultyStore(inner)
        following = Replica(log, Log(faulty), Copier(raw, faulty, in_flight=2))  # type: ignore[arg-type]
        newest = following.look()
        assert newest is not None
        sent = following.bring(newest)
    puts = [call.split()[1] for call in faulty.trail if call.startswith("put ")]
    assert sent is not None
    assert sent.objects == len(puts) == len(set(puts))
    assert not set(puts) & had
    check(target, truth, [3, 5])


def test_packs_come_before_parts_before_the_manifest_before_the_entry(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = trained[0], memory()
    with source.open() as raw, target.open() as inner:
        faulty = FaultyStore(inner)
        following = replica(raw, faulty)  # type: ignore[arg-type]
        newest = following.look()
        assert newest is not None
        following.bring(newest)
    rooms = [call.split()[1].split("/")[0] for call in faulty.trail if call.split()[0] in ("put", "create")]
    order = [room for number, room in enumerate(rooms) if number == 0 or rooms[number - 1] != room]
    assert order == ["format.json", "log", "packs", "parts", "manifests", "log"]


def test_pins_come_along_and_the_time_of_the_commit(trained: tuple[Place, dict[int, str]]) -> None:
    source = copy_of(trained[0])
    with source.log() as log:
        log.pin(log.view.checkpoints[2], pinned=True)
    target = memory()
    replicate(source, target, step="all")
    with source.log() as there, target.log() as here:
        assert [c.pinned for c in here.view.checkpoints] == [False, False, True, False, False]
        assert [c.time for c in here.view.checkpoints] == [c.time for c in there.view.checkpoints]
        assert [c.attempt for c in here.view.checkpoints] == [c.attempt for c in there.view.checkpoints]


def test_a_claim_at_the_source_makes_the_replicator_claim_again(trained: tuple[Place, dict[int, str]]) -> None:
    source, truth = copy_of(trained[0]), dict(trained[1])
    target = memory()
    with source.open() as raw, target.open() as there:
        following = replica(raw, there)
        newest = following.look()
        assert newest is not None
        following.bring(newest)
        first = following.target.epoch
        truth |= train(source, 7)
        newest = following.look()
        assert newest is not None
        following.bring(newest)
        assert first is not None
        assert following.target.epoch == following.source.view.epoch == first + 1
    check(target, truth, [5, 7])


def test_going_back_at_the_source_is_gone_back_at_the_replica(trained: tuple[Place, dict[int, str]]) -> None:
    source, target, other = copy_of(trained[0]), memory(), memory()
    replicate(source, target, step="all")
    replicate(source, other)
    with source.log() as log:
        log.claim(resumed=log.view.find(3).number)  # type: ignore[union-attr]
    for place in (target, other):  # one has step 3 already, the other one not
        assert replicate(source, place).newest == 3
        assert read(place)[0] == 3
        with place.log() as log:
            assert log.view.find().step == 3  # type: ignore[union-attr]
        assert replicate(source, place).steps == ()
    fresh = memory()
    assert replicate(source, fresh, step="all").steps == (1, 2, 3)  # not what was left behind
    truth = trained[1] | train(source, 4)
    for place in (target, other, fresh):
        assert replicate(source, place).newest == 4
        assert read(place) == (4, truth[4])


# -------------------------------------------------------------------- what it refuses


def own(place: Place) -> None:
    with place.open() as store:
        log = Log(store)
        log.open(create=True)
        log.read()
        log.claim()


def hand_over(place: Place) -> None:
    with place.log() as log:
        log.move("handover", move="ab" * 8, other="memory://elsewhere")


def seal(place: Place) -> None:
    with place.log() as log:
        log.move("sealed", move="ab" * 8, other="memory://elsewhere")


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (hand_over, "config.owned", "is no replica"),
        (seal, "config.sealed", "was moved to memory://elsewhere"),
    ],
)
def test_a_replica_that_is_none_any_more_is_left_alone(
    trained: tuple[Place, dict[int, str]], change: Callable[[Place], None], code: str, text: str
) -> None:
    source, target = trained[0], memory()
    replicate(source, target, step=3)
    change(target)
    before = target.keys()
    with pytest.raises(ConfigError, match=text) as caught:
        replicate(source, target)
    assert caught.value.code == code
    assert target.keys() == before


def test_another_run_and_the_run_itself_elsewhere_are_left_alone(trained: tuple[Place, dict[int, str]]) -> None:
    source, other = trained[0], memory()
    own(other)
    with pytest.raises(ConfigError, match="holds another run") as caught:
        replicate(source, other)
    assert caught.value.code == "config.other_run"
    with pytest.raises(ConfigError) as caught:
        replicate(source, copy_of(source))
    assert caught.value.code == "config.owned"


def test_a_replica_that_went_on_by_itself_is_a_fork(trained: tuple[Place, dict[int, str]]) -> None:
    """Two replicas of one run, one of which was fed by a copy of the run that trained on."""
    source, copied, target = trained[0], copy_of(trained[0]), memory()
    train(copied, 6)
    replicate(copied, target)
    with pytest.raises(ConfigError, match=r"step 6 .* never had") as caught:
        replicate(source, target)
    assert caught.value.code == "config.fork"
    train(copied, 7)
    forked = copy_of(source)
    train(forked, 7)  # the same attempts, and other manifests
    with pytest.raises(ConfigError, match="never had"):
        replicate(forked, target)


def test_a_rollback_may_go_into_a_log_that_is_sealed_towards_it(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = copy_of(trained[0]), memory()
    replicate(source, target)
    with source.log() as log:
        log.move("sealed", move="ab" * 8, other=target.url)
    hand_over(target)
    truth = trained[1] | train(target, 7)
    assert replicate(target, source).newest == 7
    check(source, truth, [1, 2, 3, 4, 5, 7])
    with source.log() as log:
        assert log.view.follows == target.url


def test_an_entry_that_cannot_be_read_may_have_been_a_handover(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = trained[0], memory()
    replicate(source, target, step="all")
    with target.open() as store:
        store.put(keys.entry_key(4), b"rot")
    train(more := copy_of(source), 6)
    with pytest.raises(ConfigError, match="entry 4 cannot be read") as caught:
        replicate(more, target)
    assert caught.value.code == "config.broken"
    with target.log() as log:
        collect(log, Retention())
    assert replicate(more, target).newest == 6


def test_an_older_step_is_not_put_behind_newer_ones(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = trained[0], memory()
    replicate(source, target)
    with pytest.raises(ConfigError, match="newer checkpoints than step 3") as caught:
        replicate(source, target, step=3)
    assert caught.value.code == "config.older"
    assert replicate(source, target, step="all").steps == ()


def test_of_two_replicators_the_older_one_is_fenced(trained: tuple[Place, dict[int, str]]) -> None:
    source, truth = copy_of(trained[0]), dict(trained[1])
    target = memory()
    with source.open() as raw, target.open() as there:
        first, second = replica(raw, there), replica(raw, there)
        newest = first.look()
        assert newest is not None
        first.bring(newest)
        truth |= train(source, 6)
        newest = second.look()
        assert newest is not None
        second.bring(newest)
        with pytest.raises(FencedError):
            first.look()
        with pytest.raises(FencedError):
            first.bring(newest)
    check(target, truth, [5, 6])


def test_a_handover_fences_the_replicator_in_the_middle_of_a_copy(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = trained[0], memory()
    replicate(source, target, step=3)
    with source.open() as raw, target.open() as there:
        following = replica(raw, there)
        newest = following.look()
        assert newest is not None
        following._own(newest)
        hand_over(target)
        with pytest.raises(FencedError):
            following.bring(newest)
    assert target.steps() == [3]


@pytest.mark.parametrize("into", ["", "/below"])
def test_a_place_is_not_copied_into_itself(trained: tuple[Place, dict[int, str]], into: str) -> None:
    with pytest.raises(ConfigError, match="one place"):
        replicate(trained[0], Place(trained[0].url + into))


def test_there_must_be_something_to_copy() -> None:
    with pytest.raises(ConfigError, match="nothing at memory://"):
        replicate(memory(), memory())
    with pytest.raises(ConfigError, match="no gpumove run"):
        replicate(memory(), memory(), follow=True)


@pytest.mark.parametrize(
    "wrong", [{"step": "newest"}, {"step": 1.5}, {"limit": 0}, {"limit": float("inf")}, {"in_flight": 0}]
)
def test_wrong_calls_are_refused_before_anything_is_opened(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        gpumove.replicate("nonsense://", "nonsense://", **wrong)


# -------------------------------------------------------------------- damage and loss


class Hooked(FaultyStore):
    """A store that does something else just before it reads the first pack."""

    def __init__(self, inner: Store, hook: Callable[[], None]) -> None:
        super().__init__(inner)
        self._hook: Callable[[], None] | None = hook

    def get_ranges(self, key: str, *rest: Any) -> Any:
        hook, self._hook = self._hook, None
        if hook:
            hook()
        return super().get_ranges(key, *rest)


def test_a_collection_at_the_source_in_the_middle_of_a_copy(trained: tuple[Place, dict[int, str]]) -> None:
    """What is being copied vanishes: the newest one is copied instead."""
    source, target = copy_of(trained[0]), memory()
    truth = dict(trained[1])

    def pass_by() -> None:
        truth.update(train(source, 7, delta=False, codec="raw"))
        with source.log() as log:
            collect(log, Retention(1))

    with source.open() as raw, target.open() as there:
        following = replica(Hooked(raw, pass_by), there)  # type: ignore[arg-type]
        newest = following.look()
        assert newest is not None
        assert following.bring(newest) is None
        newest = following.look()
        assert newest is not None
        assert following.bring(newest) is not None
    check(target, truth, [7])


def spoil(place: Place, key: str) -> None:
    """A flipped bit at rest."""
    with place.open() as store:
        data = bytearray(store.get(key))
        data[len(data) // 2] ^= 4
        store.put(key, bytes(data))


def of_attempt(place: Place, room: str, number: int) -> str:
    """The first object of a room that belongs to the checkpoint of this number."""
    with place.log() as log:
        attempt = log.view.checkpoints[number].attempt
    return next(key for key in place.keys(room) if keys.attempt_of(key) == attempt)


@pytest.mark.parametrize("room", ["packs/", "parts/", "manifests/"])
def test_damage_at_the_source_is_found_named_and_not_passed_on(
    trained: tuple[Place, dict[int, str]], room: str
) -> None:
    source, target = copy_of(trained[0]), memory()
    key = of_attempt(source, room, -1)
    spoil(source, key)
    done = replicate(source, target)
    assert (done.steps, done.newest) == ((4,), 4)
    assert len(done.problems) == 1
    assert f"{source.url}/{key} is damaged" in done.problems[0]
    check(target, trained[1], [4])
    with pytest.raises(IntegrityError, match="is damaged"):
        replicate(source, memory(), step=5)


@pytest.mark.parametrize("room", ["packs/", "parts/", "manifests/"])
@pytest.mark.parametrize("how", ["gone", "cut", "rotten"])
def test_damage_at_the_target_is_mended(trained: tuple[Place, dict[int, str]], room: str, how: str) -> None:
    source, target = trained[0], memory()
    replicate(source, target, step="all")
    key = of_attempt(target, room, -1)
    with target.open() as store:
        if how == "gone":
            store.delete([key])
        elif how == "cut":
            store.put(key, store.get(key)[:-1])
    if how == "rotten":
        spoil(target, key)
    done = replicate(source, target, deep=True)
    assert (done.objects, done.steps, done.problems) == (1, (), ())
    check(target, trained[1], [1, 2, 3, 4, 5])
    assert replicate(source, target, deep=True).objects == 0


def test_what_is_damaged_at_both_ends_is_said(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = copy_of(trained[0]), memory()
    replicate(source, target)
    key = of_attempt(source, "packs/", -1)
    spoil(source, key)
    spoil(target, key)
    done = replicate(source, target, deep=True)
    assert done.objects == 0
    assert len(done.problems) == 1
    assert key in done.problems[0]


def test_an_older_replicator_that_still_deletes_does_no_harm(trained: tuple[Place, dict[int, str]]) -> None:
    """What was only seen in a listing is looked at again before the first commit."""
    source, target = trained[0], memory()
    with source.open() as raw, target.open() as there:
        broken_off = replica(raw, there)
        newest = broken_off.look()
        assert newest is not None
        lacking = broken_off.missing(newest)
        broken_off._own(newest)
        broken_off.copier.copy(o for o in lacking[:-3] if o.key.startswith("packs/"))
        second = replica(raw, there)
        newest = second.look()
        assert newest is not None
        assert 0 < len(second.missing(newest)) < len(lacking)
        there.delete([lacking[0].key])
        second.bring(newest)
    check(target, trained[1], [5])


# -------------------------------------------------------------------- retention


def test_what_the_source_drops_the_replica_drops_and_all_that_stays_is_whole(
    trained: tuple[Place, dict[int, str]],
) -> None:
    source, target = copy_of(trained[0]), memory()
    with source.open() as raw, target.open() as there:
        following = replica(raw, there)
        following.look()
        for checkpoint in following.behind():
            following.bring(checkpoint)
            assert following.retain(as_source(following.source)) is None
        with source.log() as log:
            collect(log, Retention(2))
        following.look()
        done = following.retain(as_source(following.source))
        assert done is not None
        assert done.doomed
    check(target, trained[1], [4, 5])
    assert not set(done.doomed) & set(target.keys())


def test_a_retention_of_its_own(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = trained[0], memory()
    replicate(source, target, step="all", keep_last=1, keep_every=2)
    check(target, trained[1], [2, 4, 5])


def test_a_pinned_checkpoint_stays_at_the_replica(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = copy_of(trained[0]), memory()
    replicate(source, target, step="all")
    with target.log() as log:
        log.pin(log.view.checkpoints[0], pinned=True)
    with source.log() as log:
        collect(log, Retention(1))
    train(source, 6)
    replicate(source, target, keep_last=2)
    assert target.steps() == [1, 5, 6]


def test_a_job_that_takes_over_a_replica_goes_on_exactly(trained: tuple[Place, dict[int, str]]) -> None:
    source, target = trained[0], memory()
    replicate(source, target)
    hand_over(target)
    resumed = new_job()
    with gpumove.Checkpointer(target.url, **resumed.parts(), **SETTINGS) as ckpt:
        assert ckpt.restore() == 5
    straight = memory()
    assert train(target, 7)[7] == train(straight, 7)[7]


# -------------------------------------------------------------------- what is not committed yet


def packs_of(place: Place, serial: int) -> set[str]:
    return {key for key in place.keys("packs") if key.startswith(f"packs/{keys.attempt_name(1, serial)}/")}


@contextlib.contextmanager
def begun(recorded: Place) -> Iterator[tuple[Stage, Store, Store, Replica]]:
    """A replica that has what was committed so far; the source has also the packs of saves that were not."""
    stage = Stage(recorded)
    with stage.source.open() as raw, stage.target.open() as there:
        following = replica(raw, there)
        newest = following.look()
        assert newest is not None
        assert not following.bring_early(), "the target is nobody's yet"
        following.bring(newest)
        yield stage, raw, there, following
    stage.close()


def test_what_a_save_has_written_is_copied_before_it_is_committed(recorded: Place) -> None:
    """The store has the packs of all saves; the log has two of them."""
    with begun(recorded) as (stage, _, there, following):
        assert following.bring_early()
        assert packs_of(stage.target, 3) == packs_of(stage.source, 3) != set()
        assert packs_of(stage.target, 4) == packs_of(stage.source, 4) != set()
        assert not packs_of(stage.target, 5)
        assert not following.bring_early(), "all of it is there"
        assert stage.steps(stage.target) == [2], "nothing is committed that the source has not committed"
        stage.commit()
        newest = following.look()
        assert newest is not None
        assert {o.key.split("/")[0] for o in following.missing(newest)} == {"parts", "manifests"}
        sent = following.bring(newest)
        assert sent is not None
        assert sent.nbytes > sum(there.exists(key).nbytes for key in packs_of(stage.target, 3))  # type: ignore[union-attr]
        assert read(stage.target)[0] == 3


def test_a_save_that_is_damaged_or_never_committed_is_no_error_before_its_commit(recorded: Place) -> None:
    with begun(recorded) as (stage, raw, _, following):
        broken = min(packs_of(stage.source, 3))
        data = bytearray(raw.get(broken))
        data[-1] ^= 1
        raw.delete([broken])
        raw.put(broken, bytes(data))
        assert not following.bring_early()
        assert broken not in stage.target.keys("packs")
        stage.commit()
        newest = following.look()
        assert newest is not None
        with pytest.raises(IntegrityError, match="damaged"):
            following.bring(newest)


def test_an_older_epochs_replica_copies_nothing_early(recorded: Place) -> None:
    """Whoever is to write at the target must have claimed it for the source's owner of now."""
    with begun(recorded) as (stage, _, _, following):
        stage.job.claim()
        following.look()
        assert not following.bring_early()
        assert not packs_of(stage.target, 3)
