"""Data residency: in which region a store's data lies, and whether a policy allows it. It knows no runs and no moves.

Amazon and Google say where a bucket lies. Azure does not through its data plane, files and memory lie where their
machine is, and most other servers that speak S3 say us-east-1 wherever they stand: there, a person has to say it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from gpumove.errors import ConfigError
from gpumove.store.objects import Store

_CODE = "config.region"


def check_region(store: Store, allowed: str, said: str | None = None) -> tuple[str, ...]:
    """Refuse a store whose data lies, or may lie, outside of the regions that a policy allows.

    Args:
        store: where data is to be written.
        allowed: patterns with commas, such as ``eu-*,europe-west4``; empty allows all, and nothing is asked.
        said: the region, or regions with commas, that a person says it lies in.

    Returns:
        The regions that it lies in; none if there is no policy.

    Raises:
        ConfigError: it lies elsewhere, nobody knows where, or the person and the store disagree (``config.region``).
        StoreError: the store could not be asked.
    """
    patterns, given = _words(allowed), _words(said or "")
    if not patterns:
        return ()
    told = store.regions()
    if told and given and set(told) != set(given):
        raise ConfigError(
            f"{store.url} lies in {_say(told)}, as the store itself says, and not in {_say(given)}", code=_CODE
        )
    regions = told or given
    if not regions:
        raise ConfigError(
            f"{store.url} does not tell its region, and only {_say(patterns)} is allowed: say where its data lies "
            "(--to-region)",
            code=_CODE,
        )
    outside = [region for region in regions if not any(fnmatchcase(region, pattern) for pattern in patterns)]
    if outside:
        raise ConfigError(
            f"{store.url} lies in {_say(outside)}, and only {_say(patterns)} is allowed (allowed_regions): use a store "
            "there",
            code=_CODE,
        )
    return regions


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for part in text.split(",") if (word := part.strip().lower()))


def _say(words: tuple[str, ...] | list[str]) -> str:
    return ", ".join(words)
