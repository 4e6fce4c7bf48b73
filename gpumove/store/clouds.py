"""TODO."""

from typing import Any

BACKENDS: dict[str, Any] = {}
