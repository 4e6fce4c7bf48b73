"""What a run has cost: by prices that were said, by tables, and what is unknown where nobody said anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from gpumove.cli import main
from gpumove.errors import ConfigError
from gpumove.estimates.interval import Range, product
from gpumove.format.manifest import Move
from gpumove.inspection.run import open_run
from gpumove.report.bill import Rates, reckon
from gpumove.report.compare import Comparison, compare
from gpumove.report.history import History, read_history
from gpumove.report.making import report
from tests.report.conftest import Moved, train
from tests.report.test_page import Reader

_HOURS = Range.exact(1 / 3600)
TABLE = """
collected: 2026-11-21
egress:
  - {provider: here, internet: [{usd_per_gb: 1000000}], source: a test, read: 2026-11-21}
instances:
  - {provider: here, instance: box, gpu: H100-SXM, gpus: 1, usd_per_h: 3600, source: a test, read: 2026-11-21}
  - {provider: there, instance: box, gpu: H100-SXM, gpus: 1, spot_usd_per_h: [900, 1800, 7200], source: a test,
     read: 2026-11-21}
"""


@pytest.fixture
def table(tmp_path: Path) -> str:
    found = tmp_path / "prices.yaml"
    found.write_text(TABLE)
    return str(found)


def history(url: str) -> History:
    with open_run(url) as log:
        return read_history(log)


@pytest.fixture(scope="module")
def both(moved: Moved) -> Comparison:
    return compare([history(moved.source), history(moved.target)])


def test_by_place_with_what_the_move_sent(both: Comparison, table: str) -> None:
    bill = reckon(both, Rates(places=("here:a:box", "there:b:box:spot"), prices=table))
    seconds = [line.trained_s for line in both.lines]
    assert bill.unit == "$"
    assert [item.hourly for item in bill.items] == [Range.exact(3600.0), Range(900, 1800, 7200)]
    assert bill.items[0].cost == product(Range.exact(3600.0), Range.exact(seconds[0]), _HOURS)
    assert bill.items[1].cost == product(Range(900, 1800, 7200), Range.exact(seconds[1]), _HOURS)
    assert bill.items[1].why == "1 x box, list price: a test, 2026-11-21"
    assert bill.sent is not None
    sent = {m.facts.get("sent_bytes") for h in both.histories for m in h.moves} - {None}
    assert bill.sent.cost is not None
    assert bill.sent.cost.high == pytest.approx(max(sent) * 1e-3)
    text = Reader(report([both.histories[0].url, both.histories[1].url],
                         rates=Rates(places=("here:a:box", "there:b:box:spot"), prices=table))).text  # fmt: skip
    assert "machines, and what the move sent" in text
    assert "egress of here, list price" in text


def test_what_was_said_wins_over_the_table(both: Comparison, table: str) -> None:
    bill = reckon(both, Rates(hourly=(7200.0,), places=("here:a:box", None), prices=table))
    assert [item.hourly for item in bill.items] == [Range.exact(7200.0)] * 2
    assert {item.why for item in bill.items} == {"as said"}
    assert bill.sent is not None
    assert (bill.sent.cost, bill.sent.why) == (None, "say both places (--from and --to)")


def test_what_nobody_said_is_unknown_and_so_is_the_sum(both: Comparison, table: str) -> None:
    nothing = reckon(both, Rates())
    assert (nothing.machines, nothing.unit) == (None, "")
    assert [item.why for item in nothing.items] == [
        f"say where it trained ({option}), or its price (--hourly)" for option in ("--from", "--to")
    ]
    half = reckon(both, Rates(places=("here:a:box",), prices=table))
    assert half.items[0].cost is not None
    assert half.machines is None
    nowhere = reckon(both, Rates(places=("here:a:crate", "there:b:box"), prices=table))
    assert "the table of prices has no row for it" in nowhere.items[0].why
    assert "costs on demand: its row in the table of prices does not say" in nowhere.items[1].why
    assert nowhere.machines is None


def test_bytes_that_nobody_counted_cost_nobody_knows_what(both: Comparison, table: str) -> None:
    silent = [replace(h, moves=tuple(_without(m) for m in h.moves)) for h in both.histories]
    bill = reckon(compare(silent), Rates(places=("here:a:box", "there:b:box:spot"), prices=table))
    assert bill.sent is not None
    assert (bill.sent.cost, bill.sent.why) == (None, "the log does not say how many bytes that were")
    assert bill.machines is not None
    text = Reader(report([h.url for h in both.histories], rates=Rates((1.0, 2.0)))).text
    assert "what the move sent is not in it" in text


def _without(move: Move) -> Move:
    return msgspec.structs.replace(move, facts={k: v for k, v in move.facts.items() if k != "sent_bytes"})


def test_a_machine_that_the_manifests_do_not_know(both: Comparison, table: str) -> None:
    devices = {"devices": [{"model": "NVIDIA A100-SXM4-80GB"}]}
    told = [replace(h, fingerprints=dict.fromkeys(h.fingerprints, devices)) for h in both.histories]
    bill = reckon(compare(told), Rates(places=("here:a:box", "there:b:box:spot"), prices=table))
    assert all("The manifests say NVIDIA A100-SXM4-80GB, though" in item.why for item in bill.items)


def test_more_prices_than_sides(tmp_path: Path, both: Comparison) -> None:
    with pytest.raises(ConfigError, match="3 prices per hour were said of two sides"):
        reckon(both, Rates((1.0, 2.0, 3.0)))
    train(str(tmp_path / "run"), 20)
    out = tmp_path / "r.html"
    alone = compare([history(str(tmp_path / "run"))])
    assert reckon(alone, Rates((2.0,))).sent is None
    with pytest.raises(ConfigError, match="2 prices per hour were said of one side"):
        reckon(alone, Rates((1.0, 2.0)))
    with pytest.raises(ConfigError, match="it has no --to"):
        reckon(alone, Rates(places=("here:a:box", "there:b:box")))
    assert main(["report", str(tmp_path / "run"), "-o", str(out), "--from", "somewhere"]) == 2
    assert main(["report", str(tmp_path / "run"), "-o", str(out), "--prices-file", str(tmp_path / "none")]) == 2
    assert not out.exists()
