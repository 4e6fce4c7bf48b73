"""The page says what the stores say, is one document that needs nothing else, and can be read by everybody."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import gpumove
from gpumove.cli import main
from gpumove.config import Config
from gpumove.inspection.run import open_run
from gpumove.report.bill import Rates
from gpumove.report.charts import thinned
from gpumove.report.making import report
from gpumove.report.style import CSS
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.report.conftest import CUT, END, EVERY, Moved, make_moved, train
from tests.runs import flip, objects

VOID = {"meta", "br", "hr"}


class Reader(HTMLParser):
    """Elements with their attributes, the text, and whether all that was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title", "desc"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def moved_page(moved: Moved) -> str:
    return report([moved.source, moved.target], rates=Rates((36.0,)))


def test_what_it_says_of_a_moved_run(moved: Moved, moved_page: str) -> None:
    text = Reader(moved_page).text
    first, last = moved.losses[CUT + 1], moved.losses[END]
    assert f"before the move: {moved.losses[1]:.4g} at step 1, {moved.losses[CUT]:.4g} at step {CUT}" in text
    assert f"after the move: {first:.4g} at step {CUT + 1}, {last:.4g} at step {END}" in text
    assert f"The move is marked after step {CUT}" in text
    assert f"the move, after step {CUT}" in text, "the mark has a name in the chart"
    assert f"Newest checkpoint step {END}" in text
    assert "Checkpoints 6 all sound" in text, "what was copied counts once"
    assert "Verdict: unknown" in text
    for state in ("begin", "sealed", "handover", "done"):
        assert f" {state} " in text


def test_what_a_move_has_measured_has_units_and_what_it_compares_is_said_in_words(tmp_path: Path) -> None:
    train(str(tmp_path), EVERY)
    before = {"step": 9, "loss": {"rows": 64, "level": 2.6177, "margins": [0.5]}}
    standing = {"loss": 2.5052, "loss_before": 2.6177, "s": 0.0146, "s_expected": 0.0148}
    facts = {"forecast_s": 0.153, "forecast_parts": {"leave": 0.024, "restore": 2.5}, "baseline": before}
    watch = {"handed": 9, "steps": 200, "epoch": 3, "baseline": before, "standing": standing}
    with open_run(str(tmp_path)) as log:
        for state, told in (("sealed", facts), ("watched", {"blackout_s": 1.5, "watch": watch})):
            log.move(state, move="0" * 16, other="memory://elsewhere", facts=told)
    text = Reader(report([str(tmp_path)])).text
    assert "forecast: 153 ms, forecast parts: (leave: 24 ms, restore: 2.5 s)" in text
    assert (
        "blackout: 1.5 s; loss 2.505 against 2.618 at the source; a step takes 14.6 ms, and 14.8 ms are expected"
        in text
    )
    assert "level" not in text
    assert "margins" not in text


def test_the_target_alone_knows_what_was_copied(moved: Moved) -> None:
    text = Reader(report([moved.target])).text
    first = CUT - EVERY + 1
    assert f"before the move: {moved.losses[first]:.4g} at step {first}" in text
    assert f"after the move: {moved.losses[CUT + 1]:.4g} at step {CUT + 1}" in text
    assert f"The losses of steps 1 to {first - 1}: no manifest that is here has them" in text
    assert f"The move is marked after step {CUT}" in text


def test_it_is_one_document_that_needs_nothing_else(moved_page: str) -> None:
    page = Reader(moved_page)
    assert page.open == []
    assert {name for name, _ in page.elements} & {"script", "link", "img", "iframe", "object", "image"} == set()
    assert not re.search(r"@import|url\((?!#)", moved_page)
    ids = Counter(given["id"] for _, given in page.elements if "id" in given)
    assert max(ids.values()) == 1, [name for name, n in ids.items() if n > 1]
    for _, given in page.elements:
        for name in ("href", "aria-labelledby"):
            for target in (given.get(name) or "").split():
                assert target.lstrip("#") in ids
        for target in re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for v in given.values())):
            assert target in ids


def test_charts_and_tables_tell_everybody(moved_page: str) -> None:
    page = Reader(moved_page)
    charts = [given for name, given in page.elements if name == "svg"]
    assert len(charts) == 8, "four, for desktop and phone"
    assert all(given.get("role") == "img" and given.get("aria-labelledby") for given in charts)
    assert all(given.get("scope") in ("row", "col") for name, given in page.elements if name == "th")
    names = Counter(name for name, _ in page.elements)
    assert names["table"] == names["caption"] > 5
    assert names["figure"] == names["figcaption"] == 4
    assert not re.search(r"#0[1-6]0[1-6]0[1-6]", moved_page), "every colour is the page's"


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_dark_and_print() -> None:
    """4.5 for text and 3 for what is drawn (WCAG 2.2 AA); axe cannot judge text inside of an SVG."""
    palettes = [dict(re.findall(r"--(\w+): #(\w+)", rule)) for rule in re.findall(r":root \{.*?\}", CSS, re.DOTALL)]
    assert len(palettes) == 3
    for palette in palettes:
        for ground in ("page", "card"):
            for name in ("ink", "muted", "first", "second", "alarm", "good"):
                light, dark = sorted((luminance(palette[ground]), luminance(palette[name])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


def test_what_others_wrote_cannot_become_markup(tmp_path: Path) -> None:
    train(str(tmp_path), 20)
    store = Store.open(str(tmp_path), Config())
    log = Log(store)
    log.open(create=False)
    log.read()
    log.note('</td><script>alert("x")</script> on a notice')
    store.close()
    text = report([str(tmp_path)])
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "notice (1)" in text, "it is an event of its own kind"


def test_prices(moved: Moved) -> None:
    assert "Cost so far unknown no prices were given" in Reader(report([moved.source, moved.target])).text
    one, both = (Reader(report([moved.source, moved.target], rates=Rates(p))).text for p in ((36e5,), (36e5, 0.0)))
    cost = [float(re.search(r"Cost so far ([\d.,]+)", t)[1].replace(",", "")) for t in (one, both)]  # type: ignore[index]
    assert cost[0] > cost[1] > 0


# -------------------------------------------------------------------- what is not known is said to be


def test_one_checkpoint_and_no_losses(tmp_path: Path) -> None:
    job_url = str(tmp_path)
    with gpumove.Checkpointer(job_url, model=torch.nn.Linear(2, 2), every_s=None) as ckpt:
        ckpt.restore()
        ckpt.save(1).wait(60)
    text = Reader(report([job_url])).text
    assert "Unknown: no loss was recorded" in text
    assert "Unknown: it takes recorded step times, or two commits of one job." in text
    assert "losses and step times: no loss was given to ckpt.step" in text
    assert "Last loss unknown" in text


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path), Config())
    log = Log(store)
    log.open(create=True)
    log.read()
    log.claim()
    store.close()
    text = Reader(report([str(tmp_path)])).text
    assert "everything about the training: no checkpoint has been committed yet" in text
    assert "None has been committed yet." in text


