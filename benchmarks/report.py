"""What all benchmarks report alike: verdicts, and results as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """Whether something that can be met was met."""

    store: str
    peer: str
    what: str
    met: bool


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable, and the same for the same content."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
