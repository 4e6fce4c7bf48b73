"""The page in a real browser: nothing is asked of a network, all can be read without script, on a desktop and on a
phone, in light and dark; axe and an HTML validator find nothing. Slow: Chromium weighs 400 MB, so CI does without it
(``make browser`` installs it)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpumove.report.bill import Rates
from gpumove.report.making import report
from tests.report.conftest import CUT, END, Moved
from tests.report.test_bill import history
from tests.report.test_verdicts import certificate, written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
TOOLS = HERE.parent.parent / ".tools" / "browser"


@pytest.fixture(scope="module")
def page(moved: Moved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("page") / "report.html"
    run = history(moved.source).run
    certificates = [written(found.with_name(f"{n}"), certificate(run, spoil=s)) for n, s in enumerate((1.0, 1.5))]
    places = ("aws:us-east-1:p5.48xlarge", "gcp:us-central1:a3-highgpu-8g:spot")
    rates = Rates((49.24, 19.71), places)
    found.write_text(report([moved.source, moved.target], deep=True, rates=rates, certificates=certificates))
    return found


@pytest.fixture(scope="module")
def looks(page: Path) -> list[dict[str, Any]]:
    """What was seen, once per window; the screenshots lie beside the page, or where REPORT_SCREENSHOTS says."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "make browser installs it"
    assert TOOLS.is_dir(), "make browser installs axe and the validator"
    out = Path(os.environ.get("REPORT_SCREENSHOTS", page.parent))
    done = subprocess.run(
        ["node", str(HERE / "look.mjs"), str(page), str(out), str(TOOLS)],
        env={**os.environ, "CHROMIUM": chromium}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all((out / f"{look['name']}.png").stat().st_size > 10_000 for look in json.loads(done.stdout))
    assert (out / "print.pdf").stat().st_size > 10_000
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_axe_finds_nothing(looks: list[dict[str, Any]]) -> None:
    assert len(looks) == 4
    for look in looks:
        assert look["rules"] > 30
        assert look["violations"] == [], look["name"]
        # Text inside of an SVG has no ground that axe knows; test_page.py reckons its contrast.
        assert {rule for _, rule, _, _ in look["unsure"]} <= {"color-contrast"}


def test_nothing_is_asked_of_a_network_and_nothing_complains(looks: list[dict[str, Any]], page: Path) -> None:
    for look in looks:
        assert set(look["asked"]) == {page.as_uri()}
        assert look["said"] == []


def test_it_fits_the_window_and_can_be_read(looks: list[dict[str, Any]]) -> None:
    for look in looks:
        assert look["wide"] <= look["width"], look["name"]
        assert f"The move is marked after step {CUT}" in look["text"]
        assert f"step {END}" in look["text"]


def test_a_validator_finds_nothing(page: Path) -> None:
    program = TOOLS / "node_modules" / "html-validate" / "bin" / "html-validate.mjs"
    done = subprocess.run(
        ["node", str(program), "--config", str(HERE / "html-validate.json"), str(page)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    bad = page.with_name("bad.html")
    bad.write_text(page.read_text().replace("<caption>", "<div>", 1))
    done = subprocess.run(
        ["node", str(program), "--config", str(HERE / "html-validate.json"), str(bad)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0, "it would find something"
