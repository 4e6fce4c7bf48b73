"""checkpoints() and verify(): what is sound is called sound, and every kind of harm is found and named."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.format.codec import digest
from gpumove.format.dtypes import item_bytes
from gpumove.inspection.doctor import doctor
from gpumove.inspection.export import export
from gpumove.inspection.run import VerifyReport, checkpoints, open_run, verify
from gpumove.inspection.summary import detail, overview
from gpumove.inspection.survey import Survey
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.runs import Shard, flip, objects, train, write_sharded

STEPS = [1, 2, 3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints; the frozen layer lies in the first one's packs only."""
    url = tmp_path_factory.mktemp("inspected") / "run"
    train(str(url), STEPS)
    return url


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to harm."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def one(run: Path, room: str, attempt: int) -> Path:
    """The first object of a room that belongs to an attempt."""
    return next(p for p in sorted(run.glob(f"{room}/**/*")) if p.is_file() and f"00000001-{attempt:08d}" in str(p))


def key(run: Path, path: Path) -> str:
    return str(path.relative_to(run))


def find(report: VerifyReport, path: str) -> Any:
    (found,) = [d for d in report.damage if d.object == path]
    return found


# -------------------------------------------------------------------- what is sound


def test_checkpoints_are_listed_oldest_first(made: Path) -> None:
    assert [c.step for c in checkpoints(str(made))] == STEPS


def test_memory_runs_can_be_looked_at_too() -> None:
    url = "memory://inspected/run"
    train(url, [1, 2])
    assert [c.step for c in checkpoints(url)] == [1, 2]
    assert verify(url, deep=True).sound


def test_every_kind_of_store(store_url: tuple[str, Mapping[str, Any]], tmp_path: Path) -> None:
    url, options = store_url
    truth = train(url, [1, 2], storage_options=options)
    assert [c.step for c in checkpoints(url, storage_options=options)] == [1, 2]
    assert verify(url, deep=True, storage_options=options).sound
    assert export(url, tmp_path / "out", storage_options=options).tensors == len(truth[2])
    assert {c.name: c.status for c in doctor(url, storage_options=options)}.items() >= {
        "run": "ok",
        "write": "ok",
    }.items()


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_run(made: Path, deep: bool) -> None:
    before, told = objects(made), []
    report = verify(str(made), deep=deep, progress=lambda done, total: told.append((done, total)))
    assert report.sound
    assert report.damage == ()
    assert report.newest_sound == 3
    assert [c.step for c in report.checkpoints if c.sound] == STEPS
    packs = {k: v for k, v in before.items() if k.startswith("packs/")}
    needed = {k: v for k, v in before.items() if k.split("/")[0] in ("packs", "parts", "manifests")}
    assert report.objects == len(needed)
    assert report.object_bytes == sum(map(len, needed.values()))
    assert report.read_bytes == (sum(map(len, packs.values())) if deep else 0)
    assert (told[-1] == (report.read_bytes, report.read_bytes) and told == sorted(told)) if deep else told == []
    assert objects(made) == before
    again = msgspec.json.decode(msgspec.json.encode(report), type=VerifyReport)
    assert again == report


def test_one_step_is_verified_alone(run: Path) -> None:
    one(run, "manifests", 3).unlink()
    assert verify(str(run), step=2).sound
    assert not verify(str(run), step=3).sound
    with pytest.raises(ConfigError, match="no checkpoint of step 9; the newest are of steps 1, 2, 3"):
        verify(str(run), step=9)


def test_no_run(tmp_path: Path) -> None:
    for look in (checkpoints, verify):
        with pytest.raises(ConfigError, match="no gpumove run") as caught:
            look(str(tmp_path))
        assert caught.value.code == "config.no_run"
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_commit(tmp_path: Path) -> None:
    log = Log(Store.open(str(tmp_path), Config()))
    log.open(create=True)
    log.claim()
    assert checkpoints(str(tmp_path)) == []
    report = verify(str(tmp_path), deep=True)
    assert (report.sound, report.newest_sound, report.objects) == (True, None, 0)


def test_packs_larger_than_the_budget_are_read_one_by_one(made: Path) -> None:
    tight = Config(chunk_bytes=4096, pack_bytes=4096, budget_bytes=8192)
    assert verify(str(made), deep=True, config=tight).sound


def test_every_dtype_of_torch_has_its_size() -> None:
    dtypes = {v for v in vars(torch).values() if isinstance(v, torch.dtype)}
    assert [d for d in dtypes if item_bytes(str(d).removeprefix("torch.")) != d.itemsize] == []
    with pytest.raises(ConfigError, match="upgrade gpumove"):
        item_bytes("float3")


