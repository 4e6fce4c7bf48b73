"""s3torchconnector, which has a native S3 client: one object by torch.save, or behind DCP."""

from __future__ import annotations

import os
from typing import Any

from s3torchconnector import S3Checkpoint, S3ClientConfig
from s3torchconnector._s3client import S3Client
from s3torchconnector.dcp import S3StorageReader, S3StorageWriter
from s3torchconnector.dcp.s3_file_system import S3FileSystem

from benchmarks.compare.peers.dcp import Dcp
from benchmarks.compare.peers.torch_save import TorchSave
from benchmarks.places import Place

_REGION = "us-east-1"
_CONFIG = S3ClientConfig(force_path_style=True)


def _sign_in(place: Place) -> str:
    """Credentials come from the environment; the endpoint is returned."""
    os.environ["AWS_ACCESS_KEY_ID"] = place.options["key"]
    os.environ["AWS_SECRET_ACCESS_KEY"] = place.options["secret"]
    return str(place.options["endpoint_url"])


class S3File(TorchSave):
    """torch.save into its S3Checkpoint's writer."""

    def opened(self, name: str, mode: str) -> Any:
        checkpoint = S3Checkpoint(_REGION, endpoint=_sign_in(self.place), s3client_config=_CONFIG)
        return (checkpoint.writer if mode == "wb" else checkpoint.reader)(self.place.child(name))


class S3Dcp(Dcp):
    """dcp.save with its storage writer, which has no argument for the endpoint."""

    def target(self, name: str) -> dict[str, Any]:
        writer = S3StorageWriter(_REGION, self.place.child(name), s3client_config=_CONFIG, thread_count=self._threads)
        writer.fs = self._file_system(writer.fs)
        return {"storage_writer": writer}

    def source(self, name: str) -> dict[str, Any]:
        reader = S3StorageReader(_REGION, self.place.child(name), s3client_config=_CONFIG)
        reader.fs = self._file_system(reader.fs)
        return {"storage_reader": reader}

    def _file_system(self, given: S3FileSystem) -> S3FileSystem:
        client = S3Client(_REGION, endpoint=_sign_in(self.place), s3client_config=_CONFIG)
        return S3FileSystem(_REGION, s3_client=client, reader_constructor=given._reader_constructor)
