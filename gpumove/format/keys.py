"""Names of objects: how keys are built and read back (docs/format.md, section 1). Pure text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from gpumove.format.manifest import PartRef

FORMAT_KEY = "format.json"
_PART = re.compile(
    r"parts/(?P<attempt>\d{8}-\d{8})/(?P<rank>\d{6})-(?P<digest>[0-9a-f]{32})-(?P<plan>[0-9a-f]{16})-(?P<new>\d+)\.json"
)
_FAILED = re.compile(r"parts/(?P<attempt>\d{8}-\d{8})/(?P<rank>\d{6})-failed\.json")
_PACK = re.compile(r"packs/(?P<attempt>\d{8}-\d{8})/(?P<digest>[0-9a-f]{32})\.safetensors")
_MANIFEST = re.compile(r"manifests/(?P<attempt>\d{8}-\d{8})-[0-9a-f]{32}\.json")
_ENTRY = re.compile(r"log/(\d{20})\.json")


class Receipt(NamedTuple):
    """What the name of a part says: enough to commit without reading it."""

    key: str
    rank: int
    digest: str
    plan: str
    new_bytes: int

    def ref(self, nbytes: int) -> PartRef:
        """The part as a manifest lists it."""
        return PartRef(key=self.key, rank=self.rank, digest=self.digest, nbytes=nbytes, new_bytes=self.new_bytes)


def attempt_name(epoch: int, serial: int) -> str:
    """The name of an attempt; names of later attempts sort after those of earlier ones."""
    return f"{epoch:08d}-{serial:08d}"


def epoch_of(attempt: str) -> int:
    """The epoch in an attempt's name."""
    return int(attempt[:8])


def last_serial(epoch: int, attempts: Iterable[str]) -> int:
    """The highest serial number among the attempts of one epoch; 0 if there is none."""
    before = f"{epoch:08d}-"
    return max((int(attempt[9:]) for attempt in attempts if attempt.startswith(before)), default=0)


def attempt_of(key: str) -> str | None:
    """The attempt that an object belongs to; None if it is none that gpumove writes, whatever folder it lies in."""
    found = (pattern.fullmatch(key) for pattern in (_PACK, _PART, _FAILED, _MANIFEST))
    return next((match["attempt"] for match in found if match), None)


def pack_digest(key: str) -> str | None:
    """The digest that a pack's key has in its name; None if it is no such key."""
    found = _PACK.fullmatch(key)
    return found["digest"] if found else None


def entry_key(number: int) -> str:
    """The key of a log entry."""
    return f"log/{number:020d}.json"


def entry_number(key: str) -> int | None:
    """The number of a log entry's key, or None if it is no such key."""
    match = _ENTRY.fullmatch(key)
    return int(match[1]) if match else None


def manifest_key(attempt: str, digest: str) -> str:
    """The key of a manifest."""
    return f"manifests/{attempt}-{digest}.json"


def part_key(attempt: str, *, rank: int, digest: str, plan: str, new_bytes: int) -> str:
    """The key of a part, which is also its receipt."""
    return f"parts/{attempt}/{rank:06d}-{digest}-{plan[:16]}-{new_bytes}.json"


def failed_key(attempt: str, rank: int) -> str:
    """The key under which a rank says why it could not finish its part."""
    return f"parts/{attempt}/{rank:06d}-failed.json"


def read_receipt(key: str) -> Receipt | None:
    """Read a part's name back; None if the key is not one."""
    match = _PART.fullmatch(key)
    if not match:
        return None
    return Receipt(key, int(match["rank"]), match["digest"], match["plan"], int(match["new"]))


def failed_rank(key: str) -> int | None:
    """The rank of a failure record's key, or None if it is no such key."""
    match = _FAILED.fullmatch(key)
    return int(match["rank"]) if match else None
