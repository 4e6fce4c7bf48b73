"""``gpumove replicate`` as people and programs call it: between clouds, while a job trains, killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpumove.cli import build_parser, main
from gpumove.cli_options import parse_rate
from gpumove.errors import ConfigError
from tests.conftest import fresh_place
from tests.jobs import TrainingJob
from tests.move.runs import Place, check, replicate, train
from tests.servers import Bucket
from tests.servers.proxy import Proxy

ROOT = Path(__file__).resolve().parents[2]
ENV = {"GPUMOVE_PACK_BYTES": "8192", "GPUMOVE_CHUNK_BYTES": "4096", "GPUMOVE_BUDGET_BYTES": "1M"}


def command(source: Place, target: Place, *options: str) -> list[str]:
    found = ["replicate", source.url, target.url, *options]
    for option, place in (("--from-option", source), ("--to-option", target)):
        found += [word for name, value in place.options.items() for word in (option, f"{name}={json.dumps(value)}")]
    return found


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(source: Place, target: Place, *options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(command(source, target, *options))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def heeds_interrupts() -> None:
    """Also where whoever runs the tests has them ignored, as nohup does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def started(source: Place, target: Place, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The same in a process of its own, gone at the end."""
    child = subprocess.Popen(
        [sys.executable, "-m", "gpumove", *command(source, target, *options)],
        cwd=ROOT, env={**os.environ, **ENV}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=heeds_interrupts,
    )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


# -------------------------------------------------------------------- between clouds


@pytest.mark.parametrize(("here", "there"), [("s3", "gs"), ("gs", "abfs"), ("file", "s3"), ("abfs", "file")])
def test_a_run_between_stores(request: pytest.FixtureRequest, tmp_path: Path, here: str, there: str) -> None:
    source = Place(*fresh_place(request, here, tmp_path))
    target = Place(*fresh_place(request, there, tmp_path))
    truth = train(source, 3)
    assert replicate(source, target).steps == (3,)
    truth |= train(source, 5)
    done = replicate(source, target, step="all")
    assert done.steps == (4, 5)
    check(target, truth, [3, 4, 5])
    assert replicate(source, target).objects == 0


def test_a_run_is_followed_between_clouds_while_it_trains(s3_server: Bucket, gcs_server: Bucket) -> None:
    source = Place(f"{s3_server.url}/followed", s3_server.options)
    target = Place(f"{gcs_server.url}/followed", gcs_server.options)
    truth = train(source, 2)
    with started(source, target, "--follow", "--json") as child:
        assert child.stdout is not None
        first = json.loads(child.stdout.readline())
        assert first["round"]["step"] == 2

        def wait(step: int, job: TrainingJob) -> None:
            if step in (5, 8):
                assert child.stdout is not None
                while json.loads(child.stdout.readline())["round"]["step"] != step:
                    pass

        truth |= train(source, 8, each=wait, keep_last=4)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
    steps = target.steps()
    assert steps[-1] == 8
    assert {2, 5, 8} & set(steps) == {5, 8}  # the source has dropped step 2, and so has the copy
    check(target, truth, steps)


# -------------------------------------------------------------------- killed


def test_killed_again_and_again_it_goes_on_where_it_was(tmp_path: Path, s3_server: Bucket) -> None:
    source = Place(str(tmp_path / "run"))
    truth = train(source, 6, delta=False, codec="raw")
    with Proxy(s3_server.endpoint) as proxy:
        bucket = s3_server.via(proxy.endpoint)
        target = Place(f"{bucket.url}/killed", bucket.options)

        def sent() -> Counter[str]:
            """How often each pack was put."""
            lines = (line.split() for line in list(proxy.requests))
            return Counter(path for verb, path, *_ in lines if verb == "PUT" and "/packs/" in path)

        kills = 0
        packs = len(source.keys("packs"))
        while len(sent()) < packs - 4:
            had = len(sent())
            with started(source, target, "--step", "all", "--limit", "60kB/s", "--in-flight", "2") as child:
                until(lambda: len(sent()) >= min(packs - 4, had + 6) or child.poll() is not None)  # noqa: B023
                child.kill()
                assert child.wait(10) == -signal.SIGKILL
            kills += 1
        with started(source, target, "--step", "all", "--json") as child:
            out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        assert kills >= 2
        assert len(sent()) == packs
        assert sent().total() <= packs + 2 * kills  # what was under way, and nothing else, was sent again
        assert json.loads(out)["newest"] == 6
    check(Place(f"{s3_server.url}/killed", s3_server.options), truth, [1, 2, 3, 4, 5, 6])


def test_a_replicator_that_was_asleep_finds_another_one_in_its_place(tmp_path: Path) -> None:
    source, target = Place(str(tmp_path / "run")), Place(str(tmp_path / "copy"))
    truth = train(source, 1)
    with started(source, target, "--follow", "--json") as asleep:
        assert asleep.stdout is not None
        assert json.loads(asleep.stdout.readline())["round"]["step"] == 1
        asleep.send_signal(signal.SIGSTOP)
        truth |= train(source, 2)
        assert replicate(source, target).steps == (2,)
        truth |= train(source, 3)
        asleep.send_signal(signal.SIGCONT)
        out, err = asleep.communicate(timeout=60)
        assert asleep.returncode == 40, err
        assert json.loads(out)["code"] == "fenced"
    assert target.steps() == [1, 2]
    replicate(source, target)
    check(target, truth, [1, 2, 3])


# -------------------------------------------------------------------- the command


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Place, Place, dict[int, str]]:
    source = Place(str(tmp_path / "run"))
    return source, Place(str(tmp_path / "copy")), train(source, 2)


def test_for_people(call: Any, pair: tuple[Place, Place, dict[int, str]]) -> None:
    source, target, truth = pair
    code, out, err = call(source, target)
    assert code == 0
    assert "newest  step 2 at file://" in out
    assert "objects" in out
    assert err.startswith("step 2: ")
    code, out, err = call(source, target, "--step", "all", "--in-flight", "3", "--limit", "1Gbit/s")
    assert (code, err) == (0, "")
    assert "sent    nothing: all is there" in out
    check(target, truth, [2])


def test_for_programs(call: Any, pair: tuple[Place, Place, dict[int, str]]) -> None:
    source, target, _ = pair
    code, out, _ = call(source, target, "--step", "all", "--json")
    done = json.loads(out)
    assert (code, done["steps"], done["newest"], done["problems"]) == (0, [1, 2], 2, [])
    assert done["objects"] == len([key for key in target.keys() if not key.startswith(("log/", "format"))])  # noqa: SIM118
    assert done["target"] == f"file://{target.url}"


def test_following_gives_programs_a_line_per_round(call: Any, pair: tuple[Place, Place, dict[int, str]]) -> None:
    source, target, _ = pair
    with source.log() as log:
        log.move("sealed", move="ab" * 8, other=f"file://{target.url}")
    code, out, _ = call(source, target, "--step", "all", "--follow", "--json")
    *rounds, done = map(json.loads, out.splitlines())
    assert [r["round"]["step"] for r in rounds] == [1, 2]
    assert [set(r["forecast"]) for r in rounds] == [{"blackout_s", "parts", "converges", "why"}] * 2
    assert (code, done["steps"]) == (0, [1, 2])


def test_a_prefix(call: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_bytes(b"123")
    code, out, _ = call(Place(str(tmp_path / "data")), Place(str(tmp_path / "there")))
    assert code == 0
    assert "sent    1 object, 3 B" in out
    assert (tmp_path / "there" / "x").read_bytes() == b"123"


def test_errors(call: Any, pair: tuple[Place, Place, dict[int, str]], tmp_path: Path) -> None:
    source, target, _ = pair
    code, _, err = call(Place(str(tmp_path / "nothing")), target)
    assert code == 2
    assert "there is nothing at" in err
    code, out, err = call(source, target, "--json", "--step", "7")
    assert code == 2
    assert json.loads(out)["code"] == "config.no_checkpoint"
    assert target.keys() == {}
    code, _, err = call(source, source)
    assert code == 2
    with source.log() as log:
        for checkpoint in log.view.checkpoints:
            log.store.put(checkpoint.manifest_key, b"rot")
    code, _, err = call(source, target)
    assert code == 20
    assert "is damaged" in err


def test_damage_that_was_passed_over_is_an_exit_code(call: Any, pair: tuple[Place, Place, dict[int, str]]) -> None:
    source, target, truth = pair
    with source.log() as log:
        log.store.put(log.view.checkpoints[-1].manifest_key, b"rot")
    code, out, _ = call(source, target)
    assert code == 20
    assert "problem " in out
    check(target, truth, [1])


def test_a_region_that_is_not_allowed(
    call: Any, pair: tuple[Place, Place, dict[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, truth = pair
    monkeypatch.setenv("GPUMOVE_ALLOWED_REGIONS", "eu-*")
    for options in ([], ["--to-region", "us-east-1"]):
        code, out, _ = call(source, target, "--json", *options)
        assert (code, json.loads(out)["code"]) == (2, "config.region")
        assert target.keys() == {}
    assert call(source, target, "--to-region", "eu-west-1")[0] == 0
    check(target, truth, [2])


def test_a_run_takes_along_where_it_may_lie(call: Any, pair: tuple[Place, Place, dict[int, str]]) -> None:
    source, target, truth = pair
    with source.log() as log:
        log.claim(regions="eu-*")
    for options in ([], ["--to-region", "us-east-1"]):
        code, out, _ = call(source, target, "--json", *options)
        assert (code, json.loads(out)["code"]) == (2, "config.region")
        assert target.keys() == {}
    assert call(source, target, "--to-region", "eu-west-1")[0] == 0
    check(target, truth, [2])
    with target.log() as log:
        assert log.view.regions == "eu-*"


@pytest.mark.parametrize("option", ["--step=newest", "--limit=fast", "--limit=0", "--in-flight=x", "--keep-last=-1"])
def test_wrong_options(call: Any, tmp_path: Path, option: str) -> None:
    code, _, err = call(Place(str(tmp_path)), Place(str(tmp_path / "x")), option)
    assert code == 2
    assert option.split("=")[0].removeprefix("--").replace("-", "_") in err.replace("-", "_")


def test_options_of_either_end() -> None:
    args = build_parser().parse_args(
        ["replicate", "--to-option", "a=1", "SRC", "--from-option", "b.c=x", "DST", "--follow"]
    )
    assert (args.src, args.dst, args.follow) == ("SRC", "DST", True)
    assert (args.from_option, args.to_option) == (["b.c=x"], ["a=1"])


@pytest.mark.parametrize(
    ("text", "bytes_s"),
    [
        ("200MB/s", 2e8),
        ("1MiB", 1 << 20),
        ("1Gbit/s", 1.25e8),
        ("8kbit/s", 1e3),
        ("100B/s", 100),
        ("800bit/s", 100),
        ("1.5 GB/s", 1.5e9),
    ],
)
def test_rates(text: str, bytes_s: float) -> None:
    assert parse_rate("--limit", text) == bytes_s


@pytest.mark.parametrize("text", ["", "/s", "fast", "100", "100/s", "1.5", "1 parsec/s", "-3MB/s", "0MB"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ConfigError, match="--limit takes a rate"):
        parse_rate("--limit", text)


COPY_TWICE = """
import json, resource, sys, gpumove
from gpumove.config import Config

one, many, middle, target, *options = sys.argv[1:]
s3, gcs = map(json.loads, options)

def copy(source, name):
    more = {"config": Config(budget_bytes=64 << 20), "in_flight": 16}
    gpumove.replicate(source, f"{middle}/{name}", to_options=s3, **more)
    gpumove.replicate(f"{middle}/{name}", f"{target}/{name}", from_options=s3, to_options=gcs, **more)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

print(-copy(one, "one") + copy(many, "many"))
"""


def test_memory_stays_within_the_budget(tmp_path: Path, s3_server: Bucket, gcs_server: Bucket) -> None:
    for folder, count in (("one", 1), ("many", 40)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / str(number)).write_bytes(os.urandom(10_000_000))
    places = [str(tmp_path / "one"), str(tmp_path / "many"), f"{s3_server.url}/budget", f"{gcs_server.url}/budget"]
    options = [json.dumps(dict(bucket.options)) for bucket in (s3_server, gcs_server)]
    done = subprocess.run(
        [sys.executable, "-c", COPY_TWICE, *places, *options],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 + 40, "400 MB; threads and connections need a little besides"
