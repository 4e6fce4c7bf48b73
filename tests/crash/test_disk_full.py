"""A disk that is really full: the save fails with a clear error, and nothing that was committed is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import contextlib, pathlib, sys, pytest, gpumove
from gpumove.errors import StoreError
from tests.jobs import new_job

place = pathlib.Path(sys.argv[1])
url, ballast = str(place / "run"), place / "ballast"
job = new_job()
truth = {}
with gpumove.Checkpointer(url, **job.parts(), retry_s=2.0, codec="raw", on_save_error="warn") as ckpt:
    start = ckpt.restore()
    job.train(start, 2, ckpt)
    ckpt.save(2).wait(30)
    truth[2] = job.fingerprint()
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:  # fill the disk to the last page
            file.write(bytes(1024))
    job.train(2, 3, ckpt)
    with pytest.raises(StoreError, match="No space left.*free space there") as caught:
        ckpt.save(3).wait(60)
    assert caught.value.code == "store.no_space", caught.value.code
    other = new_job(seed=3)
    assert gpumove.load(url, model=other.model, optimizer=other.optimizer) == 2
    ballast.unlink()
    job.train(3, 4, ckpt)
    ckpt.save(4).wait(30)
    truth[4] = job.fingerprint()
again = new_job(seed=3)
with gpumove.Checkpointer(url, **again.parts()) as ckpt:
    assert ckpt.restore() == 4
assert again.fingerprint() == truth[4]
left = [p for p in place.rglob(".*") if p.is_file()]
assert not left, left
print("fine")
"""


def test_a_full_disk_costs_one_save_and_nothing_else(tmp_path: Path) -> None:
    # A file system of 1 MiB in a mount namespace of its own: no privileges are needed, and it goes with the process.
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = f"mount -t tmpfs -o size=1m tmpfs {mounted} && exec {sys.executable} {script} {mounted}"
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", command],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
