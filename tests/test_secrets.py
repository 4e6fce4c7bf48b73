"""No secret is written down: planted ones are looked for in every object, message, log, report and process list."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import psutil
import pytest

import gpumove
from gpumove.cli import main
from gpumove.cmdline import masked
from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError
from gpumove.store.address import parse
from gpumove.store.objects import Store
from tests.job.harness import GPUMOVE, ROOT, WORKER, Running
from tests.jobs import new_job
from tests.servers import Bucket, azure, s3
from tests.shards import fill

Place = tuple[str, Mapping[str, Any], list[str]]
"""URL, options, and what of them is secret."""
PASSWORD = "planted-p%40ssw0rd"
URLS = (
    f"ftp://someone:{PASSWORD}@127.0.0.1:1/run",
    f"http://someone:{PASSWORD}@127.0.0.1:1/run",
    "sftp://someone:planted-pa/ss@host/run",
    "sftp://someone:planted-pa#ss@host/run",
    "sftp://someone:planted-pa?ss@host/run",
    "s3://AKIAPLANTED000000000:planted/secret@bucket/run",
    "s3://planted-key:planted-secret@bucket/run",
    "gs://bucket/run?access_token=planted-token",
    "abfs://container/run?sv=1&sig=planted-signature",
)
VERBS = (("ls",), ("show",), ("verify", "--deep"), ("doctor",), ("gc",), ("pin", "2"), ("export", "OUT"))


def spellings(secret: str) -> set[bytes]:
    """A secret as it may be written: plain, in a URL, in JSON, in base64."""
    shapes = {secret, quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1]}
    return {text.encode() for text in shapes} | {base64.b64encode(secret.encode())[:-4]}


def check(text: str | bytes, secrets: list[str], where: str) -> None:
    data = text if isinstance(text, bytes) else text.encode(errors="surrogateescape")
    found = [shape for secret in secrets for shape in spellings(secret) if shape in data]
    assert not found, f"a secret is in {where}"


@contextlib.contextmanager
def nothing_said(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, secrets: list[str]
) -> Iterator[Callable[[], str]]:
    """What is printed and logged meanwhile shows none of these."""
    capfd.readouterr()
    caplog.clear()
    said: list[str] = []

    def so_far() -> str:
        said.append("".join(capfd.readouterr()))
        return "".join(said)

    with caplog.at_level(logging.DEBUG, logger="gpumove"):
        yield so_far
    check(so_far(), secrets, "what was printed")
    for record in caplog.records:
        if record.name.startswith("gpumove"):
            check(logging.Formatter().format(record), secrets, f"the log: {record.name}")


@pytest.fixture
def sas(azure_server: Bucket) -> Place:
    """A container, opened with a signature instead of a key."""
    from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

    token = generate_account_sas(
        azure.ACCOUNT, azure.KEY, ResourceTypes(service=True, container=True, object=True),
        AccountSasPermissions.from_string("rwdlac"), datetime.now(timezone.utc) + timedelta(hours=1),
    )  # fmt: skip
    connection = f"BlobEndpoint={azure_server.endpoint}/{azure.ACCOUNT};SharedAccessSignature={token}"
    signature = token.partition("sig=")[2].partition("&")[0]
    return f"{azure_server.url}/secrets", {"connection_string": connection}, [signature, token]


@pytest.fixture
def key(s3_server: Bucket) -> Place:
    return f"{s3_server.url}/secrets", s3_server.options, [s3.SECRET]


@pytest.fixture(params=["key", "sas"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    url, options, secrets = request.getfixturevalue(request.param)
    return f"{url}-{tmp_path.name}", options, secrets


def said_by(options: Mapping[str, Any], word: str = "--option") -> list[str]:
    return [part for name, value in options.items() for part in (word, f"{name}={value}")]


def all_objects(url: str, options: Mapping[str, Any]) -> dict[str, bytes]:
    with contextlib.closing(Store.open(url, Config(), options=options)) as store:
        return {info.key: store.get(info.key) for info in store.list("")}


def test_a_run_its_copies_and_all_verbs_hold_no_secret(
    place: Place, s3_server: Bucket, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    url, options, secrets = place
    secrets = [*secrets, s3.SECRET]
    copy, trace = f"{s3_server.url}/copy-{tmp_path.name}", tmp_path / "trace"
    with nothing_said(capfd, caplog, secrets) as said:
        job = new_job()
        with gpumove.Checkpointer(url, **job.parts(), storage_options=options, trace_dir=str(trace)) as ckpt:
            job.train(ckpt.restore(), 2, ckpt)
            ckpt.save(2).wait(60)
        for verb, *more in VERBS:
            words = [str(tmp_path / "out") if word == "OUT" else word for word in more]
            for form in (["--json"], ["--debug"]):
                again = ["--force"] if verb == "export" else []
                assert main([verb, url, *words, *said_by(options), *form, *again]) == 0
        ends = [url, copy, *said_by(options, "--from-option"), *said_by(s3_server.options, "--to-option")]
        for form in ([], ["--json"]):
            assert main(["replicate", *ends, *form]) == 0
        assert "step" in said()
    for where in ((url, options), (copy, s3_server.options)):
        objects = all_objects(*where)
        assert any(name.startswith("log/") for name in objects)
        for name, data in objects.items():
            check(name, secrets, "the name of an object")
            check(data, secrets, name)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            check(path.read_bytes(), secrets, str(path))


def test_a_copied_prefix_and_its_ledger_hold_no_secret(
    key: Place, sas: Place, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    url, options, secrets = key
    to, to_options, more = sas
    fill(f"{url}/data", ["a", "b"], options=options)
    with nothing_said(capfd, caplog, [*secrets, *more]):
        ends = [f"{url}/data", f"{to}/data", *said_by(options, "--from-option"), *said_by(to_options, "--to-option")]
        assert main(["replicate", *ends, "--json"]) == 0
        with gpumove.stage(f"{to}/data", "/nonexistent/\0", storage_options=to_options) as stage:
            with pytest.raises((GpumoveError, ValueError)):
                stage.get("a")
            assert "connection_string" not in repr(stage)
    objects = all_objects(f"{to}/data", to_options)
    assert any(name.startswith(".gpumove-ledger/") for name in objects)
    for name, data in objects.items():
        check(data, [*secrets, *more], name)


def test_a_move_its_way_back_and_what_both_logs_say_hold_no_secret(
    key: Place, sas: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (here, options, secrets), (there, to_options, more) = key, sas
    here, there = f"{here}-{tmp_path.name}", f"{there}-{tmp_path.name}"
    forth = [*said_by(options, "--from-option"), *said_by(to_options, "--to-option")]
    dead = ["--force", "--leave-timeout", "0", "--no-wait"]
    bad_options = {**options, "key": "AKIAPLANTED000000000", "secret": "planted/secret+1"}
    hidden_ones = [*secrets, *more, bad_options["key"], bad_options["secret"]]
    with nothing_said(capfd, caplog, hidden_ones) as said:
        job = new_job()
        with gpumove.Checkpointer(here, **job.parts(), storage_options=options) as ckpt:
            job.train(ckpt.restore(), 2, ckpt)
            ckpt.save(2).wait(60)
        assert main(["move", here, "--to", there, *forth, *dead, "--json"]) == 0
        assert main(["move", here, "--to", there, *forth, "--json"]) == 2  # it is under way
        assert main(["move", here, "--to", f"{there}-x", *said_by(options, "--from-option"), "--debug"]) in (2, 10)
        wrong = [*said_by(bad_options, "--from-option"), *said_by(to_options, "--to-option")]
        assert main(["move", here, "--to", there, *wrong, "--resume", "--no-wait", "--debug"]) in (2, 10)
        for url, given in ((here, options), (there, to_options)):
            for verb in ("ls", "show"):
                assert main([verb, url, *said_by(given)]) == 0
        assert main(["move", here, "--to", there, *forth, *dead, "--rollback", "--debug"]) == 0
        assert "handover" in said()
    for where in ((here, options), (there, to_options)):
        objects = all_objects(*where)
        entries = b"".join(data for name, data in objects.items() if name.startswith("log/"))
        assert b'"sealed"' in entries
        assert (there if where[0] == here else here).encode() in entries
        for name, data in objects.items():
            check(name, hidden_ones, "the name of an object")
            check(data, hidden_ones, name)


@pytest.mark.parametrize("form", [["--json"], ["--debug"]], ids=["json", "debug"])
def test_refusals_show_no_secret(
    key: Place, sas: Place, form: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("GPUMOVE_RETRY_S", "1")
    monkeypatch.setenv("GPUMOVE_DEADLINE_S", "1")
    url, options, secrets = key
    wrong = {**options, "key": "AKIAPLANTED000000000", "secret": "planted/secret+of=mine", "token": "planted-session"}
    spoiled = {"connection_string": sas[1]["connection_string"].replace("sig=", "sig=planted")}
    bad_places = (
        (url, wrong, [wrong["key"], wrong["secret"], wrong["token"]]),
        (f"{url}-missing-bucket".replace("://", "://no-"), options, secrets),
        (url, {**options, "endpoint_url": "http://127.0.0.1:1"}, secrets),
        (url, {**options, "no_such_option": "planted-value"}, ["planted-value", *secrets]),
        (sas[0], spoiled, [*sas[2], spoiled["connection_string"].partition("Signature=")[2]]),
        (sas[0], {"connection_string": "AccountName=a;AccountKey=planted-no-base64"}, ["planted-no-base64"]),
    )
    for at, given, hidden in bad_places:
        with nothing_said(capfd, caplog, hidden) as said:
            for verb in ("ls", "doctor"):
                assert main([verb, at, *said_by(given), *form]) in (2, 10)
            assert main(["replicate", at, str(tmp_path / "to"), *said_by(given, "--from-option"), *form]) in (2, 10)
            assert main(["replicate", str(tmp_path), at, *said_by(given, "--to-option"), *form]) in (2, 10)
            assert main(["move", at, "--to", str(tmp_path / "to"), *said_by(given, "--from-option"), *form]) in (2, 10)
            assert main(["move", str(tmp_path), "--to", at, *said_by(given, "--to-option"), *form]) in (2, 10)
            assert at.partition("://")[2] in said()  # it did say where


@pytest.mark.parametrize("url", URLS)
def test_what_is_secret_in_a_url_is_never_shown(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("GPUMOVE_RETRY_S", "1")
    monkeypatch.setenv("GPUMOVE_DEADLINE_S", "1")
    with nothing_said(capfd, caplog, ["planted", PASSWORD]):
        for form in (["--json"], ["--debug"]):
            ends = (url, str(tmp_path)), (str(tmp_path), url)
            for words in (["ls", url], *(["replicate", *w] for w in ends), *(["move", a, "--to", b] for a, b in ends)):
                assert main([*words, *form]) in (2, 10)
        with pytest.raises(GpumoveError) as caught:
            gpumove.stage(url, tmp_path / "here", config=Config(retry_s=1.0, deadline_s=1.0))
        check(str(caught.value), ["planted", PASSWORD], "an error")
        with pytest.raises(GpumoveError) as caught:
            gpumove.checkpoints(url)
        error: BaseException | None = caught.value
        while error is not None:
            check(f"{error} {error!r}", ["planted", PASSWORD], "the chain of an error")
            error = error.__cause__ or error.__context__
        check(pickle.dumps(caught.value), ["planted", PASSWORD], "an error that crosses ranks")


def test_words_that_the_command_line_does_not_know_are_not_repeated(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["ls", "memory://x", "--opion", "secret=planted"], ["ls", "memory://x", "secret=planted"],
        ["--option", "secret=planted", "ls", "memory://x"], ["gc", "memory://x", "sftp://me:planted@host/x"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(words)
        said = "".join(capfd.readouterr())
        assert "usage: gpumove" in said
        check(said, ["planted"], "the usage")
    assert main(["ls", "memory://x", "--option", "planted"]) == 2
    check("".join(capfd.readouterr()), ["planted"], "an error")


SCRIPT = """
import sys, torch, gpumove
model = torch.nn.Linear(2, 2)
with gpumove.Checkpointer(sys.argv[1], model=model) as ckpt:
    ckpt.save(ckpt.restore() + 1).wait(60)
