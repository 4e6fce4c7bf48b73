"""One frozen Config: the only reader of ``GPUMOVE_*`` variables, and the place of all start-up checks."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gpumove.errors import ConfigError

_PREFIX = "GPUMOVE_"
_PLACE = ("GPUMOVE_URL", "GPUMOVE_RUN_DIR")
"""What ``gpumove run`` tells its workers: no settings."""
_FINDINGS = ("slow", "straggler", "nan", "hang")
"""docs/health.md says what they mean."""
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run. An argument beats the environment (``GPUMOVE_<FIELD>``), which beats the default.

    Cadence: a save is due every ``every_steps`` steps or ``every_s`` seconds, whichever comes first; ``None`` turns
    one off, and with both off only explicit ``save()`` calls write.

    Memory: two staged copies of the rank's state (one if there is no room or no ``delta``) plus ``budget_bytes``.
    """

    every_steps: int | None = None
    """Steps between saves."""
    every_s: float | str | None = 600.0
    """Seconds between saves. ``"auto"``: from what a save costs and how often the run was interrupted."""
    keep_last: int | None = 10
    """Newest checkpoints that retention keeps; ``None`` keeps all."""
    keep_every: int | None = None
    """Retention also keeps every checkpoint whose step is a multiple of this."""
    codec: str = "auto"
    """``"auto"``: code what changed unless the store is faster than that. ``"small"``: always. ``"raw"``: never."""
    delta: bool = True
    """Store what changed as a difference to the last save, by the optimizer's own rule where that is known."""
    max_chain: int = 16
    """Most saves in a row that a chunk is stored as a difference; then it is stored by itself again."""
    max_restore_amplification: float = 2.0
    """Most bytes that a restore may have to fetch because of differences, as a multiple of the raw state."""
    predecessor_bytes: int | None = None
    """Host memory for the last save's bytes, per rank; 0 for none, None for a quarter of what is free."""
    predecessor_dir: str | None = None
    """A folder on a fast local disk for them, where they do not fit in memory."""
    step_log: str = "off"
    """``"auto"``: with ``every_steps`` from 2 to 8, save at every step where that was measured to send less."""
    skip_unchanged: str = "host"
    """Whose unchanged tensors are looked for and not copied: ``"host"``, ``"all"`` (on devices too) or ``"off"``."""
    trace_dir: str | None = None
    """A local folder that gets one trace of every save and rank: what ran when, for chrome://tracing or Perfetto."""
    metrics_file: str | None = None
    """A local file that rank 0 keeps the numbers of the newest save in, for Prometheus' text file collector."""
    overlap: bool = True
    """Copy beside forward and backward, waited for before the next optimizer step. ``False`` copies at once."""
    budget_bytes: int = 256 * _MIB
    """Bytes in flight over the staged copy, per rank."""
    pack_bytes: int = 32 * _MIB
    """Size that packs aim at. 16 to 64 MiB suits every object store."""
    chunk_bytes: int = 4 * _MIB
    """Size that chunks aim at: the unit of digests, of change detection and of ranged reads."""
    concurrency: int = 8
    """Store calls in flight per rank."""
    workers: int = 2
    """Threads that hash, encode and decode, per rank."""
    deadline_s: float = 60.0
    """Bound on one store call, on top of which one second per MiB is allowed."""
    retry_s: float = 300.0
    """Bound on one store operation with all its retries."""
    peer_s: float = 600.0
    """Bound on waiting for another rank, in a rendezvous and for its part of a save."""
    notices: str = "signals"
    """What tells that the job has to leave: ``signals``, ``aws``, ``gcp``, ``azure``, ``file:PATH`` (docs/notices)."""
    grace_s: float = 30.0
    """Seconds that a notice without a deadline of its own leaves."""
    hang_s: float = 600.0
    """Seconds without a step after which a rank tells where it stands, with all its Python stacks."""
    wait: bool = False
    """Whether ``restore()`` waits for a run that is being moved here, or is not here yet."""
    leave_on: str = ""
    """Findings that make the job leave: any of ``slow``, ``straggler``, ``nan``, ``hang``, with commas."""
    watch_steps: int = 200
    """Steps after a move that are compared with those of before it; 0 for none."""
    on_parity: str = "warn"
    """If they are not as before: ``"warn"``, ``"leave"`` as on a notice, or ``"stop"``: an error, and nothing saved."""
    allowed_regions: str = ""
    """Regions that the run may be copied or moved to: patterns such as ``eu-*,europe-west4``; empty for all."""
    certify_steps: int = 20
    """Steps after each save that are recorded closely enough for ``gpumove certify``; 0 for none."""
    certify: int = 0
    """Claim and save nothing: train so many recorded steps again and compare them. What ``gpumove certify`` sets."""
    certify_tolerance: float | None = None
    """Largest difference of a loss, relative, that is no other job: by default 0.001, and 0.005 across devices."""
    on_save_error: str = "raise"
    """``"raise"``: a failed save is raised once in the training thread. ``"warn"``: it is logged and counted."""

    def __post_init__(self) -> None:
        """Check every field; all problems are listed in one :class:`ConfigError`."""
        problems = [p for check in (_check_cadence, _check_sizes, _check_words) for p in check(self)]
        if problems:
            raise ConfigError("the configuration is wrong: " + "; ".join(problems))

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, /, **arguments: Any) -> Config:
        """Build a Config from arguments and ``GPUMOVE_*`` variables.

        Args:
            env: variables to read, by default the process's own.
            **arguments: fields given in code; they win.

        Raises:
            ConfigError: unknown fields or variables, or values that cannot be read or are out of range; it lists all.
        """
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(set(arguments) - set(known)):
            raise ConfigError(f"unknown settings {unknown}; known ones are {sorted(known)}")
        values: dict[str, Any] = {}
        problems: list[str] = []
        for variable, text in (os.environ if env is None else env).items():
            if not variable.startswith(_PREFIX) or variable in _PLACE:
                continue
            name = variable.removeprefix(_PREFIX).lower()
            try:
                if name not in known:
                    raise ConfigError(f"the variable {variable} is no setting; known ones are {sorted(known)}")
                values[name] = _parse(variable, text, str(known[name].type))
            except ConfigError as error:
                problems.append(str(error))
        try:
            made = cls(**{**values, **arguments})
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("; ".join(problems))
        return made

    @classmethod
    def of_job(cls, config: Config | None, settings: Mapping[str, Any]) -> Config:
        """A Checkpointer's. That it is only to certify the environment says last, so that no script can save then."""
        made = cls.from_env(**settings) if config is None else config.replace(**settings)
        last = {name: f"{_PREFIX}{name.upper()}" for name in ("certify", "certify_tolerance")}
        kinds = {f.name: str(f.type) for f in fields(cls)}
        told = {n: _parse(v, os.environ[v], kinds[n]) for n, v in last.items() if v in os.environ}
        return made.replace(**told) if told else made

    @staticmethod
    def run_place() -> tuple[str | None, str | None]:
        """The URL and the folder that ``gpumove run`` has told this worker, if it was started by it."""
        url, folder = (os.environ.get(name) or None for name in _PLACE)
        return url, folder

    @staticmethod
    def ranks_here() -> int:
        """Ranks that share this machine, as torchrun, MPI or Slurm says; 1 if nobody does."""
        names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
        found = next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), "1")
        return max(1, int(found))

    @staticmethod
    def variables(names: Iterable[str]) -> dict[str, str]:
        """Those of these variables that are set: for what the fingerprint may show."""
        return {name: os.environ[name] for name in names if name in os.environ}

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def _parse(variable: str, text: str, kind: str) -> Any:
    """Read one variable as its field's type; sizes take K, M and G suffixes (powers of 1024)."""
    text = text.strip()
    if text.lower() in ("none", "") and "None" in kind:
        return None
    try:
        if kind.startswith("bool"):
            return {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}[text.lower()]
        if kind.startswith("int"):
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
            return int(text[:-1] if scale > 1 else text) * scale
        if kind.startswith("float"):
            return text if "str" in kind and text == "auto" else float(text)
    except (ValueError, KeyError):
        raise ConfigError(f"the variable {variable}={text!r} is not a value of type {kind}") from None
    return text


