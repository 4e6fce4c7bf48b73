"""export(): what load_file reads is what the job held, bit for bit, however it was cut, coded and shared."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import gpumove
from gpumove.config import Config
from gpumove.errors import ConfigError, IntegrityError, StoreError
from gpumove.format.codec import digest
from gpumove.inspection.export import convert, export
from gpumove.inspection.export_plan import runs
from gpumove.inspection.receipt import RECEIPT
from tests.runs import Shard, objects, train, write_sharded
from tests.servers import Bucket

Tensors = dict[str, torch.Tensor]
TINY = Config(chunk_bytes=4096, pack_bytes=4096, budget_bytes=8192)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, Tensors]]:
    url = str(tmp_path_factory.mktemp("exported") / "run")
    return url, train(url, [1, 2, 3])


def load_all(folder: Path) -> Tensors:
    """As a reader does who knows the index: from the files that it names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(where.values())}
    return {name: files[file][name] for name, file in where.items()}


def same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor)]
        assert torch.equal(*bits), name


# -------------------------------------------------------------------- what is written


@pytest.mark.parametrize("step", [1, 3, None])
def test_the_model_bit_for_bit(made: tuple[str, dict[int, Tensors]], tmp_path: Path, step: int | None) -> None:
    url, truth = made
    told: list[tuple[int, int]] = []
    report = export(url, tmp_path / "out", step=step, progress=lambda done, total: told.append((done, total)))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [RECEIPT, "model.safetensors"]
    same(load_all(tmp_path / "out"), truth[step or 3])
    assert (report.step, report.files, report.tensors) == (step or 3, ("model.safetensors",), len(truth[3]))
    assert told[-1] == (report.tensor_bytes, report.tensor_bytes)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_smallest_budget_will_do(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    url, truth = made
    export(url, tmp_path, config=TINY)
    same(load_all(tmp_path), truth[3])


def test_several_files_and_their_index(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    url, truth = made
    report = export(url, tmp_path, max_shard_bytes=10_000)
    names = sorted(p.name for p in tmp_path.iterdir())
    count = len(report.files)
    assert count > 3
    expected = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert names == sorted([*expected, "model.safetensors.index.json", RECEIPT])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in truth[3].values())
    assert index["weight_map"].keys() == truth[3].keys()
    same(load_all(tmp_path), truth[3])
    for name in expected:
        held = load_file(tmp_path / name)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 10_000


def test_any_part_of_the_names(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    url, truth = made
    export(url, tmp_path / "norm", what="model.norm")
    norm = {k.removeprefix("norm."): v for k, v in truth[3].items() if k.startswith("norm.")}
    same(load_all(tmp_path / "norm"), norm)
    export(url, tmp_path / "one", what="model.embed.weight")
    same(load_all(tmp_path / "one"), {"weight": truth[3]["embed.weight"]})
    export(url, tmp_path / "all", what="all")
    every = load_all(tmp_path / "all")
    same({k.removeprefix("model."): v for k, v in every.items() if k.startswith("model.")}, truth[3])
    assert {k.split(".")[0] for k in every} == {"model", "optimizer", "rng"}
    with pytest.raises(ConfigError, match="no tensors under 'mode'; it has model, optimizer, rng"):
        export(url, tmp_path / "none", what="mode")


def test_tied_tensors_under_one_name(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    url, truth = made
    report = export(url, tmp_path, drop_tied=True)
    assert report.tied == {"head.weight": "embed.weight"}
    same(load_all(tmp_path), {k: v for k, v in truth[3].items() if k != "head.weight"})


def test_another_dtype(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    url, truth = made
    export(url, tmp_path, dtype="bfloat16", max_shard_bytes=8000)
    wide = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    same(load_all(tmp_path), {k: v.bfloat16() if v.dtype in wide else v for k, v in truth[3].items()})
    with pytest.raises(ConfigError, match="int8"):
        export(url, tmp_path / "no", dtype="int8")


def test_another_dtype_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="needs torch"):
        convert(memoryview(b"1234"), "float32", "bfloat16")


# -------------------------------------------------------------------- sharded tensors


def grid(whole: torch.Tensor, *counts: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes as uneven as torch's chunk() makes them."""
    cuts = []
    for length, count in zip(whole.shape, counts):
        step = -(-length // count)
        cuts.append([(o, min(step, length - o)) for o in range(0, length, step)])
    return [(tuple(o for o, _ in box), tuple(n for _, n in box)) for box in itertools.product(*cuts)]


def test_tensors_cut_across_ranks(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = {
        "rows": (torch.randn(37, 65, generator=generator), (4, 1)),
        "columns": (torch.randn(37, 65, generator=generator), (1, 4)),
        "grid": (torch.randn(31, 6, 40, generator=generator).bfloat16(), (2, 1, 2)),
        "wide_rows": (torch.randn(3, 5000, generator=generator), (1, 2)),
        "one": (torch.tensor(3.5), ()),
        "vector": (torch.randn(10_001, generator=generator), (4,)),
        "mask": (torch.rand(50, 50, generator=generator) > 0.5, (2, 2)),
    }
    ranks: list[list[Shard]] = [[] for _ in range(4)]
    for name, (tensor, counts) in whole.items():
        for rank, (offset, shape) in enumerate(grid(tensor, *counts)):
            ranks[rank].append(Shard(f"model.{name}", tensor, offset, shape))
    for rank, shards in enumerate(ranks):
        buffer = torch.full((30,), float(rank))
        shards.append(Shard("model.norm.running_mean", buffer, (0,), (30,), True))
    write_sharded(str(tmp_path / "run"), 9, ranks)
    expected = {name: tensor for name, (tensor, _) in whole.items()} | {"norm.running_mean": torch.zeros(30)}
    for n, options in enumerate(({}, {"max_shard_bytes": 20_000}, {"config": TINY})):
        export(str(tmp_path / "run"), tmp_path / str(n), **options)  # type: ignore[arg-type]
        same(load_all(tmp_path / str(n)), expected)
    export(str(tmp_path / "run"), tmp_path / "half", dtype="float16")
    same(load_all(tmp_path / "half"), {k: v.half() if v.is_floating_point() else v for k, v in expected.items()})


@given(st.data())
def test_runs_of_any_box(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    offset = [data.draw(st.integers(0, n - 1)) for n in shape]
    box = [data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset)]
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, box))].reshape(-1)
    found = [range(first, first + count) for first, count in runs(shape, offset, box)]
    assert [i for r in found for i in r] == list(expected)
    if box == shape:
        assert len(found) == 1


def test_extra_state_is_not_a_weight(tmp_path: Path) -> None:
    value, weight = torch.ones(20), torch.zeros(20)
    shards = [
        Shard("model.w", weight, (0,), (20,)),
        Shard("model.extra.q._extra_state", value, (0,), (20,), True),
        Shard("model.extra.running", value, (0,), (20,), True),  # a submodule may well be called "extra"
    ]
    tree = {"model": {"q._extra_state": {"$tensor": "model.extra.q._extra_state"}}}
    write_sharded(str(tmp_path / "run"), 1, [shards], values=tree)
    export(str(tmp_path / "run"), tmp_path / "out")
    same(load_all(tmp_path / "out"), {"w": weight, "extra.running": value})


def test_a_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    odd = torch.zeros(100).to(torch.float8_e4m3fnuz)
    write_sharded(str(tmp_path / "run"), 1, [[Shard("model.odd", odd, (0,), (100,))]])
    with pytest.raises(ConfigError, match=r"odd \(float8_e4m3fnuz\)"):
        export(str(tmp_path / "run"), tmp_path / "out")


# -------------------------------------------------------------------- the folder


def test_a_folder_that_is_not_empty(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    url, truth = made
    export(url, tmp_path, step=1, max_shard_bytes=10_000)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".model.safetensors.01234567.part").write_text("left behind")
    before = objects(tmp_path)
    with pytest.raises(ConfigError, match="is not empty"):
        export(url, tmp_path)
    assert objects(tmp_path) == before
    export(url, tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", RECEIPT, "model.safetensors"]
    same(load_all(tmp_path), truth[3])
    with pytest.raises(ConfigError, match="is a file"):
        export(url, tmp_path / "config.json")


def test_a_damaged_checkpoint_leaves_an_earlier_export_alone(tmp_path: Path) -> None:
    url, out = tmp_path / "run", tmp_path / "out"
    train(str(url), [1, 2])
    export(str(url), out, step=1)
    before = objects(out)
    for pack in (url / "packs" / "00000001-00000002").iterdir():
        pack.write_bytes(bytes(pack.stat().st_size))
    with pytest.raises(IntegrityError, match=r"packs/00000001-00000002/.* is damaged at bytes"):
        export(str(url), out, force=True)
    assert objects(out) == before


def test_a_disk_that_is_full(
    made: tuple[str, dict[int, Tensors]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gpumove.inspection.export.os.pwrite", full)
    with pytest.raises(StoreError, match="No space left"):
        export(made[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_known_to_be_too_small(
    made: tuple[str, dict[int, Tensors]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumove.inspection.export.shutil.disk_usage", lambda _: _Usage())
    with pytest.raises(StoreError, match="100 bytes free") as caught:
        export(made[0], tmp_path)
    assert caught.value.code == "store.no_space"


class _Usage:
    free = 100


def test_exporting_needs_no_torch(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    code = (
        "import sys; from gpumove.inspection.export import export; "
        f"export({made[0]!r}, {str(tmp_path)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    same(load_all(tmp_path), made[1][3])


# -------------------------------------------------------------------- for others to find


def test_a_folder_appears_whole_or_not_at_all(
    made: tuple[str, dict[int, Tensors]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, truth = made
    out, seen = tmp_path / "models" / "step-3", []
    export(url, out, max_shard_bytes=10_000, progress=lambda done, total: seen.append(out.exists()))
    assert not any(seen)
    assert [p.name for p in out.parent.iterdir()] == ["step-3"]
    same(load_all(out), truth[3])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match="No space"):
        export(url, tmp_path / "models" / "other")
    assert [p.name for p in out.parent.iterdir()] == ["step-3"]


def test_the_receipt_names_the_checkpoint_and_every_file(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    url, _ = made
    out = tmp_path / "out"
    export(url, out, step=2, max_shard_bytes=10_000, dtype="bfloat16")
    found = json.loads((out / RECEIPT).read_text())
    (checkpoint,) = (c for c in gpumove.checkpoints(url) if c.step == 2)
    assert (found["step"], found["attempt"], found["manifest"]) == (2, checkpoint.attempt, checkpoint.manifest)
    assert (found["what"], found["dtype"]) == ("model", "bfloat16")
    files = {p.name: {"nbytes": p.stat().st_size, "digest": digest(p.read_bytes())} for p in out.iterdir()}
    del files[RECEIPT]
    assert found["files"] == files


def test_what_belongs_beside_weights_is_taken_along(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    url, truth = made
    source = tmp_path / "base"
    source.mkdir()
    kept = {"config.json": b"{}", "tokenizer.model": b"\0\1", "README.md": b"hello", "merges.txt": b""}
    for name, data in kept.items():
        (source / name).write_bytes(data)
    (tmp_path / "blob").write_bytes(b"linked")
    (source / "vocab.json").symlink_to(tmp_path / "blob")
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", ".gitattributes", RECEIPT):
        (source / name).write_bytes(b"not this")
    (source / "folder").mkdir()
    export(url, tmp_path / "out", beside=source)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted([*kept, "vocab.json", "model.safetensors", RECEIPT])
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in kept.items())
    assert (tmp_path / "out" / "vocab.json").read_bytes() == b"linked"
    same(load_all(tmp_path / "out"), truth[3])
    for left in (".config.json.01234567.part", ".mine.01234567.part"):
        (tmp_path / "out" / left).write_text("left behind")
    export(url, tmp_path / "out", beside=source, force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([".mine.01234567.part", *names])
    for bad in (tmp_path / "absent", source / "folder"):
        with pytest.raises(ConfigError):
            export(url, tmp_path / "no", beside=bad)
    assert not (tmp_path / "no").exists()


def test_publish_takes_an_export_of_just_this_checkpoint(
    made: tuple[str, dict[int, Tensors]], tmp_path: Path, s3_server: Bucket
) -> None:
    url, _ = made
    out = tmp_path / "out"
    export(url, out, step=3)
    pointer = gpumove.publish(url, 3, "canary", export=out)
    assert pointer.export is not None
    assert pointer.export.url == out.as_uri()
    assert pointer.export.files["model.safetensors"].digest == digest((out / "model.safetensors").read_bytes())
    assert gpumove.promote(url, "canary", "production", gate=False).export == pointer.export
    there = f"{s3_server.url}/exported-{tmp_path.name}"
    gpumove.replicate(str(out), there, to_options=s3_server.options)
    moved = gpumove.publish(url, 3, "canary", export=there, export_options=s3_server.options)
    assert moved.export is not None
    assert (moved.export.url, moved.export.files) == (there, pointer.export.files)
    with pytest.raises(ConfigError, match="exported from another checkpoint \\(step 3,"):
        gpumove.publish(url, 2, "canary", export=out)
    with pytest.raises(ConfigError, match=f"has no {RECEIPT}"):
        gpumove.publish(url, 3, "canary", export=tmp_path)
    (out / "model.safetensors").write_bytes(b"short")
    with pytest.raises(IntegrityError, match=r"is not whole: model\.safetensors"):
        gpumove.publish(url, 3, "canary", export=out)
    (out / RECEIPT).write_bytes(b"{")
    with pytest.raises(ConfigError, match="cannot be read"):
        gpumove.publish(url, 3, "canary", export=out)


def test_a_configuration_states_the_dtype_of_the_weights(made: tuple[str, dict[int, Tensors]], tmp_path: Path) -> None:
    url, _ = made
    for number, (text, dtype, stated) in enumerate((
        ('{"torch_dtype": "float32", "n": 1}', "bfloat16", {"torch_dtype": "bfloat16", "n": 1}),
        ('{"dtype": "float32"}', "float16", {"dtype": "float16"}),
        ('{"dtype": "float32"}', None, {"dtype": "float32"}),
        ('{"n": 1}', "bfloat16", {"n": 1}),
        ("[1]", "bfloat16", [1]),
    )):  # fmt: skip
        source = tmp_path / f"base{number}"
        source.mkdir()
        (source / "config.json").write_text(text)
        export(url, tmp_path / f"out{number}", beside=source, dtype=dtype)
        assert json.loads((tmp_path / f"out{number}" / "config.json").read_text()) == stated
