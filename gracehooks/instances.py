"""Running instances as seen from outside, by the files that they keep: found, named, read, followed.

What must hold: a signal goes only to a process that wrote the status file that names it. A file that a dead master left
behind, whose pid now belongs to somebody else, is recognised by its age. This module sends nothing and knows no server.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gracehooks import processes
from gracehooks.errors import GracehooksError
from gracehooks.upgrade.history import default_state_dir, index_dir

__all__ = ["Instance", "NoSuchInstance", "find", "running"]


class NoSuchInstance(GracehooksError):  # noqa: N818 - a fact about the target, not a fault
    """The operator's turn: no instance, or more than one, is meant by what was given."""


@dataclass(frozen=True)
class Instance:
    """One instance, through all its generations; `directory` is its state directory."""

    directory: Path

    def status(self) -> dict[str, Any]:
        """The status file as it is now; empty where there is none."""
        try:
            found = json.loads((self.directory / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def master(self, status: dict[str, Any] | None = None) -> tuple[int, int] | None:
        """The running master's pid and start time; None where it has ended."""
        status = self.status() if status is None else status
        try:
            pid, written = int(status["master_pid"]), float(status.get("at", 0.0))
        except (KeyError, TypeError, ValueError):
            return None
        if pid <= 0 or status.get("state") == "stopped":
            return None
        start = processes.started(pid)
        return (pid, start) if processes.alive_since(pid, written) else None

    def needs_room(self) -> None:
        """Raise OSError where the masters cannot write their files: on a disk that is full, or read-only, or broken.

        What this user may not write the masters may.
        """
        try:
            with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
                if file.write(b"\0" * 4096) < 4096:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except PermissionError:
            pass

    def history_size(self) -> int:
        """How long the history is now; what is appended later begins there."""
        try:
            return (self.directory / "history.jsonl").stat().st_size
        except OSError:
            return 0

    def history(self, since: int = 0) -> list[dict[str, Any]]:
        """The records from the byte `since` on, oldest first; a line that is half written is left for the next look."""
        try:
            with open(self.directory / "history.jsonl", "rb") as file:
                file.seek(since)
                text = file.read()
        except OSError:
            return []
        records = []
        for line in text[: text.rfind(b"\n") + 1].splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no other command waits for a verdict of this instance; held until the block ends.

        A signal carries no name: of two commands at a time, neither could tell which verdict is its own.
        """
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(fd)


def _own_indexes() -> list[Path]:
    """Where this user's instances are listed: a service has no `XDG_RUNTIME_DIR` where its operator's shell has one."""
    return list(dict.fromkeys([index_dir(), Path(tempfile.gettempdir()) / f"gracehooks-{os.geteuid()}" / "instances"]))


def _everybodys_indexes() -> list[Path]:
    """Where others' instances are listed; only root may signal those."""
    if os.geteuid() != 0:
        return []
    found = sorted(Path("/run/user").glob("*/gracehooks/instances"))
    return found + sorted(Path(tempfile.gettempdir()).glob("gracehooks-*/instances"))


def _trusted(path: Path) -> bool:
    """Whether nobody but its owner can have written there, and the owner is this user (or, for root, anyone)."""
    try:
        found = path.stat()
    except OSError:
        return False
    return not found.st_mode & 0o022 and (os.geteuid() == 0 or found.st_uid == os.geteuid())


def _listed(index: Path) -> Iterator[tuple[int, Instance]]:
    if not _trusted(index):
        return
    for entry in sorted(index.iterdir()):
        try:
            yield int(entry.name), Instance(Path(entry.read_text().strip()))
        except (OSError, ValueError):
            continue


def running() -> list[Instance]:
    """Every instance of this user whose master runs; for root, where it has none itself, everybody's."""
    for indexes in (_own_indexes(), _everybodys_indexes()):
        found: dict[Path, Instance] = {}
        for index in indexes:
            for _, instance in _listed(index):
                if instance.master() is not None:
                    found.setdefault(instance.directory, instance)
        if found:
            return list(found.values())
    return []


def find(*, pidfile: str | None = None, pid: int | None = None, state_dir: str | None = None) -> Instance:
    """The instance that is meant: by its state directory, its pidfile, its master's pid, or as the only one that runs.

    An instance that has stopped is found by its state directory or pidfile, as long as its files are there. Raises
    NoSuchInstance with a message for the operator.
    """
    if state_dir is not None:
        instance = Instance(Path(state_dir).absolute())
        if not instance.status():
            raise NoSuchInstance(
                f"there is no status.json in {instance.directory}; is it the state directory, and may you read it?"
            )
        return instance
    if pidfile is not None:
        return _by_pidfile(pidfile)
    if pid is not None:
        return _by_pid(pid)
    found = running()
    if len(found) == 1:
        return found[0]
    if not found:
        raise NoSuchInstance("no instance is running for this user; name one with --pidfile, --pid or --state-dir")
    masters = ", ".join(f"--pid {instance.status().get('master_pid')} ({instance.directory})" for instance in found)
    raise NoSuchInstance(f"{len(found)} instances are running; name one: {masters}")


def _by_pidfile(pidfile: str) -> Instance:
    beside = Instance(default_state_dir(pidfile, 0))
    try:
        pid = int(Path(pidfile).read_text())
    except FileNotFoundError:
        if beside.status():
            return beside  # it has stopped: its files still say how
        raise NoSuchInstance(f"there is no pidfile {pidfile}") from None
    except (OSError, ValueError) as error:
        raise NoSuchInstance(f"the pidfile {pidfile} cannot be read: {error}") from None
    if beside.status().get("master_pid") == pid:
        return beside
    try:
        return _by_pid(pid)
    except NoSuchInstance:
        if beside.status():
            return beside  # between two masters the status may be a moment behind the pidfile, or the other way round
        raise


def _by_pid(pid: int) -> Instance:
    for index in (*_own_indexes(), *_everybodys_indexes()):
        for listed, instance in _listed(index):
            if listed == pid and instance.status():
                return instance
    for instance in running():
        master = instance.master()
        if master is not None and (master[0] == pid or pid in processes.ancestors(master[0])):
            return instance  # the pid may be the anchor's, which is all that a supervisor knows
    if not processes.alive(pid):
        raise NoSuchInstance(f"there is no process {pid}")
    raise NoSuchInstance(
        f"process {pid} is no master that gracehooks knows: it may still be booting, run for another user, or not have "
        'gracehooks (worker_class = "gracehooks.Worker" or on_starting = gracehooks.on_starting); try --state-dir'
    )
