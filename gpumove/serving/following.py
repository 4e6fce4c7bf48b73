"""Following published names: what an inference server calls. It only reads, from the run or from a replica of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError, IntegrityError
from gpumove.format.pointer import Exported, Pointer, check_name
from gpumove.inspection.run import open_run
from gpumove.store.objects import Store
from gpumove.store.pointers import numbers, read_pointer
from gpumove.store.retry import unless

_log = logging.getLogger("gpumove")
Options = Mapping[str, Any] | None


def resolve(url: str, name: str, *, config: Config | None = None, storage_options: Options = None) -> Pointer:
    """What a name stands for now.

    Args:
        url: the run, or a replica of it.
        name: such as ``"production"``.
        config: bounds; by default from the environment.
        storage_options: for fsspec.

    Returns:
        The pointer. It may be given to ``gpumove.load`` and ``gpumove.check_probe`` as the step.

    Raises:
        ConfigError: nothing is published under the name (code ``config.no_pointer``).
        IntegrityError: the newest pointer is damaged.
    """
    config = Config.from_env() if config is None else config
    with closing(Store.open(url, config, options=storage_options)) as store:
        return newest_of(store, check_name(name))


def follow(
    url: str,
    name: str,
    *,
    every_s: float = 10.0,
    stop: threading.Event | None = None,
    config: Config | None = None,
    storage_options: Options = None,
) -> Iterator[Pointer]:
    """What a name stands for, and again whenever that changes: the loop of an inference server.

    A look is one listing. A store that does not answer, or a pointer that cannot be read, is logged, and the next look
    comes as usual: what is served stays. A name that is not published yet, or not any more, is waited for.

    Args:
        url: the run, or a replica of it.
        name: such as ``"production"``.
        every_s: seconds between two looks.
        stop: set it to end; no store is waited for then.
        config: bounds; by default from the environment.
        storage_options: for fsspec.

    Yields:
        The newest pointer, if it names another checkpoint or another export than the one before.
    """
    if not every_s > 0:
        raise ConfigError(f"every_s is a number of seconds above 0, not {every_s!r}")
    return _follow(url, check_name(name), every_s, stop or threading.Event(), config, storage_options)


def _follow(
    url: str, name: str, every_s: float, stop: threading.Event, config: Config | None, options: Options
) -> Iterator[Pointer]:
    seen, said = 0, ""
    served: tuple[str, Exported | None] = "", None
    with closing(Store.open(url, Config.from_env() if config is None else config, options=options)) as store:
        while not stop.is_set():
            try:
                with unless(stop.is_set):
                    number = max(numbers(store, name).get(name, ()), default=0)
                    pointer = read_pointer(store, name, number) if number > seen else None
                if not number and not said:
                    said = f"nothing is published as {name} at {store.url} yet"
                    _log.info("%s", said)
                elif number and number == seen:
                    said = ""  # should the store fail again, that is said again
                if pointer is not None:
                    seen, said = number, ""
                    if pointer.step is None:
                        _log.warning("%s stands for nothing now (%s): what is served stays", name, pointer.mark)
                    elif (pointer.attempt, pointer.export) != served:
                        served = pointer.attempt, pointer.export
                        yield pointer
            except GpumoveError as error:
                if str(error) != said and not stop.is_set():
                    _log.warning("following %s: %s; what is served stays", name, error)
                said = str(error)
            stop.wait(every_s)


def pointers(
    url: str, name: str | None = None, *, config: Config | None = None, storage_options: Options = None
) -> list[Pointer]:
    """The newest pointer of every name, or all of one name, oldest first. Damaged ones are named in a warning.

    Raises:
        ConfigError: there is no run at the URL, or nothing was ever published under the name.
        IntegrityError: none of them can be read.
    """
    with open_run(url, config=config, storage_options=storage_options) as log:
        found = numbers(log.store, None if name is None else check_name(name))
        if name is not None:
            if name not in found:
                raise nothing(log.store, name)
            return _readable(log.store, [(name, number) for number in found[name]])
        return _readable(log.store, [(word, known[-1]) for word, known in found.items()])


def _readable(store: Store, marks: Sequence[tuple[str, int]]) -> list[Pointer]:
    """Those that can be read: one that is damaged must not hide the others."""
    found: list[Pointer] = []
    lost: IntegrityError | None = None
    for name, number in marks:
        try:
            found.append(read_pointer(store, name, number))
        except IntegrityError as error:
            lost = error
            _log.warning("a pointer is left out: %s", error)
    if lost is not None and not found:
        raise lost
    return found


def nothing(store: Store, name: str) -> ConfigError:
    """That a name is not published, and which are."""
    have = ", ".join(numbers(store)) or "nothing"
    return ConfigError(f"nothing is published as {name} at {store.url}, but {have}", code="config.no_pointer")


def newest_of(store: Store, name: str) -> Pointer:
    """What a name stands for.

    Raises:
        ConfigError: nothing.
        IntegrityError: the newest pointer is damaged.
    """
    known = numbers(store, name).get(name)
    if not known:
        raise nothing(store, name)
    found = read_pointer(store, name, known[-1])
    if found.step is None:
        raise ConfigError(f"{name} stands for nothing at {store.url} ({found.mark})", code="config.no_pointer")
    return found
