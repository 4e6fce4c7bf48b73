"""A job that was moved compares itself with where it comes from, for some steps: on rank 0, beside the training.

What it needs lies in the log: the newest word of the move has the baseline, and how far the comparison is. So a job
that is started again goes on with it, and whoever follows the log sees it. Losses on a device are waited for in a
thread of its own, never in the training thread.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from gpumove.config import Config
from gpumove.environment.compare import of, same_devices
from gpumove.environment.fingerprint import fingerprint
from gpumove.errors import GpumoveError, ParityError, describe
from gpumove.format.manifest import Checkpoint
from gpumove.health import Finding
from gpumove.parity.recorder import Heard, Recorder
from gpumove.parity.watch import Found, Judge, Told, from_facts, in_text, told
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import read_manifest
from gpumove.store.view import View

_log = logging.getLogger("gpumove")
_LOOK_S = 0.25
_WORDS = 10
"""How often in all it is said how far the comparison is."""
_FAREWELL_S = 0.5
_MOST = 10_000


class Watching:
    """One rank's; idle on all but the first, and where nothing was moved."""

    def __init__(self, config: Config, recorder: Recorder, tell: Callable[[Finding], None]) -> None:
        """Nothing is compared yet.

        Args:
            config: the run's.
            recorder: hears every step.
            tell: told what is found.
        """
        self._config, self._recorder, self._tell = config, recorder, tell
        self.objection: tuple[str, str, str] | None = None
        """The error that all ranks are to raise."""
        self._state: Told | None = None
        self._lock = threading.Lock()
        self._said: tuple[int, int, bool, str] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------- the training thread

    def begin(self, log: Log, found: Checkpoint, *, world_size: int) -> None:
        """The run goes on from here: compare, if it was moved here lately.

        Args:
            log: as it was claimed; empty on other ranks.
            found: the checkpoint that was restored.
            world_size: of this job.
        """
        self._end("")
        state = _state(log.view, self._config.watch_steps)
        if state is None or found.step >= state.handed + state.steps:
            return
        if found.step < state.handed:
            _log.warning(
                "step %d, from which the run goes on, is before step %d, which was handed over: what follows is not "
                "compared with where the run comes from", found.step, state.handed,
            )  # fmt: skip
            return
        self._state, self._stop, heard = state, threading.Event(), deque[Heard](maxlen=_MOST)
        self._recorder.heard = heard
        work = (self._stop, heard, log.store, found, world_size)
        self._thread = threading.Thread(target=self._run, args=work, name="gpumove-parity", daemon=True)
        self._thread.start()

    @property
    def presses(self) -> bool:
        """Whether the ranks are to meet soon, because that is how they learn that the job stops."""
        return self._config.on_parity == "stop" and self._recorder.heard is not None

    def close(self, error: BaseException | None, *, left: bool) -> None:
        """The job ends.

        Args:
            error: what has ended it.
            left: whether it was asked to leave.
        """
        self._end(type(error).__name__ if error is not None else "left" if left else "finished")

    def _end(self, why: str) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_FAREWELL_S)
        if self._state is not None and not self._state.over and why:
            self._change(ended=why)
        self._thread, self._recorder.heard = None, None
        if not why:
            self._state, self._said, self.objection = None, None, None

    # ---------------------------------------------------------------- any thread

    def facts(self, epoch: int) -> dict[str, Any]:
        """For the word that the job has arrived."""
        state = self._state
        if state is None:
            return {}
        return {"watch": msgspec.to_builtins(self._change(epoch=state.epoch or epoch))}

    def news(self) -> tuple[dict[str, Any], str] | None:
        """What is to be said in the log, as facts and in words; None if nothing new."""
        state = self._state
        if state is None or (state.step is None and not state.ended) or self._mark(state) == self._said:
            return None
        found = "; ".join(str(f.get("text")) for f in state.findings) or "nothing was found"
        far = f"{(state.step or state.handed) - state.handed} of {state.steps} steps after the move: {found}"
        ended = f"; the job ended: {state.ended}" if state.ended else ""
        words = in_text(state.standing, state.unjudged) if state.over else ""
        return msgspec.to_builtins(state), far + ended + (f"; {words}" if words else "")

    def said(self) -> None:
        """It is in the log."""
        if self._state is not None:
            self._said = self._mark(self._state)

    def _change(self, **changes: Any) -> Told:
        with self._lock:
            assert self._state is not None
            self._state = msgspec.structs.replace(self._state, **changes)
            return self._state

    @staticmethod
    def _mark(state: Told) -> tuple[int, int, bool, str]:
        done = (state.step or state.handed) - state.handed
        return done * _WORDS // state.steps, len(state.findings), state.over, state.ended

    # ---------------------------------------------------------------- its own thread

    def _run(
        self, stop: threading.Event, heard: deque[Heard], store: Store, found: Checkpoint, world_size: int
    ) -> None:
        try:
            self._compare(stop, heard, self._judge(store, found, world_size))
        except Exception:  # noqa: BLE001 - whatever it is, it must not touch the training
            _log.exception("the comparison with where the run comes from broke off")
        if self._recorder.heard is heard:
            self._recorder.heard = None

    def _judge(self, store: Store, found: Checkpoint, world_size: int) -> Judge:
        state = self._state
        assert state is not None
        ratio = state.ratio
        if ratio is None and found.step == state.handed:
            ratio = _same_ratio(store, found, world_size)
        self._change(ratio=ratio)
        return Judge(from_facts(state.baseline), ratio)

    def _compare(self, stop: threading.Event, heard: deque[Heard], judge: Judge) -> None:
        if missing := judge.unjudged():
            self._change(unjudged=tuple(missing))
            _log.warning("after the move these cannot be compared with the source: %s", "; ".join(missing))
        ended = False
        while not ended:
            ended = stop.wait(_LOOK_S)
            while heard:
                step, loss, seconds, ready = heard.popleft()
                if self._looked_at(step, judge, judge.add(step, _number(loss, ready), seconds)):
                    return

    def _looked_at(self, step: int, judge: Judge, found: list[Found]) -> bool:
        """Whether it is over."""
        state = self._state
        if state is None:
            return True
        over = step >= state.handed + state.steps
        for each in found:
            self._act(each, state)
        findings = (*state.findings, *({"what": f.what, "step": f.step, "text": f.text} for f in found))
        self._change(step=step, findings=findings, over=over, standing=judge.standing())
        if over and not findings:
            words = in_text(judge.standing(), judge.unjudged())
            _log.info("%d steps after the move nothing was found that was not so before: %s", state.steps, words)
        return over

    def _act(self, found: Found, state: Told) -> None:
        text = f"not as before the move: {found.text}"
        if self._config.on_parity == "stop":
            self.objection = describe(
                ParityError(
                    f"after step {found.step}, {text}. Nothing more is saved. Take the run back with gpumove move "
                    f"--rollback --discard, which goes on from step {state.handed}, as it was handed over",
                    code="parity.after_move",
                )
            )
        self._tell(Finding("parity", found.step, text))


def _state(view: View, steps: int) -> Told | None:
    """What is to be compared here, as the newest word of a move says."""
    move = view.move
    if not steps or move is None or view.follows or view.sealed:
        return None
    if move.state == "handover":
        step = move.facts.get("step")
        if type(step) is not int or not move.facts.get("moved"):
            return None  # withdrawn: the run has been nowhere else
        return Told(step, steps, 0, move.facts.get("baseline"), _positive(move.facts.get("step_ratio")))
    state = told(move) if move.is_over else None
    return None if state is None else msgspec.structs.replace(state, steps=steps, ended="", over=False)


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 < value < math.inf else None


def _same_ratio(store: Store, found: Checkpoint, world_size: int) -> float | None:
    """1 if as many of the same devices train here."""
    try:
        before = of(read_manifest(store, found))
    except GpumoveError:
        return None
    here = fingerprint(world_size=world_size)
    alike = before.get("world_size") == world_size and same_devices(before, here)
    return 1.0 if alike else None


def _number(loss: Any, ready: torch.cuda.Event | None) -> float | None:
    """In this thread a device may be waited for."""
    try:
        if ready is not None:
            ready.synchronize()
        return None if loss is None else float(loss)
    except (TypeError, ValueError, RuntimeError):
        return None
