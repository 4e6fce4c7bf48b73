"""``gpumove.stage``: the shards of a dataset, each on the local disk before training asks for it.

It knows an order of names and who uses which; how a shard gets here is the fetcher's business. No torch.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gpumove.config import Config
from gpumove.data.fetcher import Fetcher
from gpumove.data.folder import ROOM, Folder
from gpumove.data.sums import parse
from gpumove.errors import ConfigError, StoreError
from gpumove.move.plain import Ledger
from gpumove.store.objects import Store

_PATTERN = frozenset("*?[")


@dataclass(frozen=True)
class StageStats:
    """What one process has asked for and got."""

    shards: int
    """That were handed out."""
    fetched: int
    """That came from the store; the others were there."""
    fetched_bytes: int
    waited_s: float
    """That training stood still for them."""


class _Live:
    """What belongs to one process: threads, locks, connections."""

    def __init__(self, store: Store, fetcher: Fetcher) -> None:
        self.pid = os.getpid()
        self.store, self.fetcher = store, fetcher
        self.lock = threading.Lock()
        self.using: dict[int, str] = {}
        """By thread: what it was given last."""


class Stage:
    """The shards of one dataset, in order. Made by :func:`stage`; may be handed to workers, forked or spawned.

    One ``for`` is one pass, from ``position`` to the end; after a ``break`` the next one goes on behind the shard that
    was handed out last. A path stays valid until the same thread asks for another one; a file that is open then can be
    read on.
    """

    def __init__(
        self, url: str, folder: str | os.PathLike[str], names: Sequence[str], *, ahead: int, position: int,
        limit_bytes: int | None, sizes: Mapping[str, int], digests: Mapping[str, str],
        options: Mapping[str, Any], config: Config,
    ) -> None:  # fmt: skip
        self.names: tuple[str, ...] = tuple(names)
        """The shards in their order. The same on every rank that was given the same arguments."""
        self.position = position
        """The number of shards of this pass that were handed out. The one in use is ``position - 1``."""
        self.folder = Path(os.path.abspath(os.path.expanduser(folder)))
        """Where they are staged."""
        self._url, self._ahead, self._limit_bytes = url, ahead, limit_bytes
        self._sizes, self._digests, self._options, self._config = sizes, digests, options, config
        self._places = {name: place for place, name in enumerate(self.names)}
        self._handed_out, self._waited_s = 0, 0.0
        self._live: _Live | None = None

    def __len__(self) -> int:
        """Shards of a whole pass."""
        return len(self.names)

    def __iter__(self) -> Iterator[Path]:
        """One pass."""
        while self.position < len(self.names):
            path = self.get(self.names[self.position])
            self.position += 1
            yield path
        self.position = 0
        self._done()

    def get(self, name: str) -> Path:
        """One shard, now. Those that follow it in ``names`` are fetched ahead.

        Raises:
            ConfigError: it is none of ``names``, or a file of somebody else's is in its place.
            StoreError: it cannot be read or written. IntegrityError: its bytes are wrong.
        """
        place = self._places.get(name)
        if place is None:
            raise ConfigError(f"{name!r} is none of the {len(self.names)} shards that are staged", code="config.stage")
        live, began = self._now(), time.perf_counter()
        with live.lock:
            live.using[threading.get_ident()] = name
            self._handed_out += 1
            self._want(live, [name, *self.names[place + 1 : place + 1 + self._ahead]])
        path = live.fetcher.wait(name).path
        self._waited_s += time.perf_counter() - began
        return path

    def _want(self, live: _Live, names: Sequence[str]) -> None:
        alive = {thread.ident for thread in threading.enumerate()}
        live.using = {ident: name for ident, name in live.using.items() if ident in alive}
        live.fetcher.want(list(dict.fromkeys([*names, *live.using.values()])))

    def _done(self) -> None:
        """This thread uses nothing any more."""
        live = self._now()
        with live.lock:
            live.using.pop(threading.get_ident(), None)
            self._want(live, [])

    @property
    def stats(self) -> StageStats:
        """Of this process, so far."""
        live = self._live
        fetched, nbytes = (live.fetcher.fetched, live.fetcher.fetched_bytes) if live else (0, 0)
        return StageStats(self._handed_out, fetched, nbytes, self._waited_s)

    def close(self) -> None:
        """Let go of all shards and connections. What it handed out may be evicted from now on."""
        live, self._live = self._live, None
        if live is not None and live.pid == os.getpid():
            live.fetcher.close()
            live.store.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: a worker opens its own."""
        return {**self.__dict__, "_live": None, "_handed_out": 0, "_waited_s": 0.0}

    def _now(self) -> _Live:
        """The live parts, made when they are first needed, and anew in a forked child."""
        if self._live is None or self._live.pid != os.getpid():
            if self._live is not None:
                self._handed_out, self._waited_s = 0, 0.0
            store = Store.open(self._url, self._config, options=self._options)
            folder = Folder(self.folder, store.url, self._limit_bytes)
            folder.tidy()
            fetcher = Fetcher(store, folder, self._config, sizes=self._sizes, digests=self._digests)
            self._live = _Live(store, fetcher)
        return self._live


