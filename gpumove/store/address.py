"""Addresses: which family of store a URL names, and what of it may be shown. Knows no back end and opens nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from gpumove.errors import ConfigError

FAMILIES: dict[str, str] = {
    "file": "file",
    "local": "file",
    "memory": "memory",
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_AZURE_HOST = re.compile(r"(?P<container>[^@/]+)@(?P<host>[^@/]+)(?P<rest>/.*)?$")


class Address(NamedTuple):
    """A store's URL, taken apart."""

    family: str  # "file", "memory", "s3", "gcs", "azure" or "generic"
    url: str  # normalised, nothing secret in it: safe to log
    raw: str  # as given, for fsspec alone; may hold a password
    root: str  # an absolute directory, or "<bucket>/<prefix>" without slashes at its ends


def parse(url: str) -> Address:
    """Take a URL or a plain path apart.

    Raises:
        ConfigError: it names no place, or carries what does not belong in a URL. The message shows no secret.
    """
    if not isinstance(url, str) or not url.strip():
        raise ConfigError(f"the URL of a store must be a non-empty string, not {type(url).__name__} of no content")
    if "::" in url.split("?")[0]:
        raise ConfigError("chained URLs (with '::') are not supported: a cache in front of a store would hide writes")
    match = _URL.match(url)
    scheme, rest = (match[1].lower(), match[2]) if match else ("file", url)
    family = FAMILIES.get(scheme, "generic")
    if family == "file":
        root = os.path.abspath(os.path.expanduser(rest))
        return Address(family, f"file://{root}", url, root)
    if family == "generic":
        if re.match(r"[^/?#@\[]*:(?!\d*(?:[/?#]|$))(?![^/?#@]*@)", rest):
            # No port follows, and no "@" before the path: a character of a password has ended it too early.
            raise ConfigError(
                f"a {scheme}:// URL has a password where none can be: write /, ?, # and @ in a password as %2F, %3F, "
                "%23 and %40, or pass it as a storage option"
            )
        shown = re.sub(r"^[^/]*@", "", re.split(r"[?#]", rest)[0]).rstrip("/")
        return Address(family, f"{scheme}://{shown}", url, shown)
    return _bucket_address(family, scheme, rest, url)


def _bucket_address(family: str, scheme: str, rest: str, raw: str) -> Address:
    if re.search(r"[?#]", rest):
        raise ConfigError(f"a {scheme}:// URL takes no query and no fragment; pass tokens and keys as storage options")
    shown = re.sub(r"/+", "/", rest).strip("/")
    root = shown
    match = _AZURE_HOST.match(shown) if family == "azure" else None
    if match and ":" not in match["container"]:
        root = f"{match['container']}{match['rest'] or ''}"
    elif "@" in shown.split("/")[0] or (family != "memory" and re.match(r"(?!arn:)[^/]*:", shown)):
        raise ConfigError(f"a {scheme}:// URL must not hold credentials; pass them as storage options")
    if not root and family != "memory":
        raise ConfigError(f"{scheme}:// names no bucket; write {scheme}://bucket/path")
    return Address(family, f"{scheme}://{shown}", raw, root)


# Shapes that secrets have in the texts of the cloud packages, whoever brought them in (a file, a variable, a role).
_SHAPES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?<=://)[^/@\s]+:[^/@\s]*(?=@)",
        r"(?<=AccountKey=)[^;\s'\"]+",
        r"(?<=SharedAccessSignature=)[^;\s'\"]+",
        r"(?<=[?&\s]sig=)[^&\s'\"]+",
        r"(?<=Signature=)[^&,\s'\"]+",
        r"(?<=Credential=)[^&,\s'\"]+",
        r"(?<=Security-Token=)[^&\s'\"]+",
        r"(?<=access_token=)[^&\s'\"]+",
        r"(?<=Bearer )[A-Za-z0-9._~+/=-]+",
        r"(?<=SharedKey )[^\s'\"]+",
        r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}",
        r"\bya29\.[A-Za-z0-9._-]+",
        r"-----BEGIN[A-Z ]*PRIVATE KEY-----.*?(?:-----END[A-Z ]*PRIVATE KEY-----|$)",
    )
)
_OPEN_OPTIONS = frozenset(("anon", "project", "account_name", "endpoint_url", "region_name", "profile", "account_host"))


class Scrubber:
    """Takes credentials out of texts that come from a back end, before anybody sees them."""

    def __init__(self, raw_url: str, options: Mapping[str, Any]) -> None:
        found = set(_strings({k: v for k, v in options.items() if k not in _OPEN_OPTIONS}))
        parts = {part.partition("=")[2] for text in found for part in text.split(";")}
        secrets = {s for s in found | parts if len(s) >= 6 and not s.startswith(("http://", "https://"))}
        authority = raw_url.partition("://")[2].partition("/")[0]
        if ":" in authority.rpartition("@")[0]:
            password = authority.rpartition("@")[0].partition(":")[2]
            secrets |= {password, unquote(password)}
        self._secrets = sorted(secrets - {""}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text without secrets, on one line and of bounded length."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        for shape in _SHAPES:
            text = shape.sub("***", text)
        text = " ".join(text.split()).partition(" Content: <")[0]  # Azure's texts say it all twice, then in XML
        return text if len(text) <= 300 else text[:300] + "..."


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _OPEN_OPTIONS:
                yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
