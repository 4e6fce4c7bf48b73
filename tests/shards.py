"""Made-up shards of a dataset, and what lies in a folder that they are staged into. Knows no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpumove.config import Config
from gpumove.format.codec import digest
from gpumove.store.objects import Store


def shard_data(name: str, nbytes: int = 100_000) -> bytes:
    """Bytes that say whose they are."""
    return (digest(name.encode()).encode() * (nbytes // 32 + 1))[:nbytes]


def fill(url: str, names: Sequence[str], *, nbytes: int = 100_000, options: Mapping[str, Any] | None = None) -> str:
    """Put shards below a URL, which is returned."""
    store = Store.open(url, Config(), options=options)
    for name in names:
        store.put(name, shard_data(name, nbytes))
    store.close()
    return url


def there(folder: Path) -> list[str]:
    """The shards that lie in a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".gpumove-" not in str(p))


def staged_bytes(folder: Path) -> int:
    """What they weigh."""
    total = 0
    for name in there(folder):
        with contextlib.suppress(FileNotFoundError):  # evicted while we look
            total += (folder / name).stat().st_size
    return total
