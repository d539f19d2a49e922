"""The pidfile when masters change: it is never absent, never half written, and always names the one that serves."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from gunicorn.pidfile import Pidfile

from gracehooks import processes

__all__ = ["is_ours", "second", "take"]


def take(arbiter: Any) -> None:
    """Write our pid over another master's in one step, where a pidfile is configured. Raises OSError."""
    mine = arbiter.pidfile
    path = arbiter.cfg.pidfile
    if path is None:
        return
    directory = os.path.dirname(path) or "."
    fd, name = tempfile.mkstemp(dir=directory, prefix=".pid-")
    try:
        with os.fdopen(fd, "w") as file:
            file.write(f"{os.getpid()}\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if mine is not None and mine.fname != path:
        mine.unlink()
    arbiter.pidfile = Pidfile(path)
    arbiter.pidfile.pid = os.getpid()


def is_ours(arbiter: Any) -> bool:
    """Whether the file names this master."""
    try:
        return Path(arbiter.cfg.pidfile).read_text().strip() == str(os.getpid())
    except OSError:
        return False


def second(arbiter: Any) -> int:
    """The living master that gunicorn's `.2` names, which a successor writes until it serves; 0 where there is none.

    One that is dead, or whose pid is another process's now, would keep every further successor from its start: its file is
    removed.
    """
    path = Path(f"{arbiter.cfg.pidfile}.2")
    try:
        pid = int(path.read_text())
        if processes.alive_since(pid, path.stat().st_mtime):
            return pid
        path.unlink()
    except (OSError, ValueError):
        pass
    return 0
