"""The receipt of an export: of which checkpoint it is, and its files' digests. Written last, read by publish."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import msgspec
from msgspec import Struct

from gpumove.config import Config
from gpumove.errors import ConfigError, IntegrityError, ObjectNotFoundError
from gpumove.format.manifest import Checkpoint
from gpumove.format.pointer import Exported, ExportedFile
from gpumove.store.objects import Store

RECEIPT = "gpumove-export.json"


class Receipt(Struct, frozen=True):
    """``gpumove-export.json``."""

    gpumove: str
    """The version that wrote it."""
    run: str
    step: int
    attempt: str
    manifest: str
    what: str
    dtype: str | None
    files: dict[str, ExportedFile]


_DECODER = msgspec.json.Decoder(Receipt)


def read_receipt(
    place: str | os.PathLike[str], checkpoint: Checkpoint, run: str, config: Config, options: Mapping[str, Any] | None
) -> Exported:
    """What an exported folder says of itself, and whether its files are there, with their sizes.

    Args:
        place: a folder or a URL.
        checkpoint: what it has to be of.
        run: and of which run.
        config: bounds.
        options: for fsspec.

    Raises:
        ConfigError: it is no export, or one of another checkpoint.
        IntegrityError: files are missing, or have other sizes.
    """
    with closing(Store.open(os.fspath(place), config, options=options)) as store:
        try:
            found = _DECODER.decode(store.get(RECEIPT))
        except ObjectNotFoundError:
            raise ConfigError(f"{store.url} has no {RECEIPT}: make it with gpumove export") from None
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{store.url}/{RECEIPT} cannot be read: {error}") from error
        if (found.run, found.attempt, found.manifest) != (run, checkpoint.attempt, checkpoint.manifest):
            raise ConfigError(
                f"{store.url} was exported from another checkpoint (step {found.step}, attempt {found.attempt}) than "
                f"the one that is to be published (step {checkpoint.step}, attempt {checkpoint.attempt})"
            )
        there = {info.key: info.nbytes for info in store.list("")}
        if wrong := sorted(name for name, file in found.files.items() if there.get(name) != file.nbytes):
            raise IntegrityError(f"{store.url} is not whole: {', '.join(wrong[:5])} missing or of another size")
        return Exported(store.url, found.files)