def _check_cadence(c: Config) -> list[str]:
    problems = [
        f"{name} must be None or an int above 0, not {value!r}"
        for name in ("every_steps", "keep_last", "keep_every")
        if (value := getattr(c, name)) is not None and (type(value) is not int or value <= 0)
    ]
    if c.every_s not in (None, "auto") and (isinstance(c.every_s, str) or not 0 < c.every_s < float("inf")):
        problems.append(f"every_s must be None, 'auto' or a finite number above 0, not {c.every_s!r}")
    problems += [
        f"{name} must be an int of at least 0, not {getattr(c, name)!r}"
        for name in ("certify", "certify_steps")
        if type(getattr(c, name)) is not int or getattr(c, name) < 0
    ]
    if (most := c.certify_tolerance) is not None and not 0 < most < float("inf"):
        problems.append(f"certify_tolerance must be None or a finite number above 0, not {most!r}")
    problems += [
        f"{name} must be a finite number above 0, not {getattr(c, name)!r}"
        for name in ("deadline_s", "retry_s", "peer_s", "grace_s", "hang_s")
        if not 0 < getattr(c, name) < float("inf")
    ]
    return problems


def _check_sizes(c: Config) -> list[str]:
    problems = []
    if c.predecessor_bytes is not None and c.predecessor_bytes < 0:
        problems.append(f"predecessor_bytes must be None or at least 0, not {c.predecessor_bytes}")
    if type(c.max_chain) is not int or c.max_chain < 0:
        problems.append(f"max_chain must be an int of at least 0, not {c.max_chain!r}")
    if type(c.watch_steps) is not int or c.watch_steps < 0:
        problems.append(f"watch_steps must be an int of at least 0, not {c.watch_steps!r}")
    if not 1.0 <= c.max_restore_amplification < float("inf"):
        problems.append(f"max_restore_amplification must be a number of at least 1, not {c.max_restore_amplification}")
    if c.chunk_bytes < 4096 or c.chunk_bytes % 16:
        problems.append(f"chunk_bytes must be a multiple of 16 and at least 4096, not {c.chunk_bytes}")
    if c.pack_bytes < c.chunk_bytes:
        problems.append(f"pack_bytes ({c.pack_bytes}) must be at least chunk_bytes ({c.chunk_bytes})")
    if c.budget_bytes < 2 * c.pack_bytes:
        problems.append(f"budget_bytes ({c.budget_bytes}) must hold two packs ({c.pack_bytes} each)")
    problems += [
        f"{name} must be between 1 and 256, not {getattr(c, name)}"
        for name in ("concurrency", "workers")
        if not 1 <= getattr(c, name) <= 256
    ]
    return problems


def _check_words(c: Config) -> list[str]:
    choices = {
        "codec": ("auto", "small", "raw"),
        "step_log": ("off", "auto"),
        "skip_unchanged": ("host", "all", "off"),
        "on_save_error": ("raise", "warn"),
        "on_parity": ("warn", "leave", "stop"),
    }
    problems = [
        f"{name} must be one of {', '.join(words)}, not {getattr(c, name)!r}"
        for name, words in choices.items()
        if getattr(c, name) not in words
    ]
    problems += [
        f"{name} must be True or False, not {getattr(c, name)!r}"
        for name in ("delta", "overlap", "wait")
        if type(getattr(c, name)) is not bool
    ]
    if wrong := [w for w in map(str.strip, c.allowed_regions.split(",")) if not re.fullmatch(r"[\w*?.\[\]-]*", w)]:
        problems.append(f"allowed_regions takes patterns such as eu-*, with commas, not {', '.join(wrong)}")
    if unknown := [word for word in map(str.strip, c.leave_on.split(",")) if word and word not in _FINDINGS]:
        problems.append(f"leave_on takes {', '.join(_FINDINGS)}, with commas, not {', '.join(unknown)}")
    return problems
