"""Replacing the master: the new side. What the old master hands over, and the channel back to it.

What must hold: until the old master says "commit", or dies, this master serves beside it and owns nothing (no pidfile, no
control socket, no unix path); whatever it cannot do it says before it ends.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from typing import Any

from gracehooks import processes
from gracehooks.gunicorn.successor import HANDOVER
from gracehooks.upgrade.channel import Channel

__all__ = ["Handover", "Predecessor", "take_handover"]


@dataclass
class Predecessor:
    """An older generation that may still be draining; `start` with the pid is its identity."""

    pid: int
    start: int
    generation: int
    channel: Channel | None = None
    workers: int = 0

    def facts(self) -> dict[str, int]:
        """What the next generation must know of it."""
        return {"pid": self.pid, "start": self.start, "generation": self.generation}

    @property
    def alive(self) -> bool:
        """Whether its master still runs."""
        return processes.alive(self.pid, self.start)


@dataclass
class Handover:
    """What the old master handed over; see `successor.ReexecHost.launch`."""

    old: Predecessor
    generation: int
    state_dir: str
    workers: int
    configured: int
    systemd: bool
    own: list[str]
    draining: list[Predecessor]
    id: str
    kind: str


def take_handover() -> Handover | None:
    """Take what `GRACEHOOKS_HANDOVER` says out of the environment; None where this master is nobody's successor.

    Gives standard error back, which the old master listened to until now.
    """
    text = os.environ.pop(HANDOVER, None)
    if text is None:
        return None
    try:
        said: dict[str, Any] = json.loads(text)
        parent = int(said["parent"])
    except (ValueError, KeyError, TypeError):
        return None
    if os.environ.get("GUNICORN_PID") != str(parent):
        return None  # inherited by a process that is no successor
    try:
        os.dup2(said["stderr"], 2)
        os.close(said["stderr"])
        channel = Channel(socket.socket(fileno=said["channel"]))
    except OSError:
        return None
    return Handover(
        old=Predecessor(parent, processes.started(parent), said["generation"] - 1, channel),
        generation=said["generation"],
        state_dir=said["state_dir"],
        workers=said["workers"],
        configured=said["configured"],
        systemd=said["systemd"],
        own=said.get("own", []),
        draining=[Predecessor(each["pid"], each["start"], each["generation"]) for each in said["draining"]],
        id=said["id"],
        kind=said["kind"],
    )
