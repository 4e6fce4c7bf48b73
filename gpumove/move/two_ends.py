"""Both stores of a copy, opened with the same bounds: what replicating and moving have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple

from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.store.objects import Store


class TwoEnds(NamedTuple):
    """Where from, where to, and the bounds that both were opened with."""

    source: Store
    target: Store
    config: Config


@contextmanager
def two_ends(
    src: str,
    dst: str,
    *,
    in_flight: int,
    config: Config | None = None,
    from_options: Mapping[str, Any] | None = None,
    to_options: Mapping[str, Any] | None = None,
) -> Iterator[TwoEnds]:
    """Open both; nothing is read or written yet.

    Args:
        src: the URL of the one.
        dst: the URL of the other.
        in_flight: objects under way at once.
        config: bounds; by default from the environment.
        from_options: of ``src``, for fsspec.
        to_options: of ``dst``.

    Raises:
        ConfigError: the number is out of range, or one of the two lies in the other.
    """
    if not 1 <= in_flight <= 256:
        raise ConfigError(f"in_flight must be between 1 and 256, not {in_flight}")
    config = Config.from_env() if config is None else config
    config = config.replace(concurrency=max(config.concurrency, in_flight))
    with ExitStack() as opened:
        source = opened.enter_context(closing(Store.open(src, config, options=from_options)))
        target = opened.enter_context(closing(Store.open(dst, config, options=to_options)))
        if f"{target.url}/".startswith(f"{source.url}/") or f"{source.url}/".startswith(f"{target.url}/"):
            raise ConfigError(f"{source.url} and {target.url} are one place, or one lies in the other")
        yield TwoEnds(source, target, config)
