"""A job that is only certified: it finds what to train again, compares it, and touches nothing."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

import gpumove
from gpumove import ConfigError, IntegrityError, ParityError
from gpumove.config import Config
from gpumove.format.manifest import Manifest, TraceRow
from gpumove.inspection.run import open_run
from gpumove.parity import followed
from gpumove.parity.followed import find_followed
from gpumove.store import records
from gpumove.store.objects import Store
from tests.jobs import new_job
from tests.parity.jobs import BROKEN, certify, contents, loop, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 40, with checkpoints at 10, 20, 30 and 40."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, 40)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_same_job_is_bitwise_and_nothing_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)

    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a certificate was about to write")

    with monkeypatch.context() as patch:
        for name in ("put", "create", "delete"):
            patch.setattr(Store, name, refused)
        found = certify(run)
    assert (found.verdict, found.cause) == ("bitwise", "")
    assert (found.setting.step, found.steps[0].step, found.steps[-1].step) == (20, 21, 40)
    assert found.setting.same_devices
    assert contents(run) == before
    assert train(run, 45) == 40, "and the run is as it was"


@pytest.mark.parametrize("cause", BROKEN)
def test_a_resume_that_is_broken_is_caught_with_its_cause(tmp_path: Path, cause: str) -> None:
    train(tmp_path, 8, every=4)  # in the warm-up: later the learning rate is the same at every step
    found = certify(tmp_path, 4, BROKEN[cause])
    assert (found.verdict, found.cause) == ("different", cause), found.why
    assert found.first is not None
    assert found.first.step == (6 if cause == "optimizer" else 5)


def test_it_can_be_had_of_a_run_that_trains_elsewhere_meanwhile(run: Path) -> None:
    job = new_job()
    with gpumove.Checkpointer(str(run), **job.parts(), every_s=None) as ckpt:
        step = ckpt.restore()
        assert certify(run, 5).verdict == "bitwise"
        ckpt.save(loop(job, ckpt, step, 45)).wait()  # the owner still is


def test_it_can_be_had_of_a_replica_that_nobody_may_claim(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    gpumove.replicate(str(run), str(copy), step="all")
    before = contents(copy)
    assert certify(copy, 10).verdict == "bitwise"
    assert contents(copy) == before


def test_as_many_steps_as_are_recorded_are_compared_and_that_is_said(run: Path) -> None:
    found = certify(run, 1000)
    assert (found.setting.step, len(found.steps), found.verdict) == (10, 30, "bitwise")
    assert found.why.endswith("(no more than 30 of the 1000 steps asked for were recorded)")
    assert certify(run, 7).setting.step == 30, "the newest that has enough"


def test_a_script_that_goes_on_is_stopped_and_one_that_ends_early_is_judged_by_what_it_did(run: Path) -> None:
    job = new_job()
    with gpumove.Checkpointer(str(run), **job.parts(), every_s=None, certify=3) as ckpt:
        step = ckpt.restore()
        with pytest.raises(ConfigError, match="only certified, up to step 33"):
            loop(job, ckpt, step, 50, heed=False)
    assert ckpt.certificate is not None
    assert ckpt.certificate.verdict == "bitwise"
    job = new_job()
    with gpumove.Checkpointer(str(run), **job.parts(), every_s=None, certify=10) as ckpt:
        loop(job, ckpt, ckpt.restore(), 34)
    assert ckpt.certificate.why.endswith("(only 4 of 10 recorded steps were trained again)")
    with gpumove.Checkpointer(str(run), **new_job().parts(), every_s=None, certify=10) as ckpt:
        ckpt.restore()
    assert (ckpt.certificate.verdict, ckpt.certificate.why[:14]) == ("unknown", "no step that w")


def test_a_save_says_what_it_is_and_a_job_without_restore_cannot_begin(run: Path) -> None:
    before, parts = contents(run), new_job().parts()
    with gpumove.Checkpointer(str(run), **parts, every_s=None, certify=5) as ckpt:
        for call in (lambda: ckpt.step(1, loss=1.0), lambda: ckpt.save(1)):
            with pytest.raises(ConfigError, match="begins with restore"):
                call()
        step = ckpt.restore()
        handle = ckpt.save(step)
        assert repr(handle) == f"SaveHandle(step={step}, not saved: the job is only certified)"
        assert (handle.staged, handle.finished, handle.error, handle.wait().step) == (True, True, None, step)
        handle.wait_staged()
    assert contents(run) == before


def test_the_environment_says_it_last(run: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GPUMOVE_CERTIFY", "4")
    before, job = contents(run), new_job()
    with gpumove.Checkpointer(str(run), **job.parts(), config=Config(every_steps=1), certify=0) as ckpt:
        assert loop(job, ckpt, ckpt.restore(), 50) == 34
    assert contents(run) == before


def test_what_cannot_be_certified_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run at"):
        certify(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    train(tmp_path / "one", 10)
    with pytest.raises(ParityError, match="no checkpoint that recorded steps follow") as caught:
        certify(tmp_path / "one")
    assert caught.value.code == "parity.unknown"
    with gpumove.Checkpointer(str(tmp_path / "empty"), **new_job().parts()) as ckpt:
        ckpt.restore()
    with pytest.raises(ConfigError, match="has no sound checkpoint"):
        certify(tmp_path / "empty")
    for wrong in ({"certify": -1}, {"certify": True}, {"certify_steps": 1.5}, {"certify_tolerance": 0.0}):
        with pytest.raises(ConfigError, match="certify"):
            Config(**wrong)


def test_a_run_that_recorded_no_losses_is_unknown(tmp_path: Path) -> None:
    job = new_job()
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), every_s=None) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3, 4):
            ckpt.step(step)
            ckpt.save(step).wait()
    assert certify(tmp_path, 2).cause == "scheduler", "nothing was trained, and no rate changed"
    parts = {k: v for k, v in new_job().parts().items() if k == "model"}
    with gpumove.Checkpointer(str(tmp_path), **parts, every_s=None, certify=2) as ckpt:
        step = ckpt.restore(strict=False)
        while not ckpt.step(step := step + 1):
            pass
    assert ckpt.certificate is not None
    assert ckpt.certificate.verdict == "unknown"
    assert "the run did not record a loss or a gradient norm" in ckpt.certificate.why


def test_a_damaged_checkpoint_is_skipped_and_so_is_a_manifest_that_cannot_be_read(run: Path, caplog: Any) -> None:
    with open_run(str(run)) as log:
        at = {c.step: c for c in log.read().checkpoints}
    for pack in (run / "packs" / at[30].attempt).iterdir():
        os.truncate(pack, 10)
    with caplog.at_level(logging.WARNING):
        assert certify(run, 10).setting.step == 20
    assert "step 30 is damaged and is skipped" in caplog.text
    (run / at[30].manifest_key).write_bytes(b"rubbish")
    found = certify(run, 10)
    assert (found.setting.step, len(found.steps)) == (10, 10)
    for folder in (run / "packs").iterdir():
        for pack in folder.iterdir():
            pack.unlink()
    with pytest.raises((ParityError, ConfigError, IntegrityError)):
        certify(run, 10)


# -------------------------------------------------------------------- which checkpoint


def chosen(run: Path, steps: int, **options: Any) -> tuple[int, list[int]]:
    with open_run(str(run)) as log:
        found = find_followed(log, steps, **options)
    return found.checkpoint.step, [row.step for row in found.rows]


def test_only_the_same_line_of_descent_counts(run: Path) -> None:
    assert chosen(run, 10) == (30, list(range(31, 41)))
    assert chosen(run, 3, step=10) == (10, [11, 12, 13])
    with open_run(str(run)) as log, pytest.raises(IntegrityError, match="no sound checkpoint of step 10"):
        find_followed(log, 3, step=10, without=[c.number for c in log.read().checkpoints])
    job = new_job()
    with gpumove.Checkpointer(str(run), **job.parts(), every_s=None) as ckpt:
        step = ckpt.restore(step=20)  # 30 and 40 are another line from here on
        ckpt.save(loop(job, ckpt, step, 35)).wait()
    assert chosen(run, 10) == (20, list(range(21, 31))), "35 does not follow 30, although its rows go on from there"
    assert chosen(run, 15) == (20, list(range(21, 36)))
    assert chosen(run, 2, step=30) == (30, [31, 32]), "what was left behind is evidence too, if asked for"
    assert certify(run, 15).verdict == "bitwise"


def test_rows_of_several_lives_are_not_mixed(run: Path) -> None:
    train(run, 50)
    assert chosen(run, 10) == (40, list(range(41, 51)))
    assert chosen(run, 20) == (20, list(range(21, 41))), "41 and later were trained by another process"


def old(monkeypatch: Any, change: Any) -> None:
    """What manifests of the first format had."""
    read = records.read_manifest

    def changed(*arguments: Any) -> Manifest:
        manifest = read(*arguments)
        return msgspec.structs.replace(manifest, **change(manifest))

    monkeypatch.setattr(followed, "read_manifest", changed)


def test_traces_of_two_columns_and_without_a_predecessor_do_within_one_life(run: Path, monkeypatch: Any) -> None:
    rows = lambda m: tuple(TraceRow(row.step, row.loss) for row in m.trace)  # noqa: E731
    old(monkeypatch, lambda m: {"trace": rows(m), "trace_after": "", "fingerprint": {}})
    found = certify(run, 10)
    assert (found.setting.step, found.verdict, found.setting.same_devices) == (30, "bitwise", None)
    assert found.why == "10 steps (31 to 40) gave the same bits: the loss"
    old(monkeypatch, lambda m: {"trace": rows(m)[1:], "trace_after": ""})
    with pytest.raises(ParityError, match="nothing to compare with"):
        chosen(run, 10)


def test_a_trace_that_names_itself_leads_nowhere(run: Path, monkeypatch: Any) -> None:
    old(monkeypatch, lambda m: {"trace_after": m.attempt})
    with pytest.raises(ParityError, match="nothing to compare with"):
        chosen(run, 10)
