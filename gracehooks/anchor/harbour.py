"""The anchor's side of the mooring: who speaks is a master, and what it hands over is held.

What must hold: only a process that descends from the anchor is heard, and only one of the anchor's user, of root's, or of the
user that the command has changed to; the sockets that are
held are those of the master that serves, also after its death, until the next one has handed over its own; a socket that
the anchor was started with (`bind = "fd://3"`, socket activation) stays where it is and is not held twice. Where the
system has no such sockets, the harbour is closed and nothing is held.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from array import array
from collections.abc import Callable, Iterator

from gracehooks import processes
from gracehooks.anchor import family
from gracehooks.anchor.lines import KEEP, LISTENERS, MOST, SERVING
from gracehooks.anchor.machine import Fact, Moored, Serving

__all__ = ["Berth", "Harbour"]

#: socket(7)
_SO_DETACH_FILTER = 27


class Berth:
    """One master's line, and what it handed over (None before it has); `started` makes `pid` an identity."""

    def __init__(
        self,
        line: socket.socket,
        pid: int,
        started: int,
        fds: list[int] | None = None,
        names: list[str] | None = None,
    ) -> None:
        self.line, self.pid, self.started = line, pid, started
        self.fds, self.names = fds, names or []
        self.keepsake = ""


class Harbour:
    """The listening end (`door`), the lines, and what is held; `own` are inodes of sockets that are not to be held twice."""

    def __init__(self, door: socket.socket | None, own: set[int]) -> None:
        self.door = door
        self.berths: list[Berth] = []
        self.holding: list[int] = []
        self.names: list[str] = []
        self.keepsake = ""  #: what the master that serves, or served last, has left for the next one
        self.own = own

    @classmethod
    def opened(cls) -> Harbour:
        """A new one, under a name that nobody can guess or take before."""
        door: socket.socket | None = None
        try:
            door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            door.bind(f"\0gracehooks-{os.getpid()}-{os.urandom(8).hex()}")
            door.listen(128)
        except (OSError, AttributeError):
            if door is not None:
                door.close()
            door = None
        return cls(door, inherited_sockets())

    @property
    def address(self) -> str | None:
        """The name that masters connect to, without the leading NUL."""
        return None if self.door is None else os.fsdecode(self.door.getsockname()[1:])

    # -- hearing -------------------------------------------------------------------------------------------------
    def arrivals(self, closed: Callable[[Berth], object], child: int = 0) -> Iterator[tuple[Berth, Fact]]:
        """New lines, each with the fact that its master is there; `closed` is called for one that it takes the place of.
        `child` is the command's process, whose user is heard as well.
        """
        while self.door is not None:
            try:
                line, _ = self.door.accept()
            except OSError:
                return
            line.setblocking(False)
            pid, uid, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (0, os.geteuid(), family.user(child)) or not family.descends(pid):
                line.close()
                continue
            for other in [each for each in self.berths if each.pid == pid]:
                closed(other)  # it has come again, after an exec say
                self.leave(other)
            berth = Berth(line, pid, processes.started(pid))
            self.berths.append(berth)
            yield berth, Moored(pid)

    def hear(self, berth: Berth, closed: Callable[[Berth], object]) -> Iterator[Fact]:
        """What its master says; `closed` is called when it says no more."""
        while True:
            try:
                data, fds = _receive(berth.line)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data, fds = b"", []
            if not data:
                closed(berth)
                self.leave(berth)
                return
            verb, _, rest = data.decode("utf-8", "replace").partition(" ")
            if verb == LISTENERS:
                self._take(berth, fds, rest.split("\0") if rest else [])
                continue
            for fd in fds:
                os.close(fd)
            if verb == KEEP:
                berth.keepsake = rest
            if verb == SERVING:
                yield Serving(berth.pid, _seconds(rest))

    def _take(self, berth: Berth, fds: list[int], names: list[str]) -> None:
        self._drop(berth)
        berth.fds, berth.names = [], []
        for number, fd in enumerate(fds):
            info = os.fstat(fd)
            if not stat.S_ISSOCK(info.st_mode) or info.st_ino in self.own:
                os.close(fd)
                continue
            berth.fds.append(fd)
            berth.names.append(names[number] if number < len(names) else "")

    def leave(self, berth: Berth) -> None:
        """Its line is closed; what it handed over is kept only while it is what is held."""
        berth.line.close()
        self._drop(berth)
        if berth in self.berths:
            self.berths.remove(berth)

    def _drop(self, berth: Berth) -> None:
        if berth.fds is not None and berth.fds is not self.holding:
            for fd in berth.fds:
                os.close(fd)
        berth.fds = None

    # -- holding -------------------------------------------------------------------------------------------------
    def hold(self, pid: int) -> bool:
        """Hold what master `pid` handed over, where it has; whether that is something new."""
        for berth in self.berths:
            if berth.pid == pid:
                self.keepsake = berth.keepsake or self.keepsake
            if berth.pid != pid or berth.fds is None or berth.fds is self.holding:
                continue
            old = self.holding
            self.holding, self.names = berth.fds, berth.names
            if not any(each.fds is old for each in self.berths):
                for fd in old:
                    os.close(fd)
            return True
        return False

    def fit_to_inherit(self) -> list[int]:
        """What is held, made fit for a new master: the filter that a stop put before new connections is taken off (the
        master may have been killed in the middle of one). Nothing where a unix socket has lost its path: nobody could
        reach it, and gunicorn binds either all or none.
        """
        for fd in self.holding:
            with socket.socket(fileno=os.dup(fd)) as listener:
                try:
                    listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
                except OSError:
                    pass  # there was none
                name = listener.getsockname()
            if isinstance(name, str) and name and not os.path.exists(name):
                return []
        return self.holding

    def masters(self) -> dict[int, int]:
        """The masters that are moored and alive: pid and start time."""
        return {each.pid: each.started for each in self.berths if processes.alive(each.pid, each.started)}


def inherited_sockets() -> set[int]:
    """The inodes of the sockets that this process was started with: a socket in several processes has one."""
    found: set[int] = set()
    try:
        names = os.listdir("/dev/fd")
    except OSError:
        return found
    for name in names:
        try:
            fd = int(name)
            info = os.fstat(fd)
            if stat.S_ISSOCK(info.st_mode) and os.get_inheritable(fd):
                found.add(info.st_ino)
        except (OSError, ValueError):
            continue  # the descriptor of the listing itself
    return found


def _receive(line: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, closed on exec from the start (`socket.recv_fds` takes that flag and ignores it)."""
    size = array("i").itemsize
    data, found, _, _ = line.recvmsg(65536, socket.CMSG_LEN(MOST * size), socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for level, kind, content in found:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % size])
    return data, list(fds)


def _seconds(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if 0 <= found < float("inf") else None