"""


def test_fingerprints_hold_no_secret_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tokens of every kind around a job: its variables, its command line, the address of its repository, its folder."""
    secret = "planted-9c1f/+secret"
    folder = tmp_path / "planted-user-name"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("a" * 40)
    (folder / ".git" / "config").write_text(f'[remote "origin"]\n\turl = https://me:{secret}@host/code.git\n')
    (folder / "train.py").write_text(SCRIPT)
    for name in (
        "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN",
        "AZURE_STORAGE_CONNECTION_STRING", "NCCL_SOCKET_IFNAME", "NCCL_TUNER_PLUGIN", "MKL_CBWR", "OMP_PLACES",
        "PYTORCH_ALLOC_CONF_TOKEN", "CUDA_VISIBLE_DEVICES",
    ):  # fmt: skip
        monkeypatch.setenv(name, secret)
    url = str(tmp_path / "run")
    for _ in range(2):  # the second one restores, and compares
        words = [sys.executable, str(folder / "train.py"), url, f"--key={secret}"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=120, check=True)
        check(done.stdout + done.stderr, [secret, "planted"], "what the job said")
    for verb in ("show", "doctor"):
        for form in ([], ["--json"]):
            assert main([verb, url, *form]) == 0
    said = "".join(capfd.readouterr())
    assert "a" * 40 in said, "the commit is shown"
    assert "set, to what is not shown" in said
    check(said, [secret, "planted"], "what is shown of it")
    for name, data in all_objects(url, {}).items():
        check(data, [secret, "planted"], name)


