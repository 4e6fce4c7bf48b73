"""The setting that names the sources, and what notices and outcomes look like."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumove.errors import ConfigError
from gpumove.notices.gcp import Gcp
from gpumove.notices.notice import Notice, Outcome, one_line
from gpumove.notices.sources import _SIMPLE, parse


def test_every_word_is_a_source_once() -> None:
    text = "signals, aws,aws-rebalance,gcp,gcp-maintenance , azure,aws,,file:/x/leave,file:/y,url:https://host/leave"
    names = [source.name for source in parse(text)]
    assert names == ["signals", "aws", "aws-rebalance", "gcp", "gcp-maintenance", "azure", "file", "file", "url"]
    assert parse("") == []


def test_only_the_first_rank_of_a_machine_asks_its_services() -> None:
    assert [source.name for source in parse("aws,signals,file:/x", first_here=False)] == ["signals"]
    with pytest.raises(ConfigError):
        parse("asw,signals", first_here=False)


def test_the_page_lists_every_word() -> None:
    page = (Path(__file__).parents[2] / "docs" / "notices.md").read_text()
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert listed == {*_SIMPLE, "gcp:120", "file:PATH", "url:URL"}


def test_gcp_is_told_its_seconds() -> None:
    source = parse("gcp:120")[0]
    assert isinstance(source, Gcp)
    assert source._notice_s == 120


@pytest.mark.parametrize(
    "text",
    ["asw", "AWS", "file", "file:", "url:", "url:host/leave", "url:ftp://host/", "url:http://", "url:http://h:x/",
     "url:http://h/a b", "gcp:soon", "gcp:0", "gcp:inf", "aws:1", "signals:"],
)  # fmt: skip
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="notices"):
        parse(text)


@pytest.mark.parametrize("text", ["url:https://me:word@host/leave", "url:http://me:word@host:port/", "url:word@"])
def test_no_secret_is_shown(text: str) -> None:
    with pytest.raises(ConfigError) as failure:
        parse(text)
    assert "word" not in str(failure.value)


def test_outcomes_say_what_is() -> None:
    assert str(Outcome(True, 120, 0)) == "durable: step 120"
    assert str(Outcome(False, 100, 20, "the store is gone")) == "not durable: resumes from step 100, 20 steps lost"
    assert str(Outcome(True, 7, 0, finished=True)) == "finished"


def test_notices_are_compared_without_their_outcome() -> None:
    assert Notice("aws", 1.0, outcome=Outcome(True, 1, 0)) == Notice("aws", 1.0)


def test_one_line_is_one_line() -> None:
    assert one_line("a\n b\0\tc") == "a b c"
    assert len(one_line("x" * 1000)) == 200
