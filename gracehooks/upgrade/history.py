"""The files that outlive a master: `status.json` (replaced whole) and `history.jsonl` (appended to).

Files are 0600 in a directory 0700. A disk that is full or read-only never disturbs the server: it is said once, the
server serves on without them, and what could not be written is written when it can be. Query strings never get here.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Book", "default_state_dir", "index_dir", "run_dir"]


def run_dir(uid: int | None = None) -> Path:
    """The private per-user run directory: `$XDG_RUNTIME_DIR/gracehooks`, else `/tmp/gracehooks-<uid>`."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base) and uid is None:
        return Path(base) / "gracehooks"
    return Path(tempfile.gettempdir()) / f"gracehooks-{os.getuid() if uid is None else uid}"


def index_dir() -> Path:
    """Where each running instance leaves a file named after its master's pid that holds its state directory."""
    return run_dir() / "instances"


def default_state_dir(pidfile: str | None, pid: int) -> Path:
    """Beside the pidfile, else in the private run directory."""
    if pidfile:
        path = Path(os.path.abspath(pidfile))
        return path.with_name((path.stem if path.suffix == ".pid" else path.name) + ".gracehooks")
    return run_dir() / str(pid)


def private_dir(path: Path) -> None:
    """Make `path` and hold it at 0700; refuses one that belongs to somebody else (OSError)."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    os.chmod(path, 0o700)


#: So many lines of the history are kept for a disk that cannot take them; the oldest go first.
UNWRITTEN = 1000


class Book:
    """Status and history of one instance in `directory`; `complain` is told once of a file that cannot be written."""

    def __init__(self, directory: Path, complain: Callable[[str], object]) -> None:
        self.directory = directory
        self._complain = complain
        self._complained = False
        self._last: dict[str, Any] | None = None
        self._unwritten: deque[bytes] = deque(maxlen=UNWRITTEN)
        self._half_a_line = False

    def serving_master(self) -> int:
        """The pid of the master that says in `status.json` that it serves; 0 where none does."""
        try:
            status = json.loads((self.directory / "status.json").read_text())
            return int(status["master_pid"]) if status["state"] == "serving" else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def write_status(self, status: Mapping[str, Any]) -> bool:
        """Replace `status.json`, unless `status` is what it says already."""
        if status == self._last:
            return True

        def write() -> None:
            private_dir(self.directory)
            fd, name = tempfile.mkstemp(dir=self.directory, prefix=".status-")
            try:
                with os.fdopen(fd, "w") as file:
                    json.dump(status, file)
                os.replace(name, self.directory / "status.json")
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise

        if self._try(write):
            self._last = dict(status)
            return not self._unwritten or self._try(self._append_unwritten)
        return False

    def append(self, record: Mapping[str, Any]) -> bool:
        """Add one line to `history.jsonl`; one that cannot be written is added with the next."""
        self._unwritten.append(json.dumps(record).encode() + b"\n")
        return self._try(self._append_unwritten)

    def _append_unwritten(self) -> None:
        private_dir(self.directory)
        fd = os.open(self.directory / "history.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while self._unwritten:
                line = b"\n" * self._half_a_line + self._unwritten[0]
                written = os.write(fd, line)
                self._half_a_line = 0 < written < len(line)
                if written < len(line):  # it is read as no record; the whole line comes once more
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._unwritten.popleft()
        finally:
            os.close(fd)

    def register(self, pid: int) -> None:
        """Let the command line find this instance by its master's pid."""

        def write() -> None:
            private_dir(index_dir().parent)
            private_dir(index_dir())
            path = index_dir() / str(pid)
            path.write_text(str(self.directory))
            os.chmod(path, 0o600)

        self._try(write)

    def unregister(self, pid: int) -> None:
        """Undo `register`."""
        try:
            (index_dir() / str(pid)).unlink(missing_ok=True)
        except OSError:
            pass  # a stale entry is harmless: its pid is checked by whoever reads it

    def _try(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            if not self._complained:
                self._complained = True
                self._complain(
                    f"cannot write the state in {self.directory} ({error}); the server serves on, "
                    "and the commands of gracehooks will not see it until that is mended"
                )
            return False
        if self._complained:
            self._complained = False
        return True