# --- process lists ---


def command_lines(process: psutil.Process) -> dict[int, list[str]]:
    """Of a process and all below it, as `ps` shows them."""
    found = {}
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[member.pid] = member.cmdline()
    return found


def hidden(process: psutil.Process, secrets: list[str]) -> bool:
    text = "\0".join(word for line in command_lines(process).values() for word in line)
    return not any(secret in text for secret in secrets)


def test_gpumove_run_and_all_below_it_show_no_secret(key: Place, tmp_path: Path) -> None:
    url, options, secrets = key
    job = Running.__new__(Running)
    job.folder, job.nproc, job._log = tmp_path, 2, tmp_path / "stderr"
    more = ["--nproc-per-node", "2", str(WORKER), str(tmp_path), "leaves", "0"]
    job.start([*GPUMOVE, "run", url, *said_by(options), "--", *more], {})
    job.started()
    top = psutil.Process(job.process.pid)
    lines = command_lines(top)
    assert len(lines) >= 4  # itself, torchrun, two workers
    assert "secret=" + "*" * len(s3.SECRET) in lines[top.pid]
    assert url in lines[top.pid]
    assert lines[top.pid][-2:] == ["leaves", "0"]
    for pid, line in lines.items():
        check("\0".join(line), secrets, f"the command line of {line[:4]}")
        if pid != top.pid:
            check("\0".join(f"{k}={v}" for k, v in psutil.Process(pid).environ().items()), secrets, "an environment")
    (folder,) = tmp_path.glob("gpumove-run-*")
    assert {path.stat().st_mode & 0o77 for path in (folder, *folder.iterdir())} == {0}
    job.process.terminate()
    status, out = job.end()
    assert status == 75
    check(out + job.log, secrets, "what it said")


