"""A trace of a save: valid JSON that names all stages, and that never costs a save."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import gpumove
from gpumove.tracing import Trace
from tests.save.jobs import Plain


def test_every_save_leaves_a_trace_of_all_that_it_did(tmp_path: Path) -> None:
    job = Plain()
    folder = tmp_path / "traces"
    with gpumove.Checkpointer(str(tmp_path / "run"), **job.parts(), every_s=None, trace_dir=str(folder)) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            job.step()
            handle = ckpt.save(step)
            job.step()
            handle.wait(60)
    files = sorted(folder.iterdir())
    assert [f.name[:15] for f in files] == ["step-0000000001", "step-0000000002"]
    events = json.loads(files[1].read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    names = {e["name"] for e in spans}
    assert {"call", "copy", "digest", "code", "pack", "put", "assemble", "put part", "commit"} <= names
    assert all(e["dur"] >= 0 and e["ts"] > 0 for e in spans)
    began = {e["name"]: e["ts"] for e in reversed(spans)}
    assert began["call"] < began["digest"] < began["put"] < began["put part"] < began["commit"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {e["tid"] for e in spans} == set(threads)
    assert any(name.startswith("gpumove-encode") for name in threads.values())


def test_a_trace_that_cannot_be_written_costs_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    job = Plain()
    with (
        caplog.at_level(logging.WARNING, logger="gpumove"),
        gpumove.Checkpointer(str(tmp_path / "run"), **job.parts(), trace_dir=str(tmp_path / "file")) as ckpt,
    ):
        ckpt.restore()
        ckpt.save(1).wait(60)
    assert "trace of step 1 could not be written" in caplog.text
    assert [c.step for c in gpumove.checkpoints(str(tmp_path / "run"))] == [1]


def test_a_trace_that_is_off_keeps_nothing() -> None:
    trace = Trace(on=False)
    with trace.span("a"):
        pass
    trace.add("b", 0.0, 1.0)
    assert trace.seconds() == {}