# -------------------------------------------------------------------- what is harmed


@pytest.mark.parametrize("room", ["manifests", "parts", "packs"])
def test_missing_objects(run: Path, room: str) -> None:
    victim = one(run, room, 3)
    victim.unlink()
    report = verify(str(run))
    found = find(report, key(run, victim))
    assert len(report.damage) == 1
    assert (found.problem, found.code, found.steps) == ("it is missing", "integrity.missing", (3,))
    assert bool(found.tensors) == (room == "packs")
    assert report.newest_sound == 2


@pytest.mark.parametrize("room", ["manifests", "parts", "packs"])
@pytest.mark.parametrize("longer", [False, True])
def test_objects_of_another_size(run: Path, room: str, longer: bool) -> None:
    victim = one(run, room, 3)
    data = victim.read_bytes()
    victim.write_bytes(data + b"x" if longer else data[:-1])
    for deep in (False, True):
        found = find(verify(str(run), deep=deep), key(run, victim))
        assert found.code == "integrity.size"
        assert found.problem == f"it has {victim.stat().st_size} bytes instead of {len(data)}"
        assert found.steps == (3,)


@pytest.mark.parametrize("room", ["manifests", "parts"])
def test_a_flipped_bit_in_any_byte_of_a_record(run: Path, room: str) -> None:
    victim = one(run, room, 2)
    chance = random.Random(1)
    for at in chance.sample(range(victim.stat().st_size), 8):
        flip(victim, at)
        report = verify(str(run))
        assert find(report, key(run, victim)).steps == (2,)
        assert report.newest_sound == 3
        flip(victim, at)


@pytest.mark.parametrize("victim", ["format.json", "log/00000000000000000002.json"])
def test_a_flipped_bit_in_what_checks_itself(run: Path, victim: str) -> None:
    flip(run / victim, -40)
    report = verify(str(run))
    assert [d.object for d in report.damage] == [victim]
    assert report.newest_sound == 3  # the rest was looked at all the same


def test_a_flipped_bit_in_any_byte_of_a_pack(run: Path) -> None:
    packs = sorted((run / "packs").rglob("*.safetensors"))
    chance = random.Random(2)
    for _ in range(25):
        victim = chance.choice(packs)
        at = chance.randrange(victim.stat().st_size)
        flip(victim, at)
        assert verify(str(run)).sound, "only --deep reads packs"
        report = verify(str(run), deep=True)
        assert [d.object for d in report.damage] == [key(run, victim)]
        flip(victim, at)
    assert verify(str(run), deep=True).sound


def spot(run: Path, fqn: str, attempt: int) -> tuple[Path, int]:
    """Where the first chunk of a tensor lies."""
    part = json.loads(one(run, "parts", attempt).read_bytes())
    chunk = next(t for t in part["tensors"] + part["local"] if t["fqn"] == fqn)["chunks"][0]
    pack = part["packs"][chunk["pack"]]
    return run / f"packs/{pack['attempt']}/{pack['digest']}.safetensors", chunk["at"]


def test_a_chunk_that_three_checkpoints_share(run: Path) -> None:
    victim, at = spot(run, "model.frozen.weight", 3)
    assert "00000001-00000001" in str(victim)
    flip(victim, at)
    report = verify(str(run), deep=True)
    found = find(report, key(run, victim))
    assert (found.steps, found.tensors, found.code) == ((1, 2, 3), ("model.frozen.weight",), "integrity.chunk")
    assert report.newest_sound is None


def test_a_chunk_that_only_the_oldest_needs(run: Path) -> None:
    victim, at = spot(run, "model.embed.weight", 1)
    flip(victim, at)
    report = verify(str(run), deep=True)
    found = find(report, key(run, victim))
    assert found.steps == (1,)
    assert found.tensors == ("model.embed.weight", "model.head.weight")
    assert report.newest_sound == 3


def test_a_pack_that_is_missing_names_its_tensors(run: Path) -> None:
    victim, _ = spot(run, "model.frozen.weight", 3)
    victim.unlink()
    for deep in (False, True):
        found = find(verify(str(run), deep=deep), key(run, victim))
        assert found.steps == (1, 2, 3)
        assert "model.frozen.weight" in found.tensors


