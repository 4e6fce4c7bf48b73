"""The sources that a setting names."""

from __future__ import annotations

import math
from collections.abc import Callable
from urllib.parse import urlsplit

from gpumove.errors import ConfigError
from gpumove.notices.aws import Aws, AwsRebalance
from gpumove.notices.azure import Azure
from gpumove.notices.gcp import Gcp, GcpMaintenance
from gpumove.notices.notice import Source, one_line
from gpumove.notices.signals import Signals
from gpumove.notices.watched import File, Url, public

_WORDS = "signals, aws, aws-rebalance, gcp, gcp:SECONDS, gcp-maintenance, azure, file:PATH, url:URL"

_SIMPLE: dict[str, Callable[[], Source]] = {
    "signals": Signals,
    "aws": Aws,
    "aws-rebalance": AwsRebalance,
    "gcp": Gcp,
    "gcp-maintenance": GcpMaintenance,
    "azure": Azure,
}


def parse(text: str, *, first_here: bool = True) -> list[Source]:
    """The sources that a comma-separated setting names, each once, in their order.

    Args:
        text: the setting.
        first_here: whether this is the first rank of its machine. The others watch for signals only: what one rank
            learns all get to know, and metadata services limit how often a machine may ask.

    Raises:
        ConfigError: a word that is no source, or one that lacks something.
    """
    words = dict.fromkeys(word.strip() for word in text.split(",") if word.strip())
    sources = [_source(word) for word in words]
    return [source for source in sources if first_here or isinstance(source, Signals)]


def _source(word: str) -> Source:
    if word in _SIMPLE:
        return _SIMPLE[word]()
    kind, _, rest = word.partition(":")
    if kind == "gcp":
        return Gcp(notice_s=_seconds(word, rest))
    if kind == "file" and rest:
        return File(rest)
    if kind == "url" and rest:
        return _url(rest)
    shown = word if kind != "url" else "url:"
    raise ConfigError(f"notices: {one_line(shown, 80)!r} is no source of notices; known are {_WORDS}")


def _seconds(word: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"notices: {word!r} needs seconds above 0, as in gcp:120")
    return seconds


def _url(url: str) -> Url:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an address that is none
        raise ConfigError("notices: url: needs an http or https URL, and this one cannot be read") from None
    if not valid or any(c.isspace() or not c.isprintable() for c in url):
        raise ConfigError("notices: url: needs an http or https URL, as in url:https://host/leave")
    if "@" in parts.netloc:
        raise ConfigError(f"notices: {public(url)} was given with credentials: they are not sent; leave them out")
    return Url(url)
