"""Two fingerprints' devices: are they alike, do the kernels run there, does the job fit? Pure; unknown is an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpumove.environment.difference import Difference, Facts, at, whole
from gpumove.environment.grades import Grade
from gpumove.words import size

Kinds = Sequence[Mapping[str, Any]]
_LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""NVIDIA's minor version compatibility: the least driver of each major version of CUDA."""


def kinds(facts: Facts) -> list[dict[str, Any]] | None:
    """Kinds of GPUs; none for a job that uses none; None if that is not known.

    Until 0.1 a fingerprint named each device, wherever there were any.
    """
    found = facts.get("devices")
    if not isinstance(found, list):
        return [] if "threads" in facts and "torch" not in facts else None
    names = [d for d in found if isinstance(d, str)]
    rows = [dict(d) for d in found if isinstance(d, Mapping)]
    return rows + [{"model": name, "count": names.count(name)} for name in dict.fromkeys(names)]


def same_devices(before: Facts, after: Facts) -> bool | None:
    """Whether both sides compute on hardware of which equal bits may be expected; None if that is not known."""
    one, other = kinds(before), kinds(after)
    if one is None or other is None:
        return None
    if not one and not other:
        keys = ("machine", "processor.model", "processor.capability")
        pairs = [(at(before, key), at(after, key)) for key in keys]
        return None if any(None in pair for pair in pairs) else all(a == b for a, b in pairs)
    if not one or not other:
        return False
    insides = _insides(one), _insides(other)
    return insides[0] == insides[1] if all(insides) else _models(one) == _models(other)


def _models(found: Kinds) -> set[str]:
    return {str(d.get("model")) for d in found}


def _insides(found: Kinds) -> set[tuple[str, int]] | None:
    """What cuBLAS and cuDNN make their promises for."""
    rows = {(str(d.get("capability") or ""), whole(d, "multiprocessors")) for d in found}
    return rows if all(all(row) for row in rows) else None


def compare_devices(before: Facts, after: Facts) -> Iterator[Difference]:
    """All that can be said of GPUs, and of memory."""
    one, other = kinds(before), kinds(after)
    if other:
        yield from _own(after, other)
    if one is None or other is None:
        if one or other:
            a, b = ("not recorded" if k is None else say_kinds(k) for k in (one, other))
            yield Difference("GPUs", a, b, "unknown", "one side does not say what it computes on", "")
    elif one and not other:
        yield _lost(after, one)
    elif other and not one:
        why = "the job has trained on the processor; on a GPU other kernels compute"
        yield Difference("GPUs", "none", say_kinds(other), "numerics", why, "compare within the tolerance")
    elif one and other:
        yield from _compare(one, other)
        yield from _fit(before, after, one, other)
    yield from _host(before, after)


def say_kinds(found: Kinds) -> str:
    """Such as ``8 x NVIDIA H100 80GB HBM3 (79.1 GiB)``."""
    rows = (
        f"{whole(d, 'count') or 1} x {d.get('model')}"
        + (f" ({size(memory)})" if (memory := whole(d, "memory_bytes")) else "")
        for d in found
    )
    return ", ".join(rows) or "none"


def _lost(after: Facts, one: Kinds) -> Difference:
    if "world_size" in after:  # it trains there, so it does run
        why = "torch promises no equal results of processors and GPUs; and steps take many times as long"
        return Difference(
            "GPUs", say_kinds(one), "none", "numerics", why, "if a GPU is meant to be used, look at its driver"
        )
    why, do = "the job has trained on GPUs, and torch finds none here", "use a machine that has one"
    driver, cuda = (re.match(r"(\d+)\.", str(after.get(name))) for name in ("driver", "cuda"))
    if not cuda and "cuda" in after and after.get("hip") is None:
        do = "torch is built for processors only here: install a build for CUDA"
    elif driver and cuda and int(driver[1]) < (least := _LEAST_DRIVER.get(int(cuda[1]), 0)):
        do = f"CUDA {after['cuda']} takes driver {least} or newer, {after['driver']} is here: update it"
    elif driver:
        do = f"the driver {after['driver']} is loaded: see whether this process may use its devices"
    return Difference("GPUs", say_kinds(one), "none", "fatal", why, do)


