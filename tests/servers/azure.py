"""Azure Blob on loopback: azurite, the official emulator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.servers.process import Bucket, run_server, tool

ACCOUNT = "devstoreaccount1"
# The key that the emulator's documentation publishes for everyone; it opens nothing else.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextlib.contextmanager
def azurite(directory: Path, *, persist: bool = False) -> Iterator[Bucket]:
    """A container on azurite, in memory, or with ``persist`` in files (flushed lazily: a SIGKILL loses writes)."""
    program = tool("azurite/node_modules/.bin/azurite-blob")
    flags = ["--skipApiVersionCheck", "--silent", "--disableTelemetry", "--blobHost", "127.0.0.1"]
    flags += ["-l", str(directory / "data")] if persist else ["--inMemoryPersistence"]
    with run_server(
        "azurite", lambda port: [program, *flags, "--blobPort", str(port)], log=directory / "azurite.log"
    ) as server:
        container = describe(server.endpoint, "gpumove-test")
        create(container)
        yield container


def describe(endpoint: str, name: str) -> Bucket:
    """The container of that name at that address."""
    connection = ";".join(
        [
            "DefaultEndpointsProtocol=http",
            f"AccountName={ACCOUNT}",
            f"AccountKey={KEY}",
            f"BlobEndpoint={endpoint}/{ACCOUNT}",
        ]
    )
    env = {"AZURE_STORAGE_CONNECTION_STRING": connection}
    return Bucket(f"abfs://{name}", {"connection_string": connection}, env, endpoint, describe, create)


def create(container: Bucket) -> None:
    from azure.storage.blob import BlobServiceClient  # slow to import, and only the process that creates needs it

    with BlobServiceClient.from_connection_string(container.options["connection_string"]) as client:
        client.create_container(container.name)
