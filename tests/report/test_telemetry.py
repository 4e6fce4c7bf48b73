"""Numbers of saves on their way out: for loggers, in a file for Prometheus, and through OpenTelemetry."""

from __future__ import annotations

import gc
import logging
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

import gpumove
from gpumove.telemetry import NUMBERS
from tests.jobs import new_job

SETTINGS: dict[str, Any] = {"every_s": None, "chunk_bytes": 4096, "pack_bytes": 8192}


def read(path: Path) -> dict[str, float]:
    """As Prometheus does."""
    families = list(text_string_to_metric_families(path.read_text()))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_for_a_logger(tmp_path: Path) -> None:
    job = new_job()
    with gpumove.Checkpointer(str(tmp_path / "run"), **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore()
        assert gpumove.metrics(ckpt) == {}
        job.train(0, 3)
        handle = ckpt.save(3)
        handle.wait(60)
        found = gpumove.metrics(ckpt)
        assert set(found) <= {f"gpumove/{name}" for name in NUMBERS}
        assert found["gpumove/step"] == 3
        assert found["gpumove/saving"] == 0
        assert found["gpumove/stall_s"] == handle.stats.stall_s > 0
        assert found["gpumove/new_bytes"] == handle.stats.new_bytes > 0
        assert 0 < found["gpumove/staged_s"] <= found["gpumove/uploaded_s"] <= found["gpumove/committed_s"]
        assert all(type(value) is float for value in found.values())


def test_the_file_for_prometheus(tmp_path: Path) -> None:
    job, path = new_job(), tmp_path / "metrics" / "gpumove.prom"
    sent = 0
    with gpumove.Checkpointer(str(tmp_path / "run"), **job.parts(), **SETTINGS, metrics_file=str(path)) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            job.train(step - 1, step)
            handle = ckpt.save(step)
            handle.wait(60)
            sent += handle.stats.new_bytes
    found = read(path)
    assert found["gpumove_step"] == 3
    assert found["gpumove_committed_saves_total"] == 3
    assert found["gpumove_failed_saves_total"] == 0
    assert found["gpumove_sent_bytes_total"] == sent
    assert found["gpumove_stalled_seconds_total"] >= found["gpumove_stall_seconds"] > 0
    assert found["gpumove_committed_timestamp_seconds"] == pytest.approx(path.stat().st_mtime, abs=5)
    run = re.search(r'gpumove_info\{run="(\w+)"', path.read_text())
    assert run is not None
    assert run[1] in (tmp_path / "run" / "format.json").read_text()
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing is left behind"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    job, path, over = new_job(), tmp_path / "m.prom", threading.Event()
    seen: list[float] = []

    def collect() -> None:
        while not over.is_set():
            if path.exists():
                seen.append(read(path)["gpumove_committed_saves_total"])

    reader = threading.Thread(target=collect)
    with gpumove.Checkpointer(str(tmp_path / "run"), **job.parts(), **SETTINGS, metrics_file=str(path)) as ckpt:
        ckpt.restore()
        reader.start()
        for step in range(1, 11):
            job.train(step - 1, step)
            ckpt.save(step).wait(60)
    over.set()
    reader.join()
    assert seen == sorted(seen)
    assert seen


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job, path = new_job(), tmp_path / "m.prom"
    (tmp_path / "file").write_text("")
    for place, good in ((path, True), (tmp_path / "file" / "m.prom", False)):
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING, "gpumove"),
            gpumove.Checkpointer(
                str(tmp_path / f"run-{good}"), **job.parts(), **SETTINGS, metrics_file=str(place)
            ) as ckpt,
        ):
            ckpt.restore()
            ckpt.save(1).wait(60)
        assert ("the metrics could not be written" in caplog.text) is not good
    assert read(path)["gpumove_committed_saves_total"] == 1


def _save_into_files(ckpt: gpumove.Checkpointer, run: Path) -> None:
    """Save well, and once more when there are files in the places of folders: no part can be written."""
    with ckpt:
        ckpt.restore()
        ckpt.save(1).wait(60)
        for folder in (run / "parts", run / "packs"):
            shutil.rmtree(folder)
            folder.write_text("")
        ckpt.save(2).join(60)


def test_a_save_that_fails_is_in_the_file(tmp_path: Path) -> None:
    job, path = new_job(), tmp_path / "m.prom"
    settings = {**SETTINGS, "retry_s": 1.0, "on_save_error": "warn"}
    ckpt = gpumove.Checkpointer(str(tmp_path / "run"), **job.parts(), **settings, metrics_file=str(path))
    with pytest.raises(gpumove.StoreError, match="Not a directory"):
        _save_into_files(ckpt, tmp_path / "run")
    found = read(path)
    assert (found["gpumove_committed_saves_total"], found["gpumove_failed_saves_total"]) == (1, 1)


def test_through_opentelemetry(tmp_path: Path) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    job = new_job()

    def seen() -> dict[str, float]:
        data = reader.get_metrics_data()
        rows = [] if data is None else [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        return {m.name: point.value for m in rows for point in m.data.data_points}

    ckpt = gpumove.Checkpointer(str(tmp_path / "run"), **job.parts(), **SETTINGS)
    with ckpt:
        ckpt.restore()
        gpumove.observe(ckpt, provider.get_meter("test"))
        assert seen() == {}
        ckpt.save(1).wait(60)
        found = seen()
        assert found["gpumove.step"] == 1
        assert found["gpumove.stall_s"] == gpumove.metrics(ckpt)["gpumove/stall_s"]
        assert found["gpumove.state_bytes"] > 0
    del ckpt
    gc.collect()
    assert seen() == {}, "it does not keep the Checkpointer alive"
    provider.shutdown()
