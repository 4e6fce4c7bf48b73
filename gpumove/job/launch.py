"""Starts torchrun as a child that cannot outlive this process, and keeps the end of what it says on standard error."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.from_env import RunFolder

_OURS = ("GPUMOVE_URL", "GPUMOVE_RUN_DIR", "GPUMOVE_NOTICES", "GPUMOVE_GRACE_S", "GPUMOVE_WAIT")
_TAIL_BYTES = 16_000
_STDERR = 2


def settings() -> dict[str, str]:
    """The environment's settings, less those that an outer ``gpumove run`` has made."""
    return {name: value for name, value in os.environ.items() if name not in _OURS[:2]}


def environment(url: str, folder: RunFolder, config: Config) -> dict[str, str]:
    """What the workers are told. Signals stay on: if this process is killed, torchrun passes a SIGTERM on to them."""
    if "," in str(folder.request_file):
        raise ConfigError(f"{folder.path} must not hold a comma: set TMPDIR to another folder")
    notices = f"signals,file:{folder.request_file}"
    told = dict(zip(_OURS, (url, str(folder.path), notices, str(config.grace_s), str(int(config.wait)))))
    if config.certify:
        told["GPUMOVE_CERTIFY"] = str(config.certify)
        told["GPUMOVE_CERTIFY_TOLERANCE"] = str(config.certify_tolerance)
    # From torch 2.12 on: where a scheduler signals torchrun too, the workers get the grace and not 30 seconds.
    return {"PET_SHUTDOWN_TIMEOUT": str(max(1, int(config.grace_s))), **os.environ, **told}


class Torchrun:
    """The running child."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", *arguments]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpumove.job.leash", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,  # what a terminal or a scheduler sends to our group is ours alone
        )
        assert self._process.stderr is not None
        self._tail = b""
        self._reader = threading.Thread(
            target=self._copy, args=(self._process.stderr,), name="gpumove-run-stderr", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, negative for a signal, or None while it runs."""
        return self._process.poll()

    def tail(self) -> str:
        """The end of what it and its workers wrote to standard error."""
        self._reader.join(1.0)
        return self._tail.decode(errors="replace")

    def _copy(self, pipe: IO[bytes]) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), 1 << 16):
                self._tail = (self._tail + data)[-_TAIL_BYTES:]
                # Whoever read our standard error may be gone: the workers must not notice.
                with contextlib.suppress(OSError):
                    while data:
                        data = data[os.write(_STDERR, data) :]
