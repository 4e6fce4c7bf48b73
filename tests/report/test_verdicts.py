"""Is it the same job: certificates, findings, probes and differences of machines, as the page shows them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpumove.cli import main
from gpumove.errors import ConfigError
from gpumove.format.manifest import TraceRow
from gpumove.format.probes import Output, Probe
from gpumove.parity.verdict import Certificate, Setting, judge
from gpumove.report.bill import Rates, reckon
from gpumove.report.compare import Comparison, compare
from gpumove.report.history import Event
from gpumove.report.making import report
from gpumove.report.page import page
from tests.report.conftest import CUT, END, Moved
from tests.report.test_bill import history
from tests.report.test_page import Reader

ROWS = [TraceRow(CUT + n, 2.0 / n, {"grad_norm": 1.0 / n, "lr": 0.1, "samples": f"{n:x}"}) for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def both(moved: Moved) -> Comparison:
    return compare([history(moved.source), history(moved.target)])


def certificate(run: str, *, spoil: float = 1.0) -> Certificate:
    again = [TraceRow(row.step, (row.loss or 0.0) * spoil, row.facts) for row in ROWS]
    here = Setting(url="file:///there", run=run, step=CUT, entry=3, asked=3, recorded=3, same_devices=True,
                   reproducible=True)  # fmt: skip
    return judge(ROWS, again, here)


def written(path: Path, found: Certificate) -> str:
    path.write_bytes(msgspec.json.encode(found))
    return str(path)


def text_of(found: Comparison, *certificates: Certificate) -> str:
    return Reader(page(found, reckon(found, Rates()), certificates)).text


def test_a_certificate_is_shown_with_every_step(moved: Moved, both: Comparison, tmp_path: Path) -> None:
    good = certificate(both.histories[0].run)
    assert good.verdict == "bitwise"
    text = Reader(report([moved.source, moved.target], certificates=[written(tmp_path / "c", good)])).text
    assert f"Is it the same job? bitwise 3 steps after step {CUT} compared" in text
    assert f", bitwise : {good.why}" in text
    assert f"Certificate 1: steps after step {CUT} of file:///there, trained again" in text
    assert f"{CUT + 1} 2.0 2.0 0 nothing" in text


def test_the_worst_of_several_counts(both: Comparison) -> None:
    run = both.histories[0].run
    bad = certificate(run, spoil=1.5)
    text = text_of(both, certificate(run), bad)
    assert "Is it the same job? different 3 steps" in text
    assert f"{CUT + 1} 2.0 3.0 50 % loss" in text
    assert bad.why in text


def test_a_certificate_of_another_run_tells_nothing(both: Comparison) -> None:
    text = text_of(both, certificate("0" * 12))
    assert "A certificate is of another run" in text
    assert "Is it the same job? unknown no certificate was given" in text


def test_what_is_no_certificate(moved: Moved, tmp_path: Path) -> None:
    for name, data in (("none", None), ("empty", b""), ("other", b'{"verdict": "bitwise"}')):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match="is no certificate that can be read"):
            report([moved.target], certificates=[str(tmp_path / name)])
    out = tmp_path / "r.html"
    assert main(["report", moved.target, "-o", str(out), "--certificate", str(tmp_path / "none")]) == 2
    assert not out.exists()


def test_nothing_that_was_found_after_the_move_looks_good(both: Comparison) -> None:
    event = Event(both.histories[1].now, "parity", f"parity at step {CUT + 9}: the loss is 3 % above", CUT + 9)
    there = replace(both.histories[1], events=(*both.histories[1].events, event))
    found = replace(both, histories=(both.histories[0], there))
    text = text_of(found, certificate(both.histories[0].run))
    assert "Is it the same job? look something was found after the move" in text
    assert "Found after the move, by the job itself" in text
    assert "parity (1)" in text, "it has a lane of its own"


def test_machines_that_differ_are_graded(both: Comparison) -> None:
    def machine(**facts: Any) -> dict[str, Any]:
        old = next(iter(both.histories[0].fingerprints.values()))
        return {**old, "packages": {**old["packages"], **facts}}

    here, there = both.histories
    own = set(there.fingerprints) - set(here.fingerprints)
    other = {m: machine(torch="1.0.0") if m in own else f for m, f in there.fingerprints.items()}
    found = compare([here, replace(there, fingerprints=other)])
    assert found.differences is not None
    assert [d.grade for d in found.differences if d.field == "torch"] == ["numerics"]
    text = text_of(found)
    assert "1.0.0 numerics torch promises equal results within one release and build only" in text
    silent = compare([here, replace(there, fingerprints={})])
    assert silent.differences is None
    assert "What differs between the machines is unknown: one side has no fingerprint." in text_of(silent)


def test_probes_of_both_sides(both: Comparison) -> None:
    probe = Probe("logits", (Output("out", "float32", (4, 10), "ab" * 16, b""),))
    there = both.histories[1]
    newest = max(there.saves, key=lambda save: save.at.number).at.manifest
    text = text_of(replace(both, histories=(both.histories[0], replace(there, probes={newest: (probe,)}))))
    assert f"after the move {END} logits out: float32 [4, 10], abababababab" in text
