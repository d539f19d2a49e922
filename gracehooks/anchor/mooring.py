"""The master's side of the anchor: hands over its listening sockets, says when it serves, sees when the anchor is gone.

What must hold: without an anchor every call does nothing; none blocks, none raises; a process that was forked off a
master (a worker, a hook's child) never speaks for it, nor does a server that a worker starts. A successor does: gunicorn
executes it with the environment that the master was started with. The anchor knows the sender by the kernel's word
(SO_PEERCRED), not by what it says.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Protocol

from gracehooks.anchor.lines import ADDRESS, KEEP, LISTENERS, MOST, SERVING

__all__ = ["adrift", "anchored", "keep", "offer", "serving"]

_line: socket.socket | None = None


class Listener(Protocol):
    """A listening socket, or what wraps one."""

    def fileno(self) -> int: ...


def anchored() -> bool:
    """Whether this process was started, at some remove, by an anchor."""
    return ADDRESS in os.environ


def offer(listeners: Iterable[Listener | int | tuple[Listener | int, str]]) -> None:
    """Give the anchor these listening sockets, all of them: they take the place of what it got from this master before.

    Call it in the master, once it has them and at each change. The anchor holds them, so that after a death of the master
    nobody is refused, and starts the next one with them. Each is a socket, a descriptor, or one of both with a name.
    """
    fds, names = [], []
    for each in listeners:
        listener, name = each if isinstance(each, tuple) else (each, "")
        try:
            fds.append(listener if isinstance(listener, int) else listener.fileno())
        except (OSError, AttributeError, ValueError):
            continue  # closed: there is nothing to hold
        names.append(name or _name(listener))
    _say(f"{LISTENERS} {chr(0).join(names)}", fds[:MOST])


def serving(stop_budget: float | None = None) -> None:
    """Say that this master serves: signals to the anchor are for it from now on.

    Call it in the master, when all its workers are ready, or when it has taken over. `stop_budget` is how long a stop may
    take it, in seconds; the anchor kills what is left a little later.
    """
    _say(SERVING if stop_budget is None else f"{SERVING} {stop_budget!r}", ())


def keep(text: str) -> None:
    """Let the anchor keep this text for the master that it starts when this one has died; the last one counts."""
    _say(f"{KEEP} {text}", ())


def adrift() -> bool:
    """Whether the anchor has died: then nobody will start this server again or wait for it, and it had better stop.

    Call it in the master now and then; it is False where there never was an anchor, and while the anchor renews itself.
    """
    line = _line
    if line is None:
        return False
    try:
        return line.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True


def _connected() -> socket.socket | None:
    global _line
    name = os.environ.get(ADDRESS)
    if name is None or _line is not None:
        return _line
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        line.connect(b"\0" + os.fsencode(name))
    except OSError:
        line.close()
        raise
    _line = line
    return line


def _forked() -> None:
    """Run in whatever the master forks: it is no master."""
    global _line
    os.environ.pop(ADDRESS, None)
    if _line is not None:
        _line.close()
        _line = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _say(text: str, fds: Iterable[int]) -> None:
    try:
        line = _connected()
        if line is not None:
            socket.send_fds(line, [text.encode("utf-8", "surrogateescape")], list(fds))
    except (OSError, AttributeError, ValueError):
        pass  # no anchor, or another system: the server serves as it would without one


def _name(listener: Listener | int) -> str:
    try:
        if isinstance(listener, int):
            copy = socket.socket(fileno=os.dup(listener))
            try:
                found = copy.getsockname()
            finally:
                copy.close()
        else:
            found = listener.getsockname()  # type: ignore[attr-defined]
    except (OSError, AttributeError):
        return ""
    if isinstance(found, bytes):
        return "unix:@" + found[1:].decode("utf-8", "replace")
    return f"unix:{found}" if isinstance(found, str) else f"{found[0]}:{found[1]}"
