"""Real object stores on loopback, and a proxy that breaks and slows the way to them.

Each server is a context manager that takes a directory for its files and log and yields a :class:`Bucket`.
"""

from tests.servers.azure import azurite
from tests.servers.google import gcs
from tests.servers.process import Bucket, ServerError
from tests.servers.s3 import ministack, rclone

__all__ = ["Bucket", "ServerError", "azurite", "gcs", "ministack", "rclone"]
