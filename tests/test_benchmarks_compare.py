"""The comparison's own logic: what is run, what is made of it, and that a wrong restore or a failure is seen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare import launch, report, targets, trial
from benchmarks.compare.figures import Table
from benchmarks.compare.options import parse
from benchmarks.compare.peers import PEERS, Peer
from benchmarks.compare.peers.contract import Wait
from benchmarks.compare.picture import picture
from benchmarks.compare.plan import DISK, S3_MOST_MB, Section, Trial, each_once, sections, size_mb, trials
from benchmarks.compare.workloads import SIZES_MB, make_job
from benchmarks.compare.world import World
from benchmarks.places import Place

W1 = Section("W1", "file")


# ---------------------------------------------------------------- what is run


def test_every_peer_takes_part_in_the_first_round_and_later_only_those_that_targets_refer_to() -> None:
    found = sections(["W1", "W2", "W3"], ["file", "s3"], [1, 4])
    plan = list(trials(3, found, list(PEERS), targets.needed))
    first = {(t.section, t.peer) for t in plan if t.round == 0}
    assert {peer for _, peer in first} == {DISK, *PEERS}
    assert {p for s, p in first if s.ranks == 4} == {DISK, "gpumove", "gpumove-raw", "dcp.save", "dcp.async_save"}
    later = {(t.section, t.peer) for t in plan if t.round == 2}
    assert later < first
    for target in targets.TARGETS:
        section = Section(target.workload, target.store)
        wanted = {(section, peer) for peer in (*target.ours, *target.others) if target.store in PEERS.get(peer).stores}
        assert wanted <= later


def test_in_every_round_somebody_else_comes_first() -> None:
    plan = list(trials(3, [W1], ["gpumove", "dcp.save"], lambda _: {DISK, "gpumove", "dcp.save"}))
    assert [next(t.peer for t in plan if t.round == n) for n in range(3)] == [DISK, "gpumove", "dcp.save"]
    assert len(plan) == 9


def test_a_quick_run_has_every_peer_once_and_gpumove_everywhere() -> None:
    found = sections(["W1", "W2", "W3"], ["file", "s3"], [1, 2])
    plan = list(each_once(found, list(PEERS)))
    assert {t.peer for t in plan} == set(PEERS)
    assert [t.section for t in plan if t.peer == "gpumove"] == found
    assert sum(t.peer == "orbax" for t in plan) == 1


def test_sizes_shrink_together_and_s3_stays_small() -> None:
    assert size_mb(Section("W1", "s3"), SIZES_MB["W1"]) == S3_MOST_MB
    assert size_mb(Section("W3", "file"), SIZES_MB["W1"] / 10) == pytest.approx(SIZES_MB["W3"] / 10)


def test_options_take_patterns_and_refuse_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(["--peers", "gpumove*,dcp.save", "--ranks", "none", "--workloads", "W3"])
    assert options.peers == ["gpumove", "gpumove-raw", "dcp.save"]
    assert options.ranks == []
    for wrong in (["--peers", "dcp.sav"], ["--workloads", "W4"], ["--ranks", "1,x"], ["--saves", "1"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "dcp.sav is none of" in capsys.readouterr().err


# ---------------------------------------------------------------- what is made of it


def save_of(stall_s: float, durable_s: float = 1.0, *, lost_s: float = 1.0, stored: int = 1000) -> dict[str, Any]:
    return {
        "stall_s": stall_s, "durable_s": durable_s, "lost_s": lost_s, "stored_bytes": stored, "kept_bytes": 0,
        "peak_over_training_bytes": 0, "own": {"stall_s": stall_s},
    }  # fmt: skip


def sample_of(peer: str, number: int, stall_s: float, *, section: Section = W1, **rest: Any) -> dict[str, Any]:
    saves = [save_of(9.0, 4.0), save_of(stall_s, stored=100), save_of(stall_s, stored=100)]
    save = {"saves": saves, "state_bytes": 1000, "largest_rank_bytes": 1000}
    return {"round": number, **vars(section), "peer": peer, "size_mb": 1500.0, "save": save, **rest}


def met(table: Table, words: str) -> dict[str, bool]:
    return {v.peer: v.met for v in targets.verdicts(table) if words in v.what}


def test_a_ratio_is_taken_within_a_round_and_to_the_best_of_the_others() -> None:
    # Seconds of the second round are ten times those of the first; ratios are not.
    samples = [
        sample_of(peer, n, stall_s * 10**n)
        for n in range(2)
        for peer, stall_s in (("gpumove", 0.03), ("dcp.async_save", 1.0), ("dcp.async_save+cached", 0.05))
    ]
    table = Table(samples)
    assert table.ratios(W1, "gpumove", "stall_s", ("dcp.async_save",)) == pytest.approx([0.03, 0.03])
    assert met(table, "as it comes") == {"gpumove": True}
    assert met(table, "best variant") == {"gpumove": False}


def test_the_first_save_is_told_apart() -> None:
    table = Table([sample_of("gpumove", 0, 0.25)])
    assert table.median(W1, "gpumove", "stall_s") == 0.25
    assert table.median(W1, "gpumove", "first_stall_s") == 9.0
    assert table.median(W1, "gpumove", "later_stored") == 0.1
    assert table.median(W1, "gpumove", "later_durable") == 0.25


def test_many_ranks_are_compared_with_one_and_excused_by_a_slower_disk() -> None:
    def table(four_s: float, disk_s: float) -> Table:
        one, four = Section("W1", "file", 1), Section("W1", "file", 4)
        samples = [sample_of("gpumove", 0, 0.01, section=s) for s in (one, four)]
        samples[0]["save"]["idle_s"], samples[1]["save"]["idle_s"] = 1.0, four_s
        rest = {"round": 0, "peer": DISK, "size_mb": 400.0}
        return Table([*samples, {**rest, **vars(one), "disk_s": 1.0}, {**rest, **vars(four), "disk_s": disk_s}])

    assert met(table(1.0, 1.0), "while training waits") == {"gpumove": True}
    assert met(table(1.5, 1.0), "while training waits") == {"gpumove": False}
    assert met(table(1.5, 2.0), "while training waits") == {"gpumove": True}
    assert met(table(1.5, 0.5), "while training waits") == {"gpumove": False}  # a faster disk demands no more than one


def test_what_failed_or_is_not_installed_is_named(tmp_path: Path) -> None:
    missing = {"round": 0, **vars(W1), "peer": "orbax", "size_mb": 1.0, "error": "not installed"}
    broken = {"round": 0, **vars(W1), "peer": "torchsnapshot", "size_mb": 1.0, "error": "ValueError: no"}
    table = Table([sample_of("gpumove", 0, 0.1), missing, broken])
    assert report.missing(table, W1) == ["orbax: not installed", "torchsnapshot: 1 of 1 failed: ValueError: no"]
    facts = {
        "cores": 2, "processor": "x", "memory_gb": 1, "kernel": "1", "python": "3", "packages": {}, "load_before": 0,
    }  # fmt: skip
    text = report.markdown(table, facts)
    assert "orbax: not installed." in text
    assert "| gpumove | 0.10 s |" in text
    picture(table, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_restore_that_differs_is_a_failure() -> None:
    rows = {"first": {"restore_s": 1.0, "parts": {}, "unequal": 1}}
    found = targets.checks(Table([sample_of("gpumove", 0, 0.1, restore=rows)]))
    assert [v.met for v in found if "bit for bit" in v.what] == [False]


def test_ranks_are_as_slow_as_the_slowest() -> None:
    rows = [{"s": 1.0, "own": {"x": 5}, "steps": [1]}, {"s": 2.0, "own": {"x": 3}, "steps": [2]}]
    assert trial.highest(rows) == {"s": 2.0, "own": {"x": 5}, "steps": [1]}


# ---------------------------------------------------------------- trainings and trials


def test_in_w2_a_tenth_of_the_bytes_changes() -> None:
    job = make_job("W2", 4.0, seed=0, sharded=False)
    job.train_step()
    before = {name: tensor.clone() for name, tensor in job.tensors()}
    job.train_step()
    changed = sum(t.nbytes for name, t in job.tensors() if not torch.equal(t, before[name]))
    assert 0.05 < changed / job.state_bytes < 0.15


def test_w3_has_ten_thousand_tensors_and_all_of_them_change() -> None:
    job = make_job("W3", SIZES_MB["W3"], seed=0, sharded=False)
    job.train_step()
    before = copy.deepcopy(dict(job.tensors()))
    job.train_step()
    assert len(before) == pytest.approx(10_000, abs=20)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in job.tensors())


class Forgetful(Peer):
    """Restores nothing."""

    def save(self) -> Wait:
        raise NotImplementedError

    def restore(self) -> dict[str, float]:
        return {}


def test_a_restore_that_does_nothing_is_noticed(tmp_path: Path) -> None:
    job = make_job("W1", 8.0, seed=0, sharded=False)
    digest, peer = job.digest(), Forgetful(job, Place(tmp_path.as_uri()), World())
    assert trial._one_restore(job, peer, World(), [digest])["unequal"] == 0
    job.scramble()
    assert trial._one_restore(job, peer, World(), [digest])["unequal"] == 1


@pytest.mark.parametrize("section", [W1, Section("W1", "file", 2)], ids=str)
def test_a_trial_in_processes_of_its_own(section: Section, tmp_path: Path) -> None:
    sample = launch.run_trial(Trial(0, section, "gpumove-raw"), 8.0, 2, Place((tmp_path / "run").as_uri()))
    assert sample.get("error") is None
    assert [row["unequal"] for row in sample["restore"].values()] == [0, 0, 0]
    assert len(sample["save"]["digest"]) == max(1, section.ranks)
    assert ("idle_s" in sample["save"]) == bool(section.ranks)
    figures = Table([sample]).summary()[str(section)]["gpumove-raw"]
    assert figures["durable_s"]["median"] > 0
    assert not (tmp_path / "run" / "run").exists()  # what a trial stores is gone with it


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    spec = {"peer": "nobody", "workload": "W1", "ranks": 0, "size_mb": 8.0, "url": tmp_path.as_uri(), "options": {}}
    with pytest.raises(launch.ChildError, match="KeyError: 'nobody'"):
        launch._run_processes({**spec, "kind": "save", "saves": 2}, tmp_path)


def test_the_disk_is_measured_without_leaving_anything(tmp_path: Path) -> None:
    assert launch.write_and_sync(Place(tmp_path.as_uri()), 2, 1_000_000) > 0
    assert not list(tmp_path.iterdir())