def _compare(one: Kinds, other: Kinds) -> Iterator[Difference]:
    a, b = say_kinds(one), say_kinds(other)
    insides = _insides(one), _insides(other)
    if insides[0] != insides[1] if all(insides) else _models(one) != _models(other):
        why = "cuBLAS promises equal bits for one architecture and number of multiprocessors only, and cuDNN for one"
        do = "compare within the tolerance across devices; look at the step time"
        yield Difference("GPUs", a, b, "numerics", f"{why} architecture; and steps take longer or shorter", do)
    elif _models(one) != _models(other):
        why = "the architecture and the number of multiprocessors are the same; clocks and bandwidth may differ"
        yield Difference("GPUs", a, b, "speed", why, "look at the step time")
    elif _count(one) != _count(other):
        yield Difference("GPUs in sight", a, b, "exact", "what counts is how many ranks train, and where", "")


def _count(found: Kinds) -> int:
    return sum(whole(d, "count") or 1 for d in found)


def _own(after: Facts, other: Kinds) -> Iterator[Difference]:
    """Whether torch there has kernels for the devices there."""
    found = after.get("architectures")
    built = [arch for arch in found if isinstance(arch, str)] if isinstance(found, list) else []
    for kind in other:
        own = re.fullmatch(r"(\d+)\.(\d+)", str(kind.get("capability")))
        if own and built and not any(_runs(arch, (int(own[1]), int(own[2]))) for arch in built):
            why = f"torch has kernels for {' '.join(built)}, and none of them runs on capability {own[0]}"
            yield Difference("kernels", "", str(kind.get("model")), "fatal", why, "install a build of torch with them")


def _runs(arch: str, own: tuple[int, int]) -> bool:
    """Binaries run within a major version from their minor one on, those with a letter on their own only; PTX, from its
    own on, everywhere."""
    if not (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)):
        return True  # not of NVIDIA, or not known here
    made_for = (int(found[2]), int(found[3]))
    if found[4]:
        return made_for == own
    return made_for <= own and (found[1] == "compute" or made_for[0] == own[0])


# -------------------------------------------------------------------- memory


def _fit(before: Facts, after: Facts, one: Kinds, other: Kinds) -> Iterator[Difference]:
    had, has = _least(one), _least(other)
    state, ranks = whole(before, "state_bytes"), whole(before, "world_size")
    there = whole(after, "world_size") or ranks
    more_each = max(0, state // there - state // ranks) if there and ranks else 0
    if not had and _models(one) == _models(other):
        had = has  # version 0.1 recorded names only
    if not has or (has >= had > 0 and not more_each):
        return
    peak, held = (whole(before, f"peak.{name}") for name in ("device_bytes", "reserved_bytes"))
    advice = "a GPU with more memory, more ranks, or smaller batches with gradient accumulation"

    def say_fit(grade: Grade, why: str) -> Difference:
        return Difference("memory of a GPU", size(had) if had else "", size(has), grade, why, advice)

    if not peak:
        if (share := state // (there or 1)) > has:
            yield say_fit("fatal", f"a rank's share of the state alone takes {size(share)}")
        else:
            yield say_fit("unknown", "how much the job takes at most was not measured")
    elif peak > has:
        yield say_fit("fatal", f"the tensors of a rank took up to {size(peak)}")
    elif max(peak, held or 0) > has:
        yield say_fit("unknown", f"it may not fit: tensors took up to {size(peak)}, and {size(held)} was held for them")
    elif peak + more_each > has:
        yield say_fit("unknown", f"it may not fit: a rank took up to {size(peak)}, and if the state is sharded each "
                      f"holds {size(more_each)} more now")  # fmt: skip


def _least(found: Kinds) -> int:
    return min((whole(d, "memory_bytes") for d in found), default=0)


def _host(before: Facts, after: Facts) -> Iterator[Difference]:
    had, has = (whole(facts, "processor.memory_bytes") for facts in (before, after))
    peak, ranks = whole(before, "peak.host_bytes"), whole(after, "ranks_here") or whole(before, "ranks_here") or 1
    if has and peak * ranks > has:
        why = f"it may not fit: a rank took up to {size(peak)}, files that it had mapped included; ranks here: {ranks}"
        do = "more memory, or fewer ranks per machine"
        yield Difference("memory of the host", size(had) if had else "", size(has), "unknown", why, do)
