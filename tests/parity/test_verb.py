"""`gpumove certify` as a real process over a real torchrun: what it says, its exit codes, and that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from gpumove.parity.verdict import read_certificate
from tests.job.harness import GPUMOVE, ROOT, WAIT_S
from tests.parity.jobs import contents, train


def start(folder: Path, way: str, *options: str) -> subprocess.Popen[str]:
    command = [
        *GPUMOVE,
        "certify",
        str(folder / "run"),
        *options,
        "--",
        "--nproc-per-node",
        "1",
        "-m",
        "tests.parity.script",
    ]
    env = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, way], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def certify(folder: Path, way: str, *options: str) -> tuple[int, str, str]:
    process = start(folder, way, *options)
    out, err = process.communicate(timeout=WAIT_S)
    assert not list(folder.glob("gpumove-run-*")), "its folder is still there"
    return process.returncode, out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    usual = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun has it: with more, sums on the processor are rounded otherwise
    train(tmp_path / "run", 8, every=4)
    torch.set_num_threads(usual)
    return tmp_path


def test_the_same_job(folder: Path) -> None:
    before = contents(folder / "run")
    code, out, err = certify(folder, "well", "--steps", "4", "--output", str(folder / "c.json"))
    assert code == 0, err
    lines = out.splitlines()
    assert lines[-1].startswith(
        "bitwise: 4 steps (5 to 8) gave the same bits: the loss, the gradient norm, the samples"
    )
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == ["5", "6", "7", "8"]
    assert read_certificate(folder / "c.json").good
    assert contents(folder / "run") == before


def test_no_job_is_started_where_no_run_is(tmp_path: Path) -> None:
    code, out, err = certify(tmp_path, "well")
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no gpumove run at ")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("way", "code"), [("optimizer", 50), ("ignores", 0), ("fails-later", 0)])
def test_a_verdict_stands_whatever_the_script_does_after_it(folder: Path, way: str, code: int) -> None:
    before = contents(folder / "run")
    found, out, _ = certify(folder, way, "--json")
    told = json.loads(out)
    assert (found, told["exit_code"]) == (code, code)
    assert told["certificate"]["cause"] == ("optimizer" if code else "")
    assert {"optimizer": "finished", "ignores": "only certified", "fails-later": "no room"}[way] in told["job"]
    assert contents(folder / "run") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "code", "said"),
    [("unrelated", 51, "the job ended without a word"), ("crashes", 1, "torchrun ended with status 1")],
)
def test_a_job_that_compares_nothing_is_no_good_one(folder: Path, way: str, code: int, said: str) -> None:
    found, out, _ = certify(folder, way, "--output", str(folder / "c.json"))
    assert found == code
    assert out.startswith("unknown: ")
    assert said in out
    assert not (folder / "c.json").exists()


@pytest.mark.slow
def test_a_job_that_fails_on_the_way_is_no_good_one(folder: Path) -> None:
    code, out, _ = certify(folder, "fails-early", "--json")
    told = json.loads(out)
    assert (code, told["certificate"]["verdict"], len(told["certificate"]["steps"])) == (1, "bitwise", 2)
    assert "no memory" in told["job"]


@pytest.mark.slow
def test_a_script_that_opens_another_run_is_refused(folder: Path) -> None:
    train(Path(f"{folder / 'run'}-other"), 8, every=4)
    code, out, _ = certify(folder, "elsewhere")
    assert (code, "is to be certified, and the script opens" in out) == (2, True)


def test_no_job_is_started_where_nothing_is_to_be_compared(tmp_path: Path) -> None:
    train(tmp_path / "run", 4, every=4)
    code, out, err = certify(tmp_path, "well")
    assert (code, err) == (51, "")
    assert out.startswith("unknown: ")
    assert "no checkpoint that recorded steps follow" in out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 51), (signal.SIGKILL, -9)])
def test_an_interrupted_one_leaves_no_process_behind(folder: Path, number: signal.Signals, code: int) -> None:
    process = start(folder, "hangs")
    assert process.stderr is not None
    while "it hangs" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    began = time.monotonic()
    assert process.wait(WAIT_S) == code
    assert time.monotonic() - began < 15
    out, _ = process.communicate()
    assert out.strip() == ("unknown: it was ended before anything was compared (sigterm)" if code == 51 else "")
    until = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", str(folder / "run")], capture_output=True).stdout.split():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_wrong_words(folder: Path) -> None:
    for options, said in ((("--steps", "0"), "above 0"), (("--tolerance", "0"), "certify_tolerance")):
        code, _, err = certify(folder, "well", *options)
        assert (code, said in err) == (2, True), err
    code, _, err = certify(folder, "well", "--output", str(folder / "none" / "c.json"))
    assert (code, "another place with --output" in err, "certifying" in err) == (2, True, False), err
    alone = subprocess.run([*GPUMOVE, "certify", str(folder / "run")], capture_output=True, text=True, cwd=ROOT)
    assert (alone.returncode, "nothing to run" in alone.stderr) == (2, True)
