"""A job that claims nothing and writes nothing: it loads a checkpoint, trains the recorded steps again, and compares.

Collective where it says so. Only rank 0 has recorded rows, and its own; every rank knows which step is the last.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import msgspec

from gpumove.config import Config
from gpumove.environment.compare import numeric, of, same_devices
from gpumove.environment.fingerprint import fingerprint
from gpumove.errors import ConfigError, GpumoveError, IntegrityError, describe, rebuild
from gpumove.format.manifest import Checkpoint
from gpumove.from_env import RunFolder, another
from gpumove.handle import SaveHandle
from gpumove.meeting import Described
from gpumove.parity.followed import Followed, find_followed
from gpumove.parity.recorder import Recorder, told
from gpumove.parity.rows import Setting
from gpumove.parity.verdict import Certificate, judge
from gpumove.state.peers import Peers
from gpumove.store.log import Log
from gpumove.takeover import Takeover

_log = logging.getLogger("gpumove")
_OTHERWISE = ("script", "commit", "ranks", "ranks per machine")
"""Differences of fingerprints that are no reason to round otherwise; the ranks are told apart by themselves."""


class _Found(msgspec.Struct):
    """What rank 0 tells the others."""

    checkpoint: Checkpoint | None = None
    until: int = 0
    error: Described | None = None


class Replay:
    """One rank's side."""

    def __init__(self, peers: Peers, log: Log, config: Config, takeover: Takeover, recorder: Recorder) -> None:
        self._peers, self._book, self._config = peers, log, config
        self._takeover, self._recorder = takeover, recorder
        self._followed: Followed | None = None  # on rank 0
        self._at: Checkpoint | None = None
        self._until = 0
        self.certificate: Certificate | None = None
        """On all ranks, once the last step was told; on rank 0 also of a job that has ended before."""

    def restore(self, step: int | None, *, strict: bool) -> int:
        """Load the checkpoint that is to be certified, on all ranks, without a claim.

        Raises:
            ConfigError: there is no such run, or checkpoint, or the script opens another run than it was told.
            IntegrityError: every checkpoint that could be certified is damaged.
            ParityError: no checkpoint is followed by recorded steps (code ``parity.unknown``).
        """
        self._takeover.begin()
        damaged: list[int] = []
        while True:
            self._peers.meet("the choice of a checkpoint to certify")
            found = self._look(step, damaged) if self._peers.rank == 0 else _Found()
            found = msgspec.msgpack.decode(self._peers.broadcast(msgspec.msgpack.encode(found)), type=_Found)
            if found.error is not None:
                raise rebuild(found.error)
            assert found.checkpoint is not None
            try:
                self._takeover.read(found.checkpoint, strict=strict)
            except IntegrityError as error:  # or retention of the run's owner has just removed it
                _log.warning("step %d is damaged and is skipped: %s", found.checkpoint.step, error)
                damaged.append(found.checkpoint.number)
                continue
            self._at, self._until, self.certificate = found.checkpoint, found.until, None
            self._recorder.clear()
            _log.info("certifying: the steps %d to %d of %s are trained again; nothing is claimed, nothing is saved",
                      found.checkpoint.step + 1, found.until, self._book.store.url)  # fmt: skip
            return found.checkpoint.step

    def _look(self, step: int | None, damaged: Sequence[int]) -> _Found:
        try:
            self._check_place()
            self._followed = find_followed(self._book, self._config.certify, step=step, without=damaged)
        except GpumoveError as error:
            return _Found(error=describe(error))
        return _Found(self._followed.checkpoint, self._followed.rows[-1].step)

    def _check_place(self) -> None:
        """A script may name a URL by itself: then it is not the run that was asked about."""
        if (asked := another(*self._config.run_place(), self._book.store.url)) is not None:
            raise ConfigError(
                f"{asked} is to be certified, and the script opens {self._book.store.url}: use Checkpointer.from_env "
                "in it, or the variable GPUMOVE_URL"
            )

    # ---------------------------------------------------------------- training

    def step(self, step: int) -> bool:
        """A step is complete. True on all ranks after the last one that is compared; collective there.

        Raises:
            ConfigError: nothing was restored, or the job trains on beyond the last one.
        """
        self._check_begun()
        if step < self._until:
            return False
        if self.certificate is not None and step > self._until:
            raise ConfigError(
                f"the job is only certified, up to step {self._until}: end the loop when step() returns True"
            )
        if self.certificate is None:
            self._until = step  # of a script that counts otherwise
            self._peers.meet("the end of the certificate")
            made = msgspec.json.encode(self._judge()) if self._peers.rank == 0 else b""
            self._keep(msgspec.json.decode(self._peers.broadcast(made), type=Certificate))
        return True

    def save(self, step: int) -> SaveHandle:
        """A save that is none: its handle waits for nothing, and gives the checkpoint that is certified."""
        self._check_begun()
        handle = SaveHandle(step, "")
        handle.instead = "not saved: the job is only certified"
        if self._at is not None:
            handle.mark_committed(self._at, 0.0)
        handle.finish()
        return handle

    def _check_begun(self) -> None:
        if self._at is None:
            raise ConfigError("a job that is only certified begins with restore(): call it before the first step")

    def close(self) -> None:
        """The job ends. If it never came to the last step, what it did is compared on rank 0."""
        if self._at is not None and self.certificate is None and self._peers.rank == 0:
            self._keep(self._judge())

    # ---------------------------------------------------------------- judging, on rank 0

    def _judge(self) -> Certificate:
        assert self._followed is not None
        assert self._at is not None
        before = of(self._followed.manifest)
        here = fingerprint(world_size=self._peers.world_size)
        rounding = [d for d in numeric(before, here) if d.field not in _OTHERWISE]
        setting = Setting(
            url=self._book.store.url, run=self._book.run, step=self._at.step, entry=self._at.number,
            asked=self._config.certify, recorded=len(self._followed.rows),
            world_sizes=(self._followed.manifest.world_size, self._peers.world_size),
            same_devices=same_devices(before, here),
            same_kind=bool(before.get("devices")) == bool(here.get("devices")),
            differences=tuple(f"{d.field}: {d.before} -> {d.after}" for d in rounding),
            reproducible=not here.get("devices") or bool(here.get("torch", {}).get("deterministic")),
            tolerance=self._config.certify_tolerance,
        )  # fmt: skip
        return judge(self._followed.rows, told(self._recorder.since(self._at.step)), setting)

    def _keep(self, certificate: Certificate) -> None:
        self.certificate = certificate
        say = _log.info if certificate.good else _log.warning
        say("certificate of step %d: %s", certificate.setting.step, certificate.text)
        folder = self._config.run_place()[1]
        if folder is not None:
            with contextlib.suppress(OSError):  # the log says it too
                RunFolder(folder).put_certificate(msgspec.json.encode(certificate))