def test_a_pack_harmed_where_no_checkpoint_looks(run: Path) -> None:
    # One without differences: those cannot be judged without what they refer to, and count as harmed.
    packs = sorted((run / "packs/00000001-00000002").iterdir(), key=lambda pack: pack.stat().st_size)
    victim = next(pack for pack in packs if b"#sub/" not in pack.read_bytes())
    flip(victim, 20)  # its safetensors header
    report = verify(str(run), deep=True)
    found = find(report, key(run, victim))
    assert (found.steps, found.tensors) == ((), ())
    assert "every chunk that checkpoints need is sound" in found.problem
    assert not report.sound
    assert report.newest_sound == 3
    assert all(c.sound for c in report.checkpoints)


def test_all_damage_is_listed(run: Path) -> None:
    victims = [one(run, "packs", 1), one(run, "parts", 2), one(run, "manifests", 3)]
    for victim in victims:
        victim.unlink()
    report = verify(str(run))
    assert {d.object for d in report.damage} == {key(run, v) for v in victims}
    assert report.newest_sound is None


def test_a_hole_in_the_log(run: Path) -> None:
    (run / "log/00000000000000000003.json").unlink()
    report = verify(str(run))
    assert find(report, "log/00000000000000000003.json").code == "integrity.log_hole"
    assert [c.step for c in report.checkpoints] == [1, 3]
    assert not report.sound


def test_the_log_lost_its_beginning(run: Path) -> None:
    for number in (1, 2):
        (run / f"log/{number:020d}.json").unlink()
    assert [d.code for d in verify(str(run)).damage] == ["integrity.log_hole"]


def test_the_log_after_a_collection_needs_no_beginning(run: Path) -> None:
    with open_run(str(run)) as log:
        log.read()
        collect(log, Retention(keep_last=1))
        collect(log, Retention(keep_last=1))
    # The gc entry before the newest stays, should that one rot.
    assert [int(p.stem) for p in sorted((run / "log").iterdir())] == [5, 6]
    report = verify(str(run), deep=True)
    assert report.sound
    assert [c.step for c in report.checkpoints] == [3]


def test_a_missing_format_with_a_log(run: Path) -> None:
    (run / "format.json").unlink()
    assert find(verify(str(run)), "format.json").code == "integrity.missing"


def test_a_newer_format_is_refused(run: Path) -> None:
    body = b'{"format":2,"name":"gpumove","run":"x"'
    (run / "format.json").write_bytes(body + b',"check":"' + digest(body).encode() + b'"}')
    for look in (checkpoints, verify):
        with pytest.raises(ConfigError, match="upgrade gpumove"):
            look(str(run))


def rewrite(run: Path, attempt: int, change: Any) -> None:
    """Change a part, and whatever names it by its digest, as a faulty writer would have written it."""
    path, manifest = one(run, "parts", attempt), one(run, "manifests", attempt)
    part, record = json.loads(path.read_bytes()), json.loads(manifest.read_bytes())
    change(part)
    data = json.dumps(part).encode()
    path.unlink()
    name = f"{path.name[:6]}-{digest(data)}-{path.name.split('-')[2]}-{path.name.split('-')[3]}"
    path.with_name(name).write_bytes(data)
    record["parts"][0] |= {"key": key(run, path.with_name(name)), "digest": digest(data), "nbytes": len(data)}
    text = json.dumps(record).encode()
    manifest.unlink()
    manifest.with_name(f"00000001-{attempt:08d}-{digest(text)}.json").write_bytes(text)
    entry = next(p for p in (run / "log").iterdir() if f"00000001-{attempt:08d}".encode() in p.read_bytes())
    said = json.loads(entry.read_bytes()) | {"manifest": digest(text), "manifest_bytes": len(text)}
    del said["check"]
    body = json.dumps(said, separators=(",", ":")).encode()[:-1]
    entry.write_bytes(body + b',"check":"' + digest(body).encode() + b'"}')


def test_chunks_that_do_not_make_up_a_tensor(run: Path) -> None:
    def lose(part: Any) -> None:
        next(t for t in part["tensors"] if t["fqn"] == "model.frozen.weight")["chunks"].pop()
        next(t for t in part["local"] if t["fqn"] == "model.zeros")["chunks"].pop()
        next(t for t in part["tensors"] if t["fqn"] == "model.scale")["chunks"][0]["inline"] = "AAA="

    rewrite(run, 3, lose)
    report = verify(str(run))
    whole, part = sorted(report.damage, key=lambda d: d.object)
    assert (whole.code, whole.tensors) == ("integrity.cover", ("model.frozen.weight",))
    assert "do not make up model.zeros" in part.problem
    assert "model.scale travels inline with 2 bytes instead of 4" in part.problem
    assert report.newest_sound == 2


