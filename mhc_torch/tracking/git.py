"""The state of the Git repository that an experiment runs in."""

from __future__ import annotations

import os
import subprocess

from mhc_torch.monitoring.logging import get_logger


def git_state(folder: str | os.PathLike[str] = ".") -> dict[str, str | bool]:
    """``git/commit`` (40 hex digits), ``git/branch`` and ``git/dirty`` of the repository around ``folder``.

    Without a branch (a detached HEAD) or a commit (a new repository) that entry is missing; outside of a repository,
    or without Git, all are. Dirty is what ``git status`` does not call clean: files changed, or new and not ignored.
    """
    status = _git(folder, "status", "--porcelain")
    if status is None:
        return {}
    state: dict[str, str | bool] = {"git/dirty": bool(status)}
    if commit := _git(folder, "rev-parse", "--verify", "--quiet", "HEAD"):
        state["git/commit"] = commit
    if branch := _git(folder, "symbolic-ref", "--short", "--quiet", "HEAD"):
        state["git/branch"] = branch
    return state


def _git(folder: str | os.PathLike[str], *arguments: str) -> str | None:
    command = ["git", "-C", os.fspath(folder), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        get_logger("mhc.tracking").warning("git takes longer than 30 s here: its state is not recorded")
        return None
    return done.stdout.strip() if done.returncode == 0 else None
