"""Replacing the anchor itself: when its own files have changed on disk, it executes the new ones in place.

What must hold: the pid stays, and with it the children; the sockets and lines stay open; no signal is lost (they are
blocked across the exec, and what was pending stays pending). Nothing is executed that has not been rehearsed: a child runs
the new files on the very state that they would get, and must understand it.
"""

from __future__ import annotations

import os
import signal
import sys

from gracehooks.anchor.harbour import Berth, Harbour
from gracehooks.anchor.machine import Machine, Phase

__all__ = ["REHEARSE", "STATE", "arguments", "carry", "fingerprint", "restore", "take_over"]

#: The environment variable that carries the state across the exec, and the argument that asks for a rehearsal.
STATE = "_GRACEHOOKS_ANCHOR_STATE"
REHEARSE = "--rehearse"
#: What this code writes and understands.
FORMAT = 1


def arguments(command: list[str], *options: str) -> list[str]:
    """The command line of the anchor proper: isolated, so that no `sitecustomize` and no package can disturb it."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
    return [sys.executable, "-I", "-S", script, *options, "--", *command]


def fingerprint() -> tuple[tuple[str, int, int], ...]:
    """What tells the files of the anchor and its interpreter from others at the same paths."""
    here = os.path.dirname(os.path.abspath(__file__))
    above = os.path.dirname(here)
    paths = [os.path.join(here, name) for name in sorted(os.listdir(here)) if name.endswith(".py")]
    found = []
    for path in [*paths, os.path.join(above, "processes.py"), sys.executable]:
        info = os.stat(path)
        found.append((os.path.basename(path), info.st_ino, info.st_mtime_ns))
    return tuple(found)


def carry(machine: Machine, harbour: Harbour, directory: str) -> str:
    """Everything that must survive the exec, as text."""
    import json  # only a renewal pays for it

    facts = {**vars(machine), "phase": machine.phase.value, "retired": sorted(machine.retired)}
    return json.dumps(
        {
            "format": FORMAT,
            "machine": facts,
            "directory": directory,
            "door": None if harbour.door is None else harbour.door.fileno(),
            "holding": harbour.holding,
            "names": harbour.names,
            "keepsake": harbour.keepsake,
            "own": sorted(harbour.own),
            "berths": [[each.line.fileno(), each.pid, each.started, each.fds, each.names] for each in harbour.berths],
        }
    )


def restore(text: str, *, rehearsal: bool = False) -> tuple[Machine, Harbour, str]:
    """The other end of `carry`; a rehearsal opens nothing. Raises ValueError, KeyError or TypeError where it does not
    understand."""
    import json
    import socket

    said = json.loads(text)
    if said["format"] != FORMAT:
        raise ValueError(f"the state has format {said['format']}, and this is {FORMAT}")
    machine, facts = Machine(), said["machine"]
    if facts.keys() != vars(machine).keys():
        raise ValueError("the state has other parts than this machine")
    vars(machine).update(facts, phase=Phase(facts["phase"]), retired=set(facts["retired"]))
    berths = [(int(line), int(pid), int(started), fds, names) for line, pid, started, fds, names in said["berths"]]
    if rehearsal:
        harbour = Harbour(None, set(said["own"]))
        harbour.keepsake = said["keepsake"]
        return machine, harbour, said["directory"]
    door = None if said["door"] is None else socket.socket(fileno=said["door"])
    harbour = Harbour(door, set(said["own"]))
    harbour.holding, harbour.names, harbour.keepsake = said["holding"], said["names"], said["keepsake"]
    for line, pid, started, fds, names in berths:
        same = harbour.holding if fds == harbour.holding and fds else fds
        harbour.berths.append(Berth(socket.socket(fileno=line), pid, started, same, names))
    for fd in _descriptors(harbour):
        os.set_inheritable(fd, False)
    return machine, harbour, said["directory"]


def take_over(command: list[str], state: str, harbour: Harbour, signals: set[signal.Signals]) -> None:
    """Execute the new files in this process. Raises OSError where that fails, with everything as it was."""
    fds = _descriptors(harbour)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for fd in fds:
        os.set_inheritable(fd, True)
    try:
        os.execve(sys.executable, arguments(command), {**os.environ, STATE: state})
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _descriptors(harbour: Harbour) -> list[int]:
    fds = {each.line.fileno() for each in harbour.berths} | set(harbour.holding)
    for each in harbour.berths:
        fds |= set(each.fds or ())
    if harbour.door is not None:
        fds.add(harbour.door.fileno())
    return sorted(fds)
