"""From an address to its back end: which package serves it, and what to install if it is missing. Makes no calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.store.address import Address
from gpumove.store.backends import Backend, GenericBackend, MemoryBackend
from gpumove.store.files import FileBackend

_EXTRAS = {"s3": "s3", "gcs": "gcs", "azure": "azure"}


def connect(address: Address, config: Config, options: Mapping[str, Any]) -> Backend:
    """The back end of an address, on a file system instance of our own.

    Raises:
        ConfigError: no such scheme, or its package is not installed; the message names the extra to install.
    """
    scheme = address.url.partition("://")[0]
    try:
        return _back_end(address, config, options)
    except ImportError as error:
        extra = _EXTRAS.get(address.family)
        advice = f"pip install 'gpumove[{extra}]'" if extra else "install the package that fsspec needs for it"
        missing = f" ({error.name})" if error.name else ""
        raise ConfigError(f"{scheme}:// needs a package that is not installed{missing}: {advice}") from None


def _back_end(address: Address, config: Config, options: Mapping[str, Any]) -> Backend:
    # The clouds' packages take up to a second to import, so only the one that is needed is.
    if address.family == "memory":
        return MemoryBackend(address)
    if address.family == "file":
        return FileBackend(address)
    if address.family == "s3":
        from gpumove.store.s3 import S3Backend

        return S3Backend(address, config, options)
    if address.family == "gcs":
        from gpumove.store.gcs import GcsBackend

        return GcsBackend(address, config, options)
    if address.family == "azure":
        from gpumove.store.azure import AzureBackend

        return AzureBackend(address, config, options)
    return GenericBackend(address, options)
