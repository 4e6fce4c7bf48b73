"""Creates from several processes: the commit log stands on exactly one of them winning."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest

from gpumove.config import Config
from gpumove.store.objects import Store
from tests.conftest import StoreAt

PROCESSES, ROUNDS = 4, 6
_barriers: list[Barrier] = []


@pytest.fixture(scope="module")
def racers() -> Iterator[ProcessPoolExecutor]:
    """Processes that wait for each other; each of PROCESSES tasks goes to another one."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, context, initializer=_remember, initargs=(barrier,)) as pool:
        yield pool


def _remember(barrier: Barrier) -> None:
    _barriers.append(barrier)


def _race(url: str, options: Mapping[str, Any], racer: int) -> list[bool]:
    store = Store.open(url, Config(), options=options)
    won = []
    for round_ in range(ROUNDS):
        _barriers[0].wait(timeout=60)
        won.append(store.create(f"log/{round_}", b"racer %d" % racer))
    store.close()
    return won


@pytest.mark.parametrize("store_url", ["file", "s3", "gs", "abfs"], indirect=True)
def test_create_race_of_processes_has_one_winner(store_url: StoreAt, racers: ProcessPoolExecutor) -> None:
    url, options = store_url
    won = list(racers.map(_race, [url] * PROCESSES, [dict(options)] * PROCESSES, range(PROCESSES)))
    store = Store.open(url, Config(), options=options)
    for round_ in range(ROUNDS):
        winners = [racer for racer in range(PROCESSES) if won[racer][round_]]
        assert [b"racer %d" % racer for racer in winners] == [store.get(f"log/{round_}")]
    store.close()
