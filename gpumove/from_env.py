"""The folder that ``gpumove run`` shares with its workers: one request, one word per rank, and the store's options.

Small JSON files, each replaced as a whole. It knows neither processes nor checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import msgspec

from gpumove.errors import ConfigError, GpumoveError
from gpumove.notices.notice import Notice, Outcome
from gpumove.prctl import end_with_parent
from gpumove.store.address import parse

State = Literal["training", "left", "finished", "failed"]
T = TypeVar("T")

_SIGKILL = 9
_ERROR_CHARS = 16_000


class Word(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank says of itself in ``outcome-<rank>.json``."""

    pid: int
    state: State
    step: int = 0
    """The step that it was told last when this was written; the file is not written at every step."""
    outcome: Outcome | None = None
    source: str = ""
    """Of the notice that it has left on."""
    error: str | None = None
    """The traceback of what ended it."""
    exit_code: int | None = None
    """Of ``errors.py``, where that was an error of gpumove's."""
    code: str = ""
    """Likewise."""
    time: float = 0.0
    rank: int = 0


class Request(msgspec.Struct, frozen=True):
    """What ``request.json`` says: a notice on its way to the workers."""

    deadline: float | None
    source: str
    detail: str


class RunFolder:
    """The files, by name."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.request_file = self.path / "request.json"

    def ask(self, notice: Notice) -> None:
        """Ask the workers to leave, or to leave earlier than they were asked to before."""
        self._write(self.request_file, Request(notice.deadline, notice.source, notice.detail))

    def say(self, word: Word) -> None:
        """Put down a rank's word, in place of what it said before."""
        self._write(self.path / f"outcome-{word.rank}.json", word)

    def words(self) -> list[Word]:
        """What the ranks said last, by rank. A file that cannot be read says nothing."""
        found = (_decoded(path, Word) for path in self.path.glob("outcome-*.json"))
        return sorted((w for w in found if w is not None), key=lambda w: w.rank)

    def forget(self) -> None:
        """Before another attempt: what the ranks of the last one said is not said by these."""
        for path in self.path.glob("outcome-*.json"):
            path.unlink(missing_ok=True)

    def put_options(self, options: dict[str, Any]) -> None:
        """Hand the store's options to the workers. They may be secret: no command line or environment shows them."""
        self._write(self.path / "options.json", options)

    def options(self) -> dict[str, Any]:
        """The store's options."""
        return _decoded(self.path / "options.json", dict[str, Any]) or {}

    def put_certificate(self, certificate: bytes) -> None:
        """What a job that was only certified has found; the first rank of each machine is as good as any."""
        self._write(self.path / "certificate.json", msgspec.Raw(certificate))

    def certificate(self) -> bytes | None:
        """It, if there is one."""
        path = self.path / "certificate.json"
        return path.read_bytes() if path.exists() else None

    def _write(self, path: Path, what: object) -> None:
        """Readers see the old file or the new one, and only this user sees any."""
        draft = path.with_name(f".{path.name}-{os.getpid()}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(what))
        draft.replace(path)


def _decoded(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def where(url: str | None, folder: str | None) -> tuple[str, dict[str, Any]]:
    """The URL and the storage options of a Checkpointer that ``gpumove run`` started.

    Raises:
        ConfigError: nobody said where the run lies.
    """
    if not url:
        raise ConfigError(
            "GPUMOVE_URL is not set, so that from_env() does not know where the run lies: start the job with "
            "`gpumove run URL -- ...`, set the variable, or use Checkpointer(URL, ...)"
        )
    return url, RunFolder(folder).options() if folder else {}


def another(url: str | None, folder: str | None, opened: str) -> str | None:
    """The run that the launcher was given, if a script opens another one than that; None without a launcher."""
    if url is None or folder is None:
        return None
    asked, here = parse(url), parse(opened)
    return None if (asked.family, asked.root) == (here.family, here.root) else asked.url


class Worker:
    """One rank's side: it ends with torchrun, and puts down what becomes of it.

    A folder that cannot be written costs the parent its knowledge, never the training.
    """

    def __init__(self, folder: str, rank: int) -> None:
        self._folder, self._rank = RunFolder(folder), rank
        self._word = Word(pid=os.getpid(), state="training", rank=rank)
        die_with_parent()
        self._record_exceptions()
        self._say(self._word)

    def training(self, step: int) -> None:
        """Tell how far it is. For now and then, not for every step."""
        if self._word.state == "training":
            self._change(step=step)

    def left(self, step: int, outcome: Outcome, source: str) -> None:
        """It leaves on a notice from this source, with this outcome."""
        self._change(state="left", step=step, outcome=outcome, source=source)

    def finished(self, step: int) -> None:
        """The loop came to its end; nothing if it has left before."""
        if self._word.state == "training":
            self._change(state="finished", step=step)

    def failed(self, error: BaseException) -> None:
        """An exception ends it. The first one counts, and what it left behind before stays said."""
        if self._word.error is not None:
            return
        text = "".join(traceback.format_exception(error))[-_ERROR_CHARS:]
        exit_code, code = (error.exit_code, error.code) if isinstance(error, GpumoveError) else (None, "")
        state: State = "left" if self._word.state == "left" else "failed"
        self._change(state=state, error=text, exit_code=exit_code, code=code)

    def _change(self, **changes: Any) -> None:
        self._word = msgspec.structs.replace(self._word, **changes)
        self._say(self._word)

    def _say(self, word: Word) -> None:
        with contextlib.suppress(OSError):
            self._folder.say(msgspec.structs.replace(word, time=time.time()))

    def _record_exceptions(self) -> None:
        """What is raised outside the Checkpointer too: torchrun itself tells only that a rank ended with status 1."""
        previous = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if issubclass(kind, Exception):
                self.failed(error)
            previous(kind, error, trace)

        sys.excepthook = hook


def die_with_parent() -> None:
    """End with torchrun, however that ends: a worker without it holds its devices and goes on writing."""
    end_with_parent(_SIGKILL)
    if os.getppid() == 1:
        raise SystemExit("torchrun has died before this worker could bind itself to it")
