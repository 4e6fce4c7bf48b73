"""The verbs of the hand-over to serving, as people and programs call them; and that none of it shows a secret."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpumove.cli import main
from tests.servers import Bucket, s3
from tests.serving.test_pointers import make
from tests.test_secrets import all_objects, check, nothing_said, said_by


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line; its exit code and both outputs."""

    def call(words: str, **values: Any) -> tuple[int, str, str]:
        code = main(shlex.split(words.format(**values)))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_from_a_checkpoint_to_production_and_back(said: Any, tmp_path: Path) -> None:
    url = tmp_path / "run"
    outputs = make(str(url), 3)
    for step, tensor in outputs.items():
        save_file({"output": tensor}, tmp_path / f"{step}.safetensors")
    at = {"url": url, "at": tmp_path}
    assert said("pointers {url}", **at)[:2] == (0, "nothing is published\n")
    assert said("publish {url} 1 --as canary --text 'a first try'", **at)[:2] == (
        0, "canary stands for step 1 now (number 1)\n",
    )  # fmt: skip
    code, out, err = said("promote {url} canary --to production", **at)
    assert (code, out) == (2, "")
    assert "the gate is closed" in err
    assert said("promote {url} canary --to production --outputs {at}/1.safetensors", **at)[:2] == (
        0, "production stands for step 1 now (number 1, gate: bitwise)\n",
    )  # fmt: skip
    said("publish {url} 3 --as canary --outputs {at}/3.safetensors", **at)
    code, _, err = said("promote {url} canary --to production --outputs {at}/2.safetensors", **at)
    assert code == 50
    assert "different (output: differs by up to" in err
    code, out, _ = said("promote {url} canary --to production --outputs {at}/2.safetensors --json", **at)
    assert (code, json.loads(out)["code"]) == (50, "parity.different")
    code, out, _ = said(
        "promote {url} canary --to production --outputs {at}/2.safetensors --tolerance 2 --json --probe probe", **at
    )
    found = json.loads(out)
    assert (code, found["step"], found["source"], found["gate"]["verdict"]) == (0, 3, "canary", "within tolerance")
    assert said("demote {url} production", **at)[1] == "production stands for step 1 now (number 3, gate: bitwise)\n"
    assert said("demote {url} canary --retire", **at)[1] == "canary stands for nothing now (number 3)\n"
    code, out, _ = said("pointers {url}", **at)
    assert [line.split()[:4] for line in out.splitlines()[1:]] == [
        ["canary", "3", "nothing", "retire"], ["production", "3", "1", "demote"],
    ]  # fmt: skip
    code, out, _ = said("pointers {url} canary --json", **at)
    assert [(p["number"], p.get("step"), p.get("text", "")) for p in json.loads(out)["pointers"]] == [
        (1, 1, "a first try"), (2, 3, ""), (3, None, ""),
    ]  # fmt: skip
    assert said("pointers {url} other", **at)[0] == 2
    for bad in (
        "--tolerance x",
        "--tolerance nan",
        "--outputs {at}/none",
        "--probe other --outputs {at}/3.safetensors",
    ):
        code, _, err = said("publish {url} 3 --as x --outputs {at}/3.safetensors " + bad, **at)
        assert code == 2, bad
    assert said("pointers {url} x", **at)[0] == 2


def test_a_gate_that_would_be_none_is_not_passed_in_silence(said: Any, tmp_path: Path) -> None:
    at = {"url": tmp_path / "run", "at": tmp_path}
    save_file({"output": make(str(tmp_path / "run"), 1)[1]}, tmp_path / "o.safetensors")
    assert said("publish {url} 1 --as canary", **at)[0] == 0
    for words, why in (
        ("publish {url} 1 --as x --tolerance 0.1", "say how outputs are compared"),
        ("publish {url} 1 --as x --probe probe", "say how outputs are compared"),
        ("promote {url} canary --to x --tolerance 0.1", "say how outputs are compared"),
        ("promote {url} canary --to x --no-gate --tolerance 0.1", "say how outputs are compared"),
        ("promote {url} canary --to x --no-gate --outputs {at}/o.safetensors", "leave out one of the two"),
    ):
        code, out, err = said(words, **at)
        assert (code, out, why in err) == (2, "", True), (words, err)
    assert said("pointers {url} x", **at)[0] == 2, "nothing was published"


def test_publishing_needs_no_torch(tmp_path: Path) -> None:
    outputs = make(str(tmp_path / "run"), 1)
    save_file({"output": outputs[1]}, tmp_path / "o.safetensors")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from gpumove.cli import main\n"
        "run, outputs = sys.argv[1:]\n"
        "assert main(['publish', run, '1', '--as', 'canary', '--outputs', outputs]) == 0\n"
        "assert main(['pointers', run]) == 0\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "o.safetensors")]
    done = subprocess.run(words, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_pointers_hold_no_secret(
    s3_server: Bucket, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    url, options = f"{s3_server.url}/published-{tmp_path.name}", s3_server.options
    there = f"{s3_server.url}/exported-{tmp_path.name}"
    with nothing_said(capfd, caplog, [s3.SECRET]) as so_far:
        save_file({"output": make(url, 1, options=options)[1]}, tmp_path / "o.safetensors")
        assert main(["export", url, "1", str(tmp_path / "out"), *said_by(options)]) == 0
        assert main(["replicate", str(tmp_path / "out"), there, *said_by(options, "--to-option")]) == 0
        export = ["--export", there, *said_by(options, "--export-option")]
        gate = ["--outputs", str(tmp_path / "o.safetensors")]
        for words in (
            ["publish", url, "1", "--as", "canary", *export, *gate],
            ["promote", url, "canary", "--to", "production", *gate],
            ["demote", url, "canary", "--retire"], ["pointers", url], ["pointers", url, "canary"],
        ):  # fmt: skip
            for form in (["--json"], ["--debug"]):
                assert main([*words, *said_by(options), *form]) == 0
        assert main(["publish", url, "9", "--as", "canary", *said_by(options), "--debug"]) == 2
        assert there in so_far()
    objects: Mapping[str, bytes] = all_objects(url, options)
    assert sum(name.startswith("pointers/") for name in objects) == 6
    for name, data in objects.items():
        check(data, [s3.SECRET], name)


def test_a_probe_of_the_serving_dtype(tmp_path: Path) -> None:
    """What is served in bfloat16 passes as that, and not as anything."""
    outputs = make(str(tmp_path / "run"), 2)
    save_file({"output": outputs[2].bfloat16()}, tmp_path / "two.safetensors")
    save_file({"output": outputs[1].bfloat16()}, tmp_path / "one.safetensors")
    publish = ["publish", str(tmp_path / "run"), "2", "--as", "canary", "--outputs"]
    assert main([*publish, str(tmp_path / "two.safetensors")]) == 0
    assert main([*publish, str(tmp_path / "one.safetensors")]) == 50
    assert not torch.equal(outputs[1], outputs[2])