def test_damage_is_shown_and_the_rest_is_read(tmp_path: Path) -> None:
    losses = train(str(tmp_path), 60)
    before = report([str(tmp_path)])
    manifests = sorted((tmp_path / "manifests").iterdir())
    flip(manifests[1], 40)
    flip(tmp_path / "packs" / "00000001-00000003" / min(objects(tmp_path / "packs" / "00000001-00000003")), -1)
    text = Reader(report([str(tmp_path)])).text
    assert "all sound" in Reader(before).text
    assert "1 damaged" in text
    assert "what the manifests of 1 checkpoint said: they cannot be read" in text
    assert f"{losses[60]:.4g} at step 60" in text
    assert "2 damaged" in Reader(report([str(tmp_path)], deep=True)).text


def test_what_retention_has_removed_is_told_to_be_unknown(tmp_path: Path) -> None:
    for until in (60, 100):
        train(str(tmp_path), until)
        assert main(["gc", str(tmp_path), "--keep-last", "1", "--yes"]) == 0
    text = Reader(report([str(tmp_path)])).text
    assert "what happened before log entry" in text
    assert "The losses of steps 1 to 80: no manifest that is here has them" in text
    assert "save step 100 was saved" in text


def test_the_target_alone_knows_the_cut_as_long_as_the_job_compares_itself(tmp_path: Path) -> None:
    moved = make_moved(tmp_path)
    for until in (END + EVERY, END + 2 * EVERY):
        assert main(["gc", moved.target, "--keep-last", "2", "--yes"]) == 0
        train(moved.target, until)
    states = [m["state"] for m in json.loads(_json(tmp_path / "there" / "log")) if m["kind"] == "move"]
    assert set(states) == {"watched"}
    text = Reader(report([moved.target])).text
    assert f"The move is marked after step {CUT}" in text
    assert f"after the move: {moved.losses[END - EVERY + 1]:.4g} at step {END - EVERY + 1}" in text


def test_the_cut_is_known_although_retention_has_removed_the_handover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUMOVE_WATCH_STEPS", "0")
    moved = make_moved(tmp_path)
    for until in (END + EVERY, END + 2 * EVERY):
        assert main(["gc", moved.target, "--keep-last", "2", "--yes"]) == 0
        train(moved.target, until)
    states = [m["state"] for m in json.loads(_json(tmp_path / "there" / "log")) if m["kind"] == "move"]
    assert states == [], "no entry of the move is left"
    text = Reader(report([moved.source, moved.target])).text
    assert f"The move is marked after step {CUT}" in text
    assert f"The losses of steps {CUT + 1} to {END - EVERY}: no manifest that is here has them" in text
    assert "becomes a copy" not in text
    alone = Reader(report([moved.target])).text
    assert "After which step the run was moved: give the URL that it came from too." in alone
    assert f"after the move: {moved.losses[END - EVERY + 1]:.4g} at step {END - EVERY + 1}" in alone


def _json(folder: Path) -> str:
    return f"[{','.join(p.read_text() for p in sorted(folder.iterdir()))}]"


def test_a_copy_is_no_other_side(tmp_path: Path) -> None:
    source, copy = str(tmp_path / "a"), str(tmp_path / "b")
    train(source, 20)
    gpumove.replicate(source, copy)
    text = Reader(report([source, copy])).text
    assert "this run: " in text
    assert "the move:" not in text
    assert "one side has no fingerprint" not in text


def test_two_runs_that_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    for name in "ab":
        train(str(tmp_path / name), 20)
    text = Reader(report([str(tmp_path / "a"), str(tmp_path / "b")])).text
    assert "first run: " in text
    assert "second run: " in text
    assert "is marked" not in text


def test_no_spike_is_lost_where_there_are_many_points() -> None:
    ys: list[float | None] = [1.0] * 50_000
    ys[31_313], ys[40_001], ys[7] = 99.0, -5.0, None
    xs, kept = thinned(range(50_000), ys)
    assert len(xs) <= 1300
    assert xs == sorted(xs)
    assert (31_313, 99.0) in zip(xs, kept)
    assert (40_001, -5.0) in zip(xs, kept)
    assert sum(y != y for y in kept) == 1
