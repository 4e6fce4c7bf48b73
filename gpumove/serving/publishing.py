"""Publishing: names that inference servers follow, each a row of numbered, create-only pointers. The newest counts.

No ownership is needed: it goes on beside a training. Nothing is ever changed or deleted, so that what a name stood for
at any time can be read, and ``demote`` can go back. docs/serving.md says how it is used, store/pointers.py what
retention makes of it.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gpumove.config import Config
from gpumove.errors import ConfigError, FencedError, IntegrityError, ParityError
from gpumove.format.manifest import FORMAT, LogEntry, Manifest, Pin, encode_checked
from gpumove.format.pointer import Pointer, check_name
from gpumove.inspection.receipt import read_receipt
from gpumove.inspection.run import open_run, pick
from gpumove.parity.outputs import Array
from gpumove.serving.following import newest_of, nothing
from gpumove.serving.gate import judge, read
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.pointers import numbers, read_pointer
from gpumove.store.records import read_manifest
from gpumove.store.view import View

_log = logging.getLogger("gpumove")
Options = Mapping[str, Any] | None


def publish(
    url: str,
    step: int | None,
    name: str,
    *,
    outputs: Any = None,
    probe: str | None = None,
    tolerance: float | None = None,
    export: str | os.PathLike[str] | None = None,
    text: str = "",
    config: Config | None = None,
    storage_options: Options = None,
    export_options: Options = None,
) -> Pointer:
    """Have a name stand for a checkpoint, from now on.

    Args:
        url: the run; it may be training.
        step: which checkpoint; the newest if None.
        name: such as ``"canary"``.
        outputs: what the serving stack computes for the probe's inputs, as for :func:`gpumove.check_probe`; they are
            compared first, and nothing is published if they differ.
        probe: which of the checkpoint's probes they are of.
        tolerance: the largest difference that passes, as a share of the largest recorded value.
        export: the folder, or the URL, of an export of this checkpoint (``gpumove export``), for those who follow.
        text: why; for people.
        config: bounds; by default from the environment.
        storage_options: for fsspec.
        export_options: likewise, of ``export``.

    Raises:
        ConfigError: no such run or checkpoint, a bad name; or somebody else has published under the name meanwhile
            (code ``config.raced``).
        ParityError: the outputs differ from what was recorded.
        FencedError: this is a replica, or the run was moved away: publish where it trains.
        IntegrityError: the checkpoint is damaged.
    """
    check_name(name)
    live = _given(outputs, probe, tolerance)
    with _at_home(url, config, storage_options) as log:
        checkpoint = pick(log.view, step, url=log.store.url)
        if checkpoint.number in log.view.damaged:
            raise IntegrityError(f"step {checkpoint.step} is known to be damaged: publish another checkpoint")
        manifest = read_manifest(log.store, checkpoint)
        gate = {} if live is None else _passed(manifest, live, probe, tolerance)
        bounds = Config.from_env() if config is None else config
        found = None if export is None else read_receipt(export, checkpoint, log.run, bounds, export_options)
        fields = {"step": checkpoint.step, "attempt": checkpoint.attempt, "manifest": checkpoint.manifest}
        return _point(log, name, "publish", {**fields, "export": found, "gate": gate}, text=text)


def promote(
    url: str,
    source: str,
    name: str,
    *,
    outputs: Any = None,
    probe: str | None = None,
    tolerance: float | None = None,
    gate: bool = True,
    text: str = "",
    config: Config | None = None,
    storage_options: Options = None,
) -> Pointer:
    """Have a name stand for what another name stands for, if the output probe agrees.

    Args:
        url: the run.
        source: the name that has it, such as ``"canary"``.
        name: the name that is to have it, such as ``"production"``.
        outputs: what the serving stack computes for the probe's inputs, with what ``source`` stands for.
        probe: which of the checkpoint's probes they are of.
        tolerance: the largest difference that passes, as a share of the largest recorded value.
        gate: whether that is asked for at all; without, there are to be no outputs.
        text: why; for people.
        config: bounds; by default from the environment.
        storage_options: for fsspec.

    Raises:
        ConfigError: nothing is published as ``source``, or it is ``name`` itself; no outputs were given, or the
            checkpoint has no such probe.
        ParityError: the outputs differ from what was recorded.
        FencedError: this is a replica, or the run was moved away.
        IntegrityError: the pointer or the checkpoint is damaged.
    """
    check_name(source), check_name(name)
    if source == name:
        raise ConfigError(f"{name} stands for that already: name another one", code="config.same_name")
    live = _given(outputs, probe, tolerance, gate=gate)
    with _at_home(url, config, storage_options) as log:
        pointer = newest_of(log.store, source)
        log.follow()  # it may stand for what was committed since
        manifest = read_manifest(log.store, pick(log.view, pointer, url=log.store.url))
        if live is None and gate:
            raise ConfigError(
                f"the gate is closed: give the outputs of what {source} serves (step {pointer.step}) for the inputs of "
                "its probe, or leave the gate out (--no-gate)",
                code="config.no_outputs",
            )
        said = {} if live is None else _passed(manifest, live, probe, tolerance)
        fields = {"step": pointer.step, "attempt": pointer.attempt, "manifest": pointer.manifest}
        more = {"export": pointer.export, "source": source, "gate": said}
        return _point(log, name, "promote", fields | more, text=text)


def demote(
    url: str,
    name: str,
    *,
    retire: bool = False,
    text: str = "",
    config: Config | None = None,
    storage_options: Options = None,
) -> Pointer:
    """Take back what was done last under a name: it stands again for what it stood for before.

    Args:
        url: the run.
        name: such as ``"production"``.
        retire: have it stand for nothing; retention then keeps nothing for it any more.
        text: why; for people.
        config: bounds; by default from the environment.
        storage_options: for fsspec.

    Raises:
        ConfigError: nothing is published under the name, or there was nothing before; or what was there before is gone.
        FencedError: this is a replica, or the run was moved away.
    """
    check_name(name)
    with _at_home(url, config, storage_options) as log:
        known = numbers(log.store, name).get(name)
        if not known:
            raise nothing(log.store, name)
        if retire:
            return _point(log, name, "retire", {}, text=text)
        newest = read_pointer(log.store, name, known[-1])
        if newest.previous is None:
            raise ConfigError(
                f"nothing is known that {name} stood for before {newest.mark}: there is nothing to go back to "
                "(--retire takes the name out of use)",
                code="config.no_earlier",
            )
        if newest.previous not in known:
            raise ConfigError(
                f"{name}/{newest.previous}, which {newest.mark} would go back to, did not come along from where the "
                "run was: publish a checkpoint that is here",
                code="config.no_earlier",
            )
        before = read_pointer(log.store, name, newest.previous)
        kept = ("step", "attempt", "manifest", "export", "gate", "source")
        fields = {field: getattr(before, field) for field in kept}
        return _point(log, name, "demote", {**fields, "previous": before.previous}, text=text)


# -------------------------------------------------------------------- what they share


@contextlib.contextmanager
def _at_home(url: str, config: Config | None, storage_options: Options) -> Iterator[Log]:
    """A run, read, where its names are made."""
    with open_run(url, config=config, storage_options=storage_options) as log:
        _check_here(log.read(), log.store.url)
        yield log


def _given(outputs: Any, probe: str | None, tolerance: float | None, *, gate: bool = True) -> dict[str, Array] | None:
    """What is to be compared, if anything is.

    Raises:
        ConfigError: the arguments contradict one another: a gate that somebody relies on would not be one.
    """
    if outputs is None and (probe is not None or tolerance is not None):
        raise ConfigError(
            "probe and tolerance say how outputs are compared, and none are given: nothing would be. Give the outputs "
            "too (--outputs), or leave out the others",
            code="config.no_outputs",
        )
    if outputs is not None and not gate:
        raise ConfigError("outputs are given, and are not to be compared (--no-gate): leave out one of the two")
    return None if outputs is None else read(outputs)


def _passed(
    manifest: Manifest, live: Mapping[str, Array], probe: str | None, tolerance: float | None
) -> dict[str, Any]:
    result = judge(manifest, live, name=probe, tolerance=tolerance)
    if not result.ok:
        raise ParityError(
            f"{result.text}. Look whether the weights, the dtype and the inputs are those of the probe; a difference "
            "that is known and wanted can be let pass with a tolerance",
            code="parity.different",
        )
    return result.facts


def _point(log: Log, name: str, action: str, fields: Mapping[str, Any], *, text: str) -> Pointer:
    """Mark the checkpoint in the log, so that no retention takes it, then make the pointer; in this order."""
    log.follow()
    _check_here(log.view, log.store.url)
    known = numbers(log.store, name).get(name, [])
    number = known[-1] + 1 if known else 1
    pointer = Pointer(
        format=FORMAT, run=log.run, name=name, number=number, action=action, time=time.time(), by=_who(),
        writer=log.writer, text=text, **{"previous": _previous(log.store, name, known, fields), **fields},
    )  # fmt: skip
    if pointer.step is not None:
        log.append(_marking(pointer, log.store.url, log.writer))
    if not log.store.create(pointer.key, encode_checked(pointer)):
        raise ConfigError(
            f"somebody else has published as {name} meanwhile, number {number}, and nothing was changed here: look at "
            "it with gpumove pointers, and say again what you want",
            code="config.raced",
        )
    _log.info("%s: %s stands for %s", action, pointer.mark, "nothing" if pointer.step is None else pointer.step)
    return pointer


def _previous(store: Store, name: str, known: list[int], fields: Mapping[str, Any]) -> int | None:
    """What a demote goes back to: the newest now, or what is before it if that names the same checkpoint."""
    if not known:
        return None
    with contextlib.suppress(IntegrityError):
        newest = read_pointer(store, name, known[-1])
        return newest.previous if newest.attempt == fields.get("attempt", "") else newest.number
    return None


def _marking(pointer: Pointer, url: str, writer: str) -> Callable[[View, int], LogEntry]:
    def make(view: View, number: int) -> LogEntry:
        _check_here(view, url)
        checkpoint = pick(view, pointer, url=url)  # retention may have passed by
        # To an older gpumove this pins the checkpoint, which is the careful way to read it.
        return Pin(
            format=FORMAT, number=number, epoch=view.epoch, writer=writer, time=time.time(),
            checkpoint=checkpoint.number, pinned=True, pointer=pointer.mark,
        )  # fmt: skip

    return make


def _check_here(view: View, url: str) -> None:
    """Two histories of one name would be worse than none: pointers are made where the run is at home."""
    if view.follows:
        raise FencedError(
            f"{url} is a replica of {view.follows}: publish there, and replicate brings it here", code="fenced.moved"
        )
    if view.sealed:
        raise FencedError(f"the run of {url} was moved to {view.sealed}: publish there", code="fenced.moved")


def _who() -> str:
    user = "somebody"
    with contextlib.suppress(Exception):  # a container may know no name for its user
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()}"
