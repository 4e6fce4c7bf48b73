"""Which commit a folder's repository is at, by reading its files: HEAD, refs, packed-refs, and those of worktrees.

No program is started, so nothing can be said of changes that were not committed.
"""

from __future__ import annotations

import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_MOST_BYTES = 8 << 20
"""Of packed-refs; what is larger is not read for this."""
_MOST_LINKS = 5


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out where a folder lies; None if it lies in no repository.

    Raises:
        OSError: the repository cannot be read.
        ValueError: it is not laid out as is known here, or has no commit yet.
    """
    git = _repository(folder.resolve())
    if git is None:
        return None
    # A worktree has a HEAD of its own; branches lie in the repository that it belongs to.
    common = git / (_read(git / "commondir").strip() if (git / "commondir").is_file() else "")
    name = "HEAD"
    for _ in range(_MOST_LINKS):
        text = _ref(name, git, common)
        if _COMMIT.fullmatch(text):
            return text
        if not text.startswith("ref: "):
            break
        name = text.removeprefix("ref: ").strip()
        if ".." in name or not name.startswith("refs/"):
            break
    raise ValueError(f"HEAD of {git} leads to no commit that can be read")


def _repository(folder: Path) -> Path | None:
    for place in (folder, *folder.parents):
        found = place / ".git"
        if found.is_dir():
            return found
        if found.is_file():  # of a worktree or a submodule
            text = _read(found).strip()
            if not text.startswith("gitdir: "):
                raise ValueError(f"{found} is not a link to a repository")
            return place / text.removeprefix("gitdir: ")
    return None


def _ref(name: str, git: Path, common: Path) -> str:
    for place in (git, common):
        if (place / name).is_file():
            return _read(place / name).strip()
    if (common / "packed-refs").is_file():
        for line in _read(common / "packed-refs").splitlines():
            commit, _, ref = line.partition(" ")
            if ref == name:
                return commit
    raise ValueError(f"{git} has no {name}")


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path} is too large")
    return data.decode(errors="replace")