def stage(
    url: str,
    local_dir: str | os.PathLike[str],
    *,
    names: Iterable[str] | None = None,
    ahead: int = 2,
    start: int = 0,
    limit_bytes: int | None = None,
    digests: Mapping[str, str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    config: Config | None = None,
) -> Stage:
    """Stage a dataset's shards on a local disk, ahead of their use::

        for path in gpumove.stage("s3://data/train", "/nvme/train", names=["shard-*.tar"]):
            ...

    Args:
        url: the prefix below which they lie.
        local_dir: the folder that gets them. Several processes of one machine may share it.
        names: names below ``url`` in the order of use, and patterns, which stand for all names that match, sorted.
            Default: everything below ``url``, listed once, sorted.
        ahead: shards to fetch while another one is used.
        start: shards of the first pass that a resumed job has behind it.
        limit_bytes: keep what was used while all staged shards have no more bytes than this; the least recently used
            goes first. Default: what was used goes at once.
        digests: what the shards' bytes are to be, by name, such as ``"sha256:..."``; by default what the ledger of
            ``gpumove replicate`` says, if there is one. The store's own checksums are compared in any case.
        storage_options: for fsspec.
        config: concurrency and patience; by default from the environment.

    Raises:
        ConfigError: an argument is wrong, or there is no such shard.
        StoreError: the prefix could not be listed.
    """
    config, options = Config.from_env() if config is None else config, dict(storage_options or {})
    given = None if names is None else [names] if isinstance(names, str) else list(names)
    with closing(Store.open(url, config, options=options)) as store:
        if f"file://{os.path.abspath(os.path.expanduser(local_dir))}/".startswith(f"{store.url}/"):
            raise ConfigError(f"{local_dir} lies within {store.url}: stage to another folder", code="config.stage")
        looked = given is None or any(_PATTERN & set(name) for name in given)
        sizes = _listed(store) if looked else {}
        order = list(sizes) if given is None else _expanded(given, sizes, store.url)
        _check(order, ahead=ahead, start=start, limit_bytes=limit_bytes, url=store.url)
        known = {**_ledger(store, sizes), **(digests or {})}
    return Stage(
        url, local_dir, order, ahead=ahead, position=start, limit_bytes=limit_bytes, options=options, config=config,
        sizes={name: sizes[name] for name in order if name in sizes},
        digests={name: parse(known[name], name=name) for name in order if name in known},
    )  # fmt: skip


def _listed(store: Store) -> dict[str, int]:
    return {found.key: found.nbytes for found in store.list("") if not found.key.startswith(".")}


def _ledger(store: Store, sizes: Mapping[str, int]) -> dict[str, str]:
    """What ``gpumove replicate`` has noted of the bytes, where it brought them."""
    ledger = Ledger(store)
    try:
        ledger.read()
    except StoreError as error:
        if error.code != "store.denied":  # who gives the names may not be allowed to list
            raise
    lines = ledger.lines.values()
    return {line.key: line.digest for line in lines if sizes.get(line.key, line.nbytes) == line.nbytes}


def _expanded(given: Sequence[str], listed: Mapping[str, int], url: str) -> list[str]:
    """Each name once, at its first place."""
    order: dict[str, None] = {}
    for name in given:
        found = [name]
        if _PATTERN & set(name) and name not in listed:
            found = [key for key in listed if fnmatchcase(key, name)]
        if not found:
            raise ConfigError(f"nothing below {url} matches {name!r}", code="config.stage")
        order.update(dict.fromkeys(found))
    return list(order)


def _check(names: Sequence[str], *, ahead: int, start: int, limit_bytes: int | None, url: str) -> None:
    problems = [] if names else [f"there is nothing to stage below {url}"]
    if type(ahead) is not int or ahead < 0:
        problems.append(f"ahead must be an int of at least 0, not {ahead!r}")
    if type(start) is not int or not 0 <= start <= len(names):
        problems.append(f"start must be an int between 0 and the number of shards, {len(names)}, not {start!r}")
    if limit_bytes is not None and (type(limit_bytes) is not int or limit_bytes < 1):
        problems.append(f"limit_bytes must be None or an int above 0, not {limit_bytes!r}")
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..", ROOM) for part in parts) or "\0" in name or "\\" in name:
            problems.append(f"{name!r} cannot be the name of a local file")
    if problems:
        raise ConfigError("; ".join(problems[:5]), code="config.stage")