def test_a_part_that_points_at_other_bytes(run: Path) -> None:
    def point(part: Any) -> None:
        chunks = next(t for t in part["tensors"] if t["fqn"] == "model.frozen.weight")["chunks"]
        chunks[0]["at"], chunks[1]["at"] = chunks[1]["at"], chunks[0]["at"]

    rewrite(run, 3, point)
    assert verify(str(run)).sound
    (found,) = verify(str(run), deep=True).damage
    assert (found.code, found.steps, found.tensors) == ("integrity.chunk", (3,), ("model.frozen.weight",))


def test_what_retention_takes_meanwhile_is_not_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Survey.check_sizes

    def collected(survey: Survey) -> None:
        with open_run(str(run)) as log:
            log.read()
            collect(log, Retention(keep_last=1))
        sizes(survey)

    monkeypatch.setattr(Survey, "check_sizes", collected)
    report = verify(str(run), deep=True)
    assert report.sound
    assert [c.step for c in report.checkpoints] == [3]


# -------------------------------------------------------------------- what ls and show are made of


def test_what_would_be_resumed(run: Path) -> None:
    with open_run(str(run)) as log:
        assert overview(log).resume.step == 3
        one(run, "manifests", 3).unlink()
        found = overview(log)
        assert (found.resume.step, found.resume.entry) == (2, 3)
        assert "step 3 (entry 4): its manifest is missing" in found.resume.why
        log.note("seen", damaged=[3])
        assert overview(log).resume.step == 1
        one(run, "manifests", 1).unlink()
        assert overview(log).resume.entry is None
        assert "restore() fails" in overview(log).resume.why


def test_a_checkpoint_in_figures(run: Path) -> None:
    with open_run(str(run)) as log:
        log.read()
        first, _, last = (detail(log, c, config=Config(), tensors=True) for c in log.view.checkpoints)
    assert first.older_stored_bytes == 0
    groups = {g.name: g for g in last.groups}
    frozen = groups["model.frozen"]
    assert (frozen.tensors, frozen.nbytes, frozen.new_stored_bytes) == (2, 48 * 48 * 4 + 48 * 4, 0)
    assert frozen.stored_bytes <= last.older_stored_bytes
    assert groups["model.head"].stored_bytes == 0, "tied tensors lie in the store once"
    assert groups["model.zeros"].ways.keys() == {"clean"}
    assert groups["model.scale"].ways["inline"].nbytes == 4
    assert last.stored_bytes == sum(g.stored_bytes for g in last.groups)
    assert last.stored_bytes - last.older_stored_bytes < last.new_bytes
    assert last.parts[0].older_packs > 0
    assert last.values == ("optimizer", "rng")
    assert last.trace is not None
    assert (last.trace.count, last.trace.first[0]) == (1, 3)
    rows = {t.fqn: t for t in last.tensors or ()}
    assert (rows["model.fp8"].dtype, rows["model.fp8"].rank) == ("float8_e4m3fn", 0)
    assert (rows["model.embed.weight"].shape, rows["model.embed.weight"].rank) == ((40, 48), None)


def test_several_ranks(tmp_path: Path) -> None:
    whole = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64)
    ranks = [
        [
            Shard("model.w", whole, (rank * 32, 0), (32, 64)),
            Shard("rng.torch", torch.full((100,), rank), (0,), (100,), True),
        ]
        for rank in (0, 1)
    ]
    write_sharded(str(tmp_path / "run"), 5, ranks, values={"rng": 1})
    report = verify(str(tmp_path / "run"), deep=True)
    assert report.sound
    with open_run(str(tmp_path / "run")) as log:
        found = detail(log, log.read().checkpoints[0], config=Config(), tensors=True)
    assert [p.rank for p in found.parts] == [0, 1]
    assert [(t.fqn, t.rank) for t in found.tensors or ()] == [("model.w", None), ("rng.torch", 0), ("rng.torch", 1)]
    assert {g.name: (g.tensors, g.nbytes) for g in found.groups} == {
        "model.w": (1, 64 * 64 * 4),
        "rng.torch": (1, 2 * 800),
    }


def test_looking_needs_no_torch(made: Path) -> None:
    code = (
        "import sys; from gpumove.inspection.run import checkpoints, verify; "
        f"assert verify({str(made)!r}, deep=True).sound and len(checkpoints({str(made)!r})) == 3; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
