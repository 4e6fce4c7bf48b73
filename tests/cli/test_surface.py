"""The command line's surface is frozen: a script that was written for it goes on working."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpumove.cli import build_parser, main
from gpumove.version import __version__

STORED = dict(line.split(": ", 1) for line in (Path(__file__).parent / "surface.txt").read_text().splitlines())


def helped(capsys: pytest.CaptureFixture[str], *verb: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*verb, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def surface(text: str) -> str:
    """The places and options that a verb's help shows."""
    usage, _, rest = text.partition("\n\n")
    names = re.findall(r"^  ([A-Z]+)\b", rest, re.MULTILINE)
    places = [f"[{name}]" if f"[{name}]" in usage else name for name in names]
    options = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", rest, re.MULTILINE)
    return " ".join([*places, *sorted(options)])


def test_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys)
    verbs = re.findall(r"^    ([a-z]+)\s+\S", text, re.MULTILINE)
    assert sorted(verbs) == sorted(set(STORED) - {"gpumove"})
    assert surface(text) == STORED["gpumove"]


@pytest.mark.parametrize("verb", sorted(set(STORED) - {"gpumove"}))
def test_the_options_of_a_verb(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert surface(helped(capsys, verb)) == STORED[verb]


def test_the_manual_has_every_option() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for verb, row in STORED.items():
        if verb == "gpumove":
            continue
        assert f"## {verb}" in manual
        section = manual.partition(f"\n## {verb}")[2].partition("\n## ")[0] + manual.partition("\n## ")[0]
        for option in re.findall(r"--[a-z-]+", row):
            assert option == "--help" or option in section, f"{verb} {option}"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"gpumove {__version__}\n"


@pytest.mark.parametrize(
    "line",
    [
        ["export", "URL", "7", "OUT", "--what", "all"],
        ["export", "--what", "all", "URL", "7", "OUT"],
        ["export", "URL", "--what", "all", "7", "OUT"],
        ["export", "URL", "7", "--what", "all", "OUT"],
    ],
)
def test_options_and_places_come_in_any_order(line: list[str]) -> None:
    args = build_parser().parse_args(line)
    assert (args.url, args.step, args.out, args.what) == ("URL", 7, "OUT", "all")


def test_a_step_may_be_left_out() -> None:
    args = build_parser().parse_args(["export", "URL", "--force", "OUT"])
    assert (args.url, args.step, args.out, args.force) == ("URL", None, "OUT", True)
    args = build_parser().parse_args(["show", "URL", "--tensors", "7"])
    assert (args.step, args.tensors) == (7, True)


@pytest.mark.parametrize(
    "line", [[], ["nonsense"], ["ls"], ["ls", "URL", "--jso"], ["pin", "URL"], ["show", "URL", "x"]]
)
def test_wrong_calls_end_with_2(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    assert "usage: gpumove" in capsys.readouterr().err
