"""The recipes in examples/, as far as they go without their schedulers: read, checked, and driven by the same signals.

A scheduler is replaced by what it does to processes; `gpumove run`, torchrun and workers are real.
"""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.job.harness import ROOT, WORKER, Running
from tests.servers.process import free_port

EXAMPLES = ROOT / "examples"


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """Programs that stand first in PATH; gpumove is the real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "gpumove", f'exec {sys.executable} -m gpumove "$@"')
    return folder


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def start(folder: Path, command: list[str], *, way: str = "leaves", nproc: int = 2, **env: str) -> Running:
    """A recipe's command with a worker of ours as the training script."""
    running = Running.__new__(Running)
    running.folder, running.nproc, running._log = folder, nproc, folder / "stderr"
    script = folder / "train.py"
    script.write_text(f"import runpy, sys\nsys.argv = [{str(WORKER)!r}, {str(folder)!r}, {way!r}, '0.5']\n"
                      f"runpy.run_path({str(WORKER)!r}, run_name='__main__')\n")  # fmt: skip
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    running.start(command, {"PATH": path, "URL": str(folder / "run"), "SCRIPT": str(script), **env})
    return running


def check_shell(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


# -------------------------------------------------------------------- Slurm


def sbatch(folder: Path, bin_folder: Path, **env: str) -> Running:
    program(bin_folder, "srun", 'while [[ $1 == --* ]]; do shift; done\necho $$ > "$PLACE/task"\nexec "$@"')
    program(bin_folder, "scontrol", 'echo "$@" >> "$PLACE/scontrol"; [ "$1" != show ] || echo localhost')
    shutil.copy(EXAMPLES / "slurm/train.sbatch", folder / "slurm_script")  # Slurm runs a copy as well
    return start(
        folder, ["bash", str(folder / "slurm_script")], PLACE=str(folder), PORT=str(free_port()), RANKS="2",
        SLURM_JOB_ID="4711", SLURM_NNODES="1", SLURM_JOB_NODELIST="localhost", **env,
    )  # fmt: skip


def asked_of_scontrol(folder: Path) -> list[str]:
    return [line for line in (folder / "scontrol").read_text().splitlines() if not line.startswith("show")]


@pytest.mark.slow
def test_slurm_is_told_of_the_time_limit(tmp_path: Path, bin_folder: Path) -> None:
    check_shell((EXAMPLES / "slurm/train.sbatch").read_text())
    running = sbatch(tmp_path, bin_folder)
    running.started()
    running.send(signal.SIGUSR1)  # B: the batch shell, and nothing else
    assert running.end()[0] == 75
    assert "notice from sigusr1" in running.log
    assert asked_of_scontrol(tmp_path) == ["requeue 4711"]


@pytest.mark.slow
def test_slurm_preempts(tmp_path: Path, bin_folder: Path) -> None:
    running = sbatch(tmp_path, bin_folder, GRACE="4", way="ignores")
    running.started()
    task = int((tmp_path / "task").read_text())
    began = time.monotonic()
    for number in (signal.SIGCONT, signal.SIGTERM):
        os.kill(task, number)
    assert running.end()[0] == 76
    late_s = time.monotonic() - began - 6
    assert late_s < running.slack_s, "a GraceTime of 6 seconds: SIGKILL would have come"
    assert asked_of_scontrol(tmp_path) == ["requeue 4711"]


@pytest.mark.slow
def test_a_finished_slurm_job_is_not_requeued(tmp_path: Path, bin_folder: Path) -> None:
    running = sbatch(tmp_path, bin_folder, way="finishes")
    assert running.end()[0] == 0
    assert asked_of_scontrol(tmp_path) == []


# -------------------------------------------------------------------- Kubernetes


@pytest.mark.slow
def test_kubernetes_stops_the_pod(tmp_path: Path, bin_folder: Path) -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes/job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    place = {"/tmp/": f"{tmp_path}/", "s3://bucket/run": str(tmp_path / "run"), "train.py": str(tmp_path / "train.py")}
    command, hook = ([_moved(word, place) for word in words] for words in (container["command"], hook))
    command[command.index("--nproc-per-node") + 1] = "2"
    # As the kubelet starts it: PID 1 of its own process namespace, with no shell around it.
    namespace = ["unshare"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
    running = start(tmp_path, [*namespace, "--pid", "--fork", "--mount-proc", "--kill-child", *command])
    running.until(lambda: len(running.notes("started")) == 2, "workers")
    (pid_1,) = _children(running.process.pid)
    assert _pid_inside(pid_1) == 1
    subprocess.run(hook, check=True)
    os.kill(pid_1, signal.SIGTERM)
    code, _ = running.process.wait(60), running.process.communicate()
    assert code == 75
    assert "notice from prestop, 110 s left" in running.log or "notice from sigterm, 110 s left" in running.log
    assert int(command[command.index("--grace") + 1]) < pod["terminationGracePeriodSeconds"]


def test_kubernetes_counts_no_notice_as_a_failure() -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes/job.yaml").read_text())
    actions = {
        code: rule["action"]
        for rule in reversed(job["spec"]["podFailurePolicy"]["rules"])
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {
        75: "Ignore",
        76: "Ignore",
        2: "FailJob",
        20: "FailJob",
        30: "FailJob",
        40: "FailJob",
        77: "FailJob",
    }


def _moved(word: str, place: dict[str, str]) -> str:
    for old, new in place.items():
        word = word.replace(old, new)
    return word


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _pid_inside(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid:")]
    return int(line.split()[-1])


# -------------------------------------------------------------------- SkyPilot, dstack


def scripts() -> dict[str, tuple[str, dict[str, str]]]:
    """By recipe: what it runs, and what the scheduler puts into the environment."""
    sky: dict[str, Any] = yaml.safe_load((EXAMPLES / "skypilot/sky.yaml").read_text())
    dstack: dict[str, Any] = yaml.safe_load((EXAMPLES / "skypilot/train.dstack.yml").read_text())
    (command,) = [c for c in dstack["commands"] if "gpumove run" in c]
    nodes = {"SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "2"}
    return {"sky": (sky["run"], nodes), "dstack": (command, {"DSTACK_GPUS_PER_NODE": "2"})}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sky", "dstack"])
def test_a_notice_where_the_scheduler_gives_none(tmp_path: Path, bin_folder: Path, name: str) -> None:
    script, env = scripts()[name]
    check_shell(script)
    notice = tmp_path / "notice"
    running = start(tmp_path, ["bash", "-c", script], PORT=str(free_port()), NOTICES=f"file:{notice}", **env)
    running.started()
    if name == "sky":
        notice.touch()
    else:
        running.send(signal.SIGTERM)
    assert running.end()[0] == 75


def test_skypilot_recovers_what_left() -> None:
    sky = yaml.safe_load((EXAMPLES / "skypilot/sky.yaml").read_text())
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 76]


# -------------------------------------------------------------------- systemd


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mixed", "control-group"])
def test_systemd_stops_the_unit(tmp_path: Path, bin_folder: Path, mode: str) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(EXAMPLES / "systemd/train.service")
    service = unit["Service"]
    place = {"/srv/train/.venv/bin/gpumove": "gpumove", "s3://bucket/run": str(tmp_path / "run"),
             "train.py": str(tmp_path / "train.py"), "aws,gcp,azure": "signals", "-node 8": "-node 2"}  # fmt: skip
    command = shlex.split(_moved(service["ExecStart"], place))
    assert int(command[command.index("--grace") + 1]) < int(service["TimeoutStopSec"])
    assert service["KillMode"] == "mixed"
    running = start(tmp_path, command)
    workers = running.started()
    others = [running.torchrun(), *workers] if mode == "control-group" else []
    for pid in (running.process.pid, *others):
        os.kill(pid, signal.SIGTERM)
    assert running.end()[0] == 75


@pytest.mark.slow
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.fail("systemd-analyze is not installed")
    # Where its program is must exist; all else is taken as it is.
    text = (EXAMPLES / "systemd/train.service").read_text().replace("/srv/train/.venv/bin/gpumove", "/bin/true")
    (tmp_path / "train.service").write_text(text)
    done = subprocess.run([analyze, "verify", str(tmp_path / "train.service")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train.service" not in done.stderr, done.stderr
