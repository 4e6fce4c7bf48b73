"""What a checkpoint needs, as the source's records say. Knows no target."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from gpumove.format.manifest import Checkpoint, Manifest, Part, decode
from gpumove.move.copier import Object
from gpumove.store.objects import Store
from gpumove.store.records import read_verified


class Needs:
    """Reads the parts and the manifest of a checkpoint, and keeps them until the next one."""

    def __init__(self, source: Store) -> None:
        self._source = source
        self.records: dict[str, bytes] = {}
        """Of the checkpoint that was looked at last, by key."""
        self.new_packs = 0
        """How many packs that one has brought."""

    @property
    def nbytes(self) -> int:
        """Bytes of those records."""
        return sum(map(len, self.records.values()))

    def of(self, checkpoint: Checkpoint) -> list[Object]:
        """Everything that a checkpoint needs, in the order of writing: packs, parts, manifest.

        Raises:
            IntegrityError: a record is damaged.
            ObjectNotFoundError: a record is missing.
        """
        before = self.records

        def read(key: str, name: str) -> bytes:
            return before[key] if key in before else read_verified(self._source, key, name)

        data = read(checkpoint.manifest_key, checkpoint.manifest)
        manifest = decode(Manifest, data, key=checkpoint.manifest_key)
        with ThreadPoolExecutor(16, thread_name_prefix="gpumove-parts") as pool:
            parts = list(pool.map(lambda ref: read(ref.key, ref.digest), manifest.parts))
        packs: dict[str, Object] = {}
        for ref, text in zip(manifest.parts, parts):
            for pack in decode(Part, text, key=ref.key).packs:
                packs[pack.key] = Object(pack.key, pack.nbytes, pack.digest)
        self.records = dict(zip((ref.key for ref in manifest.parts), parts)) | {checkpoint.manifest_key: data}
        self.new_packs = sum(key.startswith(f"packs/{checkpoint.attempt}/") for key in packs)
        return [
            *sorted(packs.values()),
            *(Object(ref.key, ref.nbytes, ref.digest) for ref in manifest.parts),
            Object(checkpoint.manifest_key, checkpoint.manifest_bytes, checkpoint.manifest),
        ]
