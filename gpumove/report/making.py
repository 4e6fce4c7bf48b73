"""Makes the page of one run or two: opens, reads, checks, and gives back text. It writes nothing anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpumove.errors import ConfigError
from gpumove.inspection.run import open_run, verify
from gpumove.report.compare import compare
from gpumove.report.history import History, read_history
from gpumove.report.page import page


def report(
    urls: Sequence[str],
    *,
    deep: bool = False,
    hourly: Sequence[float] = (),
    storage_options: Sequence[Mapping[str, Any]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """A page about one run, or about both ends of a move.

    Args:
        urls: one, or the source and the target.
        deep: read every byte to tell whether checkpoints are sound.
        hourly: what the machines cost per hour: one price for all, or one for each side.
        storage_options: for fsspec, as many as URLs.
        progress: told (bytes read, bytes to read) of packs, where all are read.

    Returns:
        HTML.

    Raises:
        ConfigError: there is no run at a URL, or matplotlib is not installed.
        IntegrityError: a log has a hole.
        StoreError: a store failed.
    """
    if len(hourly) > 2:
        raise ConfigError(f"there are at most two sides, and {len(hourly)} prices were given")
    options = [*storage_options, {}, {}]
    found = [_read(url, deep=deep, options=given, progress=progress) for url, given in zip(urls, options)]
    return page(compare(found), hourly=hourly)


def _read(url: str, *, deep: bool, options: Mapping[str, Any], progress: Callable[[int, int], None] | None) -> History:
    with open_run(url, storage_options=options) as log:
        checked = verify(url, deep=deep, storage_options=options, progress=progress)
        return read_history(log, checked)
