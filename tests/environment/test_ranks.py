"""On several ranks: one message, of the first rank, and it names the ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tests.dist.harness import run
from tests.dist.jobs import make, url_of


def trained(rank: int, url: str, layout: str) -> dict[str, Any]:
    """Two steps and a save, after a restore where there is something; what the log said of it."""
    said: list[logging.LogRecord] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("gpumove").addHandler(handler)
    logging.getLogger("gpumove").setLevel(logging.INFO)
    job = make(layout, rank)
    with job.checkpointer(url) as ckpt:
        step = ckpt.restore()
        job.train(ckpt, step, step + 2)
        ckpt.save(step + 2).wait()
    return {"said": [r.getMessage() for r in said if "not as it was" in r.getMessage()]}


def test_one_message_that_names_the_ranks(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    assert [found["said"] for found in run(trained, 2, url, "ddp2")] == [[], []]
    assert [found["said"] for found in run(trained, 2, url, "ddp2")] == [[], []], "the same again is no news"
    ((text,),) = [found["said"] for found in run(trained, 1, url, "plain")]
    assert "numerics: ranks: 2 -> 1" in text