def test_a_long_copy_shows_no_secret(key: Place, tmp_path: Path) -> None:
    url, options, secrets = key
    job = new_job()
    with gpumove.Checkpointer(f"{url}/followed", **job.parts(), storage_options=options) as ckpt:
        job.train(ckpt.restore(), 1, ckpt)
        ckpt.save(1).wait(60)
    command = [*GPUMOVE, "replicate", f"{url}/followed", str(tmp_path / "to"), "--follow", "--json"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        child = subprocess.Popen([*command, *said_by(options, "--from-option")], cwd=ROOT, stdout=out, stderr=out)
    try:
        until = time.monotonic() + 60
        while not list((tmp_path / "to").glob("manifests/*")) and time.monotonic() < until:
            assert child.poll() is None, log.read_text()
            time.sleep(0.05)
        assert hidden(psutil.Process(child.pid), secrets)
        assert f"secret={'*' * len(s3.SECRET)}" in psutil.Process(child.pid).cmdline()
    finally:
        child.terminate()
        child.wait(60)
    check(log.read_bytes(), secrets, "its log")


def test_a_move_that_is_under_way_shows_no_secret(key: Place, sas: Place, tmp_path: Path) -> None:
    """Killed on the way, and taken up again."""
    (here, options, secrets), (there, to_options, more) = key, sas
    here, there = f"{here}-moved", f"{there}-moved"
    job = new_job()
    with gpumove.Checkpointer(here, **job.parts(), storage_options=options) as ckpt:
        job.train(ckpt.restore(), 1, ckpt)
        ckpt.save(1).wait(60)
    command = [*GPUMOVE, "move", here, "--to", there, "--json", *said_by(options, "--from-option")]
    command += said_by(to_options, "--to-option")
    for resume in ([], ["--resume"]):
        log = tmp_path / f"log{len(resume)}"
        with log.open("wb") as out:
            child = subprocess.Popen([*command, *resume], cwd=ROOT, stdout=out, stderr=out)
        try:
            until = time.monotonic() + 60
            while (
                not hidden(psutil.Process(child.pid), [*secrets, *more])  # it is starting
                if resume
                else b'"state":"request"' not in log.read_bytes()
            ) and time.monotonic() < until:
                assert child.poll() is None, log.read_text()
                time.sleep(0.05)
            time.sleep(2.0 if resume else 0.0)
            assert child.poll() is None, log.read_text()  # no job answers
            assert hidden(psutil.Process(child.pid), [*secrets, *more])
            shown = psutil.Process(child.pid).cmdline()
            assert here in shown
            assert f"secret={'*' * len(s3.SECRET)}" in shown
        finally:
            child.kill()
            child.wait(60)
        check(log.read_bytes(), [*secrets, *more], "what it said")


def test_a_command_line_without_its_secrets() -> None:
    def after(*words: str) -> list[str]:
        line = b"".join(word.encode() + b"\0" for word in words)
        assert len(masked(line)) == len(line)
        return masked(line).decode().split("\0")[:-1]

    assert after("gpumove", "ls", "--option", "a=b=c", "s3://b/x=y", "--json") == [
        "gpumove", "ls", "--option", "a=***", "s3://b/x=y", "--json",
    ]  # fmt: skip
    assert after("--from-option=key=12", "--to-option", "k=v") == ["--from-option=key=**", "--to-option", "k=*"]
    assert after("sftp://me:pw@h/x", "ftp://h/x@y") == ["sftp://*****@h/x", "ftp://h/x@y"]
    assert after("--option", "nothing", "--", "--option", "a=b") == ["--option", "nothing", "--", "--option", "a=b"]


def test_the_environment_is_not_written_down(
    s3_server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials from where clouds look for them by themselves."""
    url = f"{s3_server.url}/environment-{tmp_path.name}"
    script = (
        "import sys, gpumove; from tests.jobs import new_job; job = new_job()\n"
        "with gpumove.Checkpointer(sys.argv[1], **job.parts(), trace_dir=sys.argv[2]) as ckpt:\n"
        "    job.train(ckpt.restore(), 1, ckpt); ckpt.save(1).wait(60)\n"
    )
    env = {**os.environ, **s3_server.env, "PLANTED_TOKEN": "planted-in-the-environment", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, url, str(tmp_path / "trace")],
        env=env,
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    secrets = [s3.SECRET, "planted-in-the-environment"]
    check(done.stdout + done.stderr, secrets, "what it said")
    objects = all_objects(url, s3_server.options)
    assert objects
    for name, data in objects.items():
        check(data, secrets, name)
    for path in (tmp_path / "trace").rglob("*.json"):
        check(path.read_bytes(), secrets, str(path))


def test_passwords_that_would_be_taken_for_a_path_are_refused() -> None:
    for url in URLS[2:]:
        with pytest.raises(ConfigError, match=r"password|credentials|query"):
            parse(url)
    for fine in ("sftp://host:22/run", "hdfs://name:9000", "memory://a:b/c", "s3://bucket/a:b/c@d"):
        assert parse(fine).url == fine
    assert parse("sftp://me:planted@host:22/run").url == "sftp://host:22/run"
