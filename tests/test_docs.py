"""The documentation is true: its blocks run, its tables list what there is, its links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gpumove
from gpumove.handle import SaveStats

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/guide.md", "examples/README.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[Any]:
    """The Python blocks of a page, each under its line number and padded, so that tracebacks point into the page."""
    text = (ROOT / page).read_text()
    found = [(text.count("\n", 0, m.start(1)), m.group(1)) for m in BLOCK.finditer(text)]
    return [pytest.param("\n" * line + code, id=f"line {line + 1}") for line, code in found]


def run(code: str, page: str, names: dict[str, Any]) -> None:
    exec(compile(code, str(ROOT / page), "exec"), names)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of one, for DDP; and generators as they were."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    dist.destroy_process_group()


@pytest.fixture
def names(tmp_path: Path, one_rank: None) -> dict[str, Any]:
    """What the guide says that its blocks use."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dataset = torch.utils.data.TensorDataset(torch.randn(400, 8), torch.randn(400, 1))
    loss_of = torch.nn.functional.mse_loss

    def train_step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return {
        "gpumove": gpumove,
        "torch": torch,
        "url": str(tmp_path / "run"),
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, step_size=100),
        "dataset": dataset,
        "loader": gpumove.ElasticLoader(dataset, batch_size=8, shuffle=True, seed=0),
        "heldout": [(torch.randn(8, 8), torch.randn(8, 1))],
        "loss_of": loss_of,
        "train_step": train_step,
        "generator": torch.nn.Linear(4, 4),
        "critic": torch.nn.Linear(4, 1),
        "ema": torch.optim.swa_utils.AveragedModel(model),
    }


@pytest.mark.parametrize("code", blocks("docs/guide.md"))
def test_guide(code: str, names: dict[str, Any]) -> None:
    run(code, "docs/guide.md", names)


def test_serving(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks belong together; the last is a server, which is stopped once it serves."""
    monkeypatch.chdir(tmp_path)
    served, stop = [], threading.Event()

    def serve(model: Any, step: int) -> None:
        served.append(step)
        stop.set()

    names |= {"serve": serve, "stop": stop}
    first, *others = [parameter.values[0] for parameter in blocks("docs/serving.md")]
    run(first, "docs/serving.md", names)
    gpumove.publish(names["url"], 1, "canary")
    for code in others:
        run(code, "docs/serving.md", names)
    assert served == [1]
    assert gpumove.resolve(names["url"], "production").gate["verdict"] == "bitwise"


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks belong together, and the first is a script that may be started again."""
    monkeypatch.chdir(tmp_path)
    first, *others = [parameter.values[0] for parameter in blocks("README.md")]
    with torch.random.fork_rng():
        run(first, "README.md", {})
        done: dict[str, Any] = {}
        run(first, "README.md", done)
        for code in others:
            run(code, "README.md", done)
    assert done["step"] == 512
    assert (tmp_path / "runs" / "first" / "log").is_dir()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert links
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def rows(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    below = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].lstrip()
    table = next(part for part in below.split("\n\n") if part.startswith("|")).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_configuration_table_lists_all_fields_with_their_defaults() -> None:
    told = [(row[0].strip("`"), ast.literal_eval(row[1].strip("`"))) for row in rows("README.md", "Configuration")]
    assert told == [(field.name, field.default) for field in dataclasses.fields(gpumove.Config)]


def test_guide_lists_all_statistics_of_a_save() -> None:
    told = [row[0].strip("`").removeprefix("stats.") for row in rows("docs/guide.md", "Saves") if "`stats." in row[0]]
    assert told == [field.name for field in dataclasses.fields(SaveStats)] + ["upload_bytes_per_s"]


def test_guide_lists_the_exit_codes() -> None:
    told = {row[0].strip("`"): int(row[1]) for row in rows("docs/guide.md", "When a save fails")}
    errors = [error for error in vars(gpumove.errors).values() if isinstance(error, type)]
    direct = {error.__name__: error.exit_code for error in errors if error.__base__ is gpumove.GpumoveError}
    assert told == direct


def test_command_table_lists_all_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    from gpumove.cli import main

    told = [shlex.split(row[0].strip("`"))[1] for row in rows("README.md", "Command line")]
    for verb in told:
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^ {4}([a-z]+)\s+\S", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(told)
