"""Makes the page of one run or two: opens, reads, checks, and gives back text. It writes nothing anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpumove.inspection.run import open_run, verify
from gpumove.parity.verdict import read_certificate
from gpumove.report.bill import Rates, reckon
from gpumove.report.compare import compare
from gpumove.report.history import History, read_history
from gpumove.report.page import page


def report(
    urls: Sequence[str],
    *,
    deep: bool = False,
    rates: Rates | None = None,
    certificates: Sequence[str] = (),
    storage_options: Sequence[Mapping[str, Any]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """A page about one run, or about both ends of a move.

    Args:
        urls: one, or the source and the target.
        deep: read every byte to tell whether checkpoints are sound.
        rates: what is known of prices.
        certificates: files that ``gpumove certify`` has written.
        storage_options: for fsspec, as many as URLs.
        progress: told (bytes read, bytes to read) of packs, where all are read.

    Returns:
        HTML.

    Raises:
        ConfigError: there is no run at a URL, the rates do not fit, a certificate is none, or matplotlib is lacking.
        IntegrityError: a log has a hole.
        StoreError: a store failed.
    """
    known = [read_certificate(path) for path in certificates]
    options = [*storage_options, {}, {}]
    found = [_read(url, deep=deep, options=given, progress=progress) for url, given in zip(urls, options)]
    both = compare(found)
    return page(both, reckon(both, rates or Rates()), known)


def _read(url: str, *, deep: bool, options: Mapping[str, Any], progress: Callable[[int, int], None] | None) -> History:
    with open_run(url, storage_options=options) as log:
        checked = verify(url, deep=deep, storage_options=options, progress=progress)
        return read_history(log, checked)
