"""Every verb, as a person and as a program calls it: answers, exit codes, and what is left untouched."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gpumove import cli
from gpumove.errors import ConfigError, FencedError, IntegrityError, LayoutError, StoreError
from gpumove.inspection.run import open_run
from tests.runs import flip, objects, train

READING = [["ls"], ["show"], ["show", "--tensors"], ["verify"], ["verify", "--deep"], ["gc", "--keep-last", "1"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("cli") / "run"
    train(str(url), [1, 2, 3, 4], pinned=[2])
    return url


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


# -------------------------------------------------------------------- for people


def test_ls(call: Any, run: Path) -> None:
    code, out, err = call("ls", run)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert [r[0] for r in rows if len(r) > 8 and r[0].isdigit()] == ["1", "2", "3", "4"]
    assert [r[0] for r in rows if "pinned" in r and r[0] != "step"] == ["2"]
    assert "epoch 1, claimed by" in out
    assert "resume step 4 (entry 5): it is the newest committed checkpoint" in out
    max((run / "manifests").iterdir()).unlink()
    _, out, _ = call("ls", run)
    assert "resume step 3 (entry 4): newer ones are damaged: step 4 (entry 5): its manifest is missing" in out
    flip(run / "log/00000000000000000004.json", -40)
    _, out, _ = call("ls", run)
    assert "log entry 4 cannot be read" in out
    assert "resume step 2" in out


def test_ls_promises_no_resume_where_none_may_be(call: Any, run: Path) -> None:
    with open_run(str(run)) as log:
        log.read()
        log.move("sealed", move="0" * 16, other="file:///elsewhere")
        with pytest.raises(FencedError):
            log.claim()
    code, out, err = call("ls", run)
    assert (code, err) == (0, "")
    assert "resumed next" not in out
    assert "resume nothing, here: the run was moved to file:///elsewhere: resume it there" in out
    assert json.loads(call("ls", run, "--json")[1])["resume"]["entry"] is None
    assert call("replicate", run, run.parent / "copy")[0] == 0
    out = call("ls", run.parent / "copy")[1]
    assert "resumed next" not in out
    assert "resume nothing, here: this is a replica of" in out


def test_show(call: Any, run: Path) -> None:
    code, out, _ = call("show", run)
    assert code == 0
    assert "step 4, entry 5" in out
    assert "model.frozen" in out
    assert "model.frozen.weight" not in out
    code, out, _ = call("show", run, "2", "--tensors")
    assert "step 2, entry 3, pinned" in out
    (row,) = [line for line in out.splitlines() if line.startswith("model.fp8 ") and "float8" in line]
    assert row.split() == ["model.fp8", "float8_e4m3fn", "[9,", "11]", "99", "B", "1", "0"]


def test_verify(call: Any, run: Path) -> None:
    code, out, _ = call("verify", run)
    assert code == 0
    assert out.startswith("sound: 4 checkpoints, ")
    assert "--deep" in out
    code, out, _ = call("verify", "--deep", run)
    assert (code, "packs were read" in out) == (0, True)
    for victim in (run / "packs/00000001-00000004").iterdir():
        flip(victim, -1)
    assert call("verify", run)[0] == 0
    code, out, _ = call("verify", "--deep", run)
    assert code == IntegrityError.exit_code == 20
    assert "newest sound checkpoint step 3" in out
    assert "    checkpoints of steps 4" in out
    assert "    tensors " in out
    assert call("verify", "--deep", "--step", "3", run)[0] == 0


def test_pin_and_unpin(call: Any, run: Path) -> None:
    assert call("pin", run, "3")[:2] == (0, "step 3 (entry 4) is pinned: retention keeps it\n")
    before = objects(run)
    assert call("pin", run, "3")[:2] == (0, "step 3 (entry 4) is already pinned: retention keeps it\n")
    assert objects(run) == before
    kept = json.loads(call("gc", run, "--keep-last", "1", "--json")[1])["kept"]
    assert [c["step"] for c in kept] == [2, 3, 4]
    assert call("pin", run, "3", "--undo")[0] == 0
    kept = json.loads(call("gc", run, "--keep-last", "1", "--json")[1])["kept"]
    assert [c["step"] for c in kept] == [2, 4]
    assert call("pin", run, "9")[0] == ConfigError.exit_code


def test_gc_is_a_dry_run_unless_told(call: Any, run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "packs" / "README").write_text("mine too")
    before = objects(run)
    code, out, _ = call("gc", run, "--keep-last", "1")
    assert code == 0
    assert "keep   2 checkpoints, of steps 2 (pinned), 4" in out
    assert "drop   2 checkpoints, of steps 1, 3" in out
    assert "nothing was changed: this was a dry run, --yes does it" in out
    assert objects(run) == before
    planned = json.loads(call("gc", run, "--keep-last", "1", "--json")[1])
    code, out, _ = call("gc", run, "--keep-last", "1", "--yes")
    assert (code, out.splitlines()[-1]) == (0, "done")
    after = objects(run)
    gone = {k for k in before if k not in after and not k.startswith("log/")}
    assert gone == set(planned["deleted"])
    assert sum(len(before[k]) for k in gone) == planned["deleted_bytes"] > 0
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "packs" / "README").read_text() == "mine too"
    assert call("verify", "--deep", run)[0] == 0


def test_gc_keeps_what_the_settings_say(call: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(*options: str) -> list[int]:
        return [c["step"] for c in json.loads(call("gc", run, *options, "--json")[1])["kept"]]

    assert kept() == [1, 2, 3, 4]
    monkeypatch.setenv("GPUMOVE_KEEP_LAST", "1")
    assert kept() == [2, 4]
    assert kept("--keep-last", "2") == [2, 3, 4]
    assert kept("--keep-last", "all") == [1, 2, 3, 4]
    assert kept("--keep-every", "3") == [2, 3, 4]
    for wrong in ("0", "some", "-1"):
        assert call("gc", run, f"--keep-last={wrong}")[0] == ConfigError.exit_code


def test_export(call: Any, run: Path, tmp_path: Path) -> None:
    code, out, _ = call("export", run, "2", tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "20KiB")
    assert code == 0
    assert out.startswith("step 2: 18 tensors, ")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert call("export", run, tmp_path / "out")[0] == ConfigError.exit_code
    code, out, _ = call("export", run, tmp_path / "out", "--force", "--tied", "drop", "--what", "all")
    assert code == 0
    assert "left out model.head.weight, which is tied to model.embed.weight" in out
    assert "optimizer.embed.weight.exp_avg" in load_file(tmp_path / "out" / "model.safetensors")
    code, _, err = call("export", run, tmp_path / "more", "--max-shard-size", "5 parsecs")
    assert (code, err) == (2, "error: --max-shard-size takes a size such as 5GB or 512MiB, not '5 parsecs'\n")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("512MiB", 512 << 20), ("1.5k", 1500), ("7", 7), ("7B", 7), ("2 TiB", 2 << 40), ("3m", 3e6)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert cli.parse_size("--x", text) == nbytes


@pytest.mark.parametrize("where", ["a terminal", "one log", "two places"])
def test_what_a_move_tells_is_read_once(run: Path, tmp_path: Path, where: str) -> None:
    """While it goes on on standard error, and as a table in the answer for whoever keeps only that."""
    words = ["--to", tmp_path / "there", "--force", "--leave-timeout", "0", "--no-wait"]
    line = [sys.executable, "-m", "gpumove", "move", *map(str, [run, *words])]
    ours, theirs = os.openpty() if where == "a terminal" else os.pipe()
    with open(tmp_path / "err", "w+") as apart:
        err = apart.fileno() if where == "two places" else theirs
        with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=theirs, stderr=err) as mover:
            os.close(theirs)
            out = read_all(ours)
        assert mover.returncode == 0, out
        apart.seek(0)
        told = apart.read()
    assert out.count("nothing is written here after step 4") == 1, out
    assert told.count("nothing is written here after step 4") == (where == "two places"), told
    assert "handed over; nobody has trained at the target yet" in out


def read_all(end: int) -> str:
    """What the other end of a pipe or a terminal writes until it is closed."""
    found = b""
    with contextlib.suppress(OSError):  # so a terminal says that it is
        while data := os.read(end, 1 << 16):
            found += data
    os.close(end)
    return found.decode()


# -------------------------------------------------------------------- for programs


@pytest.mark.parametrize("verb", [*READING, ["pin"], ["gc", "--yes"], ["export"], ["doctor"]], ids=" ".join)
def test_json_of_every_verb(call: Any, run: Path, tmp_path: Path, verb: list[str]) -> None:
    rest = {"pin": ["1"], "export": [tmp_path / "out"]}.get(verb[0], [])
    code, out, err = call(*verb, run, *rest, "--json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), dict)


def test_what_the_json_says(call: Any, run: Path) -> None:
    data = json.loads(call("ls", run, "--json")[1])
    assert [c["step"] for c in data["checkpoints"]] == [1, 2, 3, 4]
    assert data["resume"] == {"step": 4, "entry": 5, "why": "it is the newest committed checkpoint"}
    data = json.loads(call("show", run, "1", "--json")[1])
    assert data["fingerprint"]["packages"]["torch"]
    assert data["tensors"] is None
    data = json.loads(call("verify", run, "--json")[1])
    assert (data["sound"], data["newest_sound"], data["damage"]) == (True, 4, [])


@pytest.mark.parametrize("verb", [*READING, ["export"]], ids=" ".join)
def test_no_run_at_the_url(call: Any, tmp_path: Path, verb: list[str]) -> None:
    rest = [tmp_path / "out"] if verb == ["export"] else []
    (tmp_path / "empty").mkdir()
    code, out, err = call(*verb, tmp_path / "empty", *rest)
    assert (code, out) == (2, "")
    assert err == f"error: there is no gpumove run at file://{tmp_path}/empty: check the URL\n"
    code, out, err = call(*verb, tmp_path / "empty", *rest, "--json")
    assert code == 2
    assert json.loads(out) == {"error": err.removeprefix("error: ").strip(), "code": "config.no_run"}
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("kind", [ConfigError, StoreError, IntegrityError, LayoutError, FencedError])
def test_the_exit_code_is_the_error_class(call: Any, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setattr(cli, "overview", lambda log: (_ for _ in ()).throw(kind("it\nbroke")))
    monkeypatch.setattr(cli, "_opened", lambda args: _Nothing())
    assert call("ls", "x") == (kind.exit_code, "", "error: it broke\n")
    _, out, err = call("ls", "x", "--json", "--debug")
    assert json.loads(out)["code"] == kind.default_code
    assert "Traceback" in err


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_unexpected_errors_show_no_traceback(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_opened", lambda args: 1 / 0)
    code, out, err = call("ls", "x")
    assert (code, out) == (1, "")
    assert err == "error: unexpected ZeroDivisionError: division by zero; --debug shows where, please report it\n"


def test_interrupts_end_quietly(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_opened", interrupt)
    assert call("ls", "x") == (130, "", "")


def test_a_reader_that_leaves_is_no_error(run: Path) -> None:
    command = [sys.executable, "-c", "import sys; from gpumove.cli import main; sys.exit(main())"]
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        [*command, "show", str(run), "--tensors"], stdout=write, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


# -------------------------------------------------------------------- storage options


def options_of(*given: str) -> dict[str, Any]:
    args = cli.build_parser().parse_args(["ls", "URL", *(word for g in given for word in ("--option", g))])
    return cli.storage_options(args)


def test_storage_options() -> None:
    found = options_of("key=a=b", "anon=true", "timeout=30", 'token="123"', "client_kwargs.endpoint_url=http://x", "e=")
    assert found == {
        "key": "a=b",
        "anon": True,
        "timeout": 30,
        "token": "123",
        "client_kwargs": {"endpoint_url": "http://x"},
        "e": "",
    }


@pytest.mark.parametrize("given", [["hush-hush"], ["=hush-hush"], ["a=1", "a.b=hush-hush"], ["a..b=hush-hush"]])
def test_wrong_storage_options_are_not_echoed(call: Any, given: list[str]) -> None:
    code, out, err = call("ls", "URL", *(word for g in given for word in ("--option", g)))
    assert code == 2
    assert f"--option number {len(given)}" in err
    assert "hush" not in out + err


# -------------------------------------------------------------------- without torch


@pytest.mark.parametrize("verb", [*READING, ["pin"], ["gc", "--yes"]], ids=" ".join)
def test_verbs_that_look_after_runs_need_no_torch(run: Path, verb: list[str]) -> None:
    line = [*verb, str(run), *(["1"] if verb == ["pin"] else [])]
    code = f"import sys; from gpumove.cli import main; assert main({line!r}) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


# -------------------------------------------------------------------- at a terminal


def test_tables_and_colours_at_a_terminal(call: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    for verb in (*READING, ["doctor"]):
        code, out, _ = call(*verb, run)
        assert code == 0
        assert "\x1b[" in out
    code, out, _ = call("show", run, "--json")
    assert "\x1b[" not in out
    _, _, err = call("ls", run / "nowhere")
    assert "\x1b[" in err
