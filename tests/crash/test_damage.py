"""One damaged object of any kind: it is found, it is named, and nothing that is sound is lost."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import gpumove
from gpumove.errors import GpumoveError, IntegrityError
from gpumove.format.codec import digest
from tests.jobs import new_job

STEPS = (2, 4)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """A run with two checkpoints that share no pack, and the state's fingerprint at each."""
    url, job, truth = tmp_path_factory.mktemp("damage") / "run", new_job(), {}
    with gpumove.Checkpointer(str(url), **job.parts(), chunk_bytes=4096, pack_bytes=8192, codec="small") as ckpt:
        start = ckpt.restore()
        for step in STEPS:
            job.train(start, step, ckpt)
            truth[step] = job.fingerprint()
            ckpt.save(step).wait(30)
            start = step
    return url, truth


def objects(url: Path, kind: str) -> list[Path]:
    """The objects of one kind that belong to the newest checkpoint, or to the log."""
    newest = max(p.name for p in (url / "packs").iterdir())
    return {
        "pack": sorted((url / "packs" / newest).iterdir()),
        "part": sorted((url / "parts" / newest).iterdir()),
        "manifest": sorted((url / "manifests").glob(f"{newest}-*")),
        "entry": [max((url / "log").iterdir())],
    }[kind]


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def truncate(path: Path, _at: int, _bit: int) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def remove(path: Path, _at: int, _bit: int) -> None:
    path.unlink()


def zero_page(path: Path, at: int, _bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)


def restored(url: Path) -> tuple[int, str]:
    job = new_job(seed=3)
    with gpumove.Checkpointer(str(url), **job.parts()) as ckpt:
        return ckpt.restore(), job.fingerprint()


KINDS = ["pack", "part", "manifest", "entry"]
# A log without its last entry is whole: that commit is then simply not there. A missing earlier one is a hole (below).
CASES = [(k, h) for k in KINDS for h in (flip, truncate, remove, zero_page) if (k, h) != ("entry", remove)]


@pytest.mark.parametrize(("kind", "harm"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_the_checkpoint_before_is_taken_and_the_object_is_named(
    sound: tuple[Path, dict[int, str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    harm: Callable[[Path, int, int], None],
) -> None:
    url, truth = sound
    chance = random.Random(f"{kind}{harm.__name__}")
    for target in objects(url, kind):
        copy = tmp_path / "copy"
        shutil.copytree(url, copy)
        victim = copy / target.relative_to(url)
        harm(victim, chance.randrange(victim.stat().st_size), chance.randrange(8))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "gpumove"):
            step, state = restored(copy)
        assert state == truth[step]
        if kind == "pack" and harm is flip and step == STEPS[1]:
            # The bit was in the pack's own header, which no reader of a checkpoint needs; verify finds it.
            assert not caplog.records
        else:
            assert step == STEPS[0]
            assert victim.name in caplog.text
        shutil.rmtree(copy)


def test_every_byte_of_a_small_object(sound: tuple[Path, dict[int, str]], tmp_path: Path) -> None:
    """Each byte of a log entry and of a manifest, one after the other: the truth or an error, never anything else."""
    url, truth = sound
    copy = tmp_path / "copy"
    shutil.copytree(url, copy)
    job = new_job(seed=3)
    entry, manifest = (copy / objects(url, kind)[0].relative_to(url) for kind in ("entry", "manifest"))
    for victim in (entry, manifest):
        whole = victim.read_bytes()
        for at in range(0, len(whole), 7):
            flip(victim, at, at % 8)
            if victim == entry:  # the commit before is the newest that can be read
                assert gpumove.load(str(copy), model=job.model, optimizer=job.optimizer) == STEPS[0]
            else:
                with pytest.raises(IntegrityError, match=victim.name):
                    gpumove.load(str(copy), model=job.model, optimizer=job.optimizer)
            victim.write_bytes(whole)
    assert restored(copy) == (STEPS[1], truth[STEPS[1]])


def test_a_hole_in_the_log_is_an_error_that_loses_nothing(sound: tuple[Path, dict[int, str]], tmp_path: Path) -> None:
    url, _ = sound
    copy = tmp_path / "copy"
    shutil.copytree(url, copy)
    entries = sorted((copy / "log").iterdir())
    before = {p.name for p in copy.rglob("*")} - {entries[1].name}
    entries[1].unlink()
    with pytest.raises(IntegrityError, match=f"{entries[1].name} is missing"):
        restored(copy)
    assert {p.name for p in copy.rglob("*")} == before


def test_when_nothing_is_sound_the_newest_damage_is_the_error(
    sound: tuple[Path, dict[int, str]], tmp_path: Path
) -> None:
    url, _ = sound
    copy = tmp_path / "copy"
    shutil.copytree(url, copy)
    for manifest in (copy / "manifests").iterdir():
        flip(manifest, 40, 1)
    newest = max((copy / "manifests").iterdir())
    with pytest.raises(IntegrityError, match=newest.name):
        restored(copy)


def test_a_newer_format_is_refused_and_not_taken_for_damage(sound: tuple[Path, dict[int, str]], tmp_path: Path) -> None:
    url, _ = sound
    copy = tmp_path / "copy"
    shutil.copytree(url, copy)
    head = max((copy / "log").iterdir())
    body = head.read_bytes().replace(b'"format":1', b'"format":2').rpartition(b',"check"')[0]
    head.write_bytes(body + b',"check":"' + digest(body).encode() + b'"}')
    with pytest.raises(GpumoveError, match="upgrade gpumove") as caught:
        restored(copy)
    assert caught.value.exit_code == 2
