"""What the rules look at: frozen, and nothing in it acts.

`Facts` is one deployment: the server's configuration, gracehooks' settings, what this host shows of the paths involved,
and at most one of a systemd unit, a supervisord program, a Kubernetes workload, a compose service or a Dockerfile. A part
that is not known is None, and a rule that needs it does not speak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gracehooks.gunicorn.reading import Boot, Server
from gracehooks.settings import Settings

__all__ = [
    "Boot",
    "Command",
    "Directory",
    "Facts",
    "Finding",
    "Host",
    "Image",
    "Program",
    "Server",
    "Service",
    "Settings",
    "Unit",
    "Workload",
]

#: What the master adds to the budget before it kills, and what it needs to write the report and leave.
KILL_SLACK = 0.5
LEAVE = 1.5


@dataclass(frozen=True)
class Finding:
    """One trap: where it stands, what happens and when, the cure, and the page that explains it.

    `advice` is what could be better without losing anything; it does not change the exit code.
    """

    code: str
    where: str
    says: str
    happens: str
    moment: str
    cure: str
    page: str
    advice: bool = False


@dataclass(frozen=True)
class Command:
    """How a deployment starts the server."""

    text: str
    #: gunicorn's own arguments; None where no gunicorn is in it.
    args: tuple[str, ...] | None = None
    #: The path that gunicorn, or its interpreter, is started by.
    program: str = ""
    #: Whether `gracehooks run` stands before it.
    anchored: bool = False
    #: The shell that stays in front of the server, empty where none does.
    shell: str = ""


@dataclass(frozen=True)
class Directory:
    """A directory as the server's user would find it."""

    exists: bool = True
    #: None where the user is not known on this host.
    writable: bool | None = True
    #: Whether every user may create files in it (mode 1777).
    shared: bool = False


@dataclass(frozen=True)
class Host:
    """What this host shows; only asked where the deployment is for this host."""

    directories: Mapping[str, Directory] = field(default_factory=dict)
    #: For a path inside a release: (the release directory, the symlink that names it today or an empty text).
    releases: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    #: Paths that go by a symlink.
    symlinked: frozenset[str] = frozenset()
    user: str = "root"

    def directory(self, path: str | None) -> Directory | None:
        """The directory, where it was looked at."""
        return None if path is None else self.directories.get(path)


@dataclass(frozen=True)
class Unit:
    """A systemd service: the last word of each setting of [Service], and whole lists of those that add up."""

    name: str
    values: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    command: Command = field(default_factory=lambda: Command(""))

    def get(self, key: str, default: str = "") -> str:
        """The last value of a setting; a setting that is empty counts as not set."""
        return self.values.get(key) or default

    @property
    def type(self) -> str:
        """Type=, with systemd's default."""
        return self.get("Type", "simple").lower()

    @property
    def notify_access(self) -> str:
        """NotifyAccess=, with what Type= and WatchdogSec= imply."""
        given = self.get("NotifyAccess", "none").lower()
        if given == "none" and (self.type in ("notify", "notify-reload") or self.get("WatchdogSec")):
            return "main"
        return given


@dataclass(frozen=True)
class Program:
    """A supervisord [program:x] section, as written."""

    name: str
    values: Mapping[str, str] = field(default_factory=dict)
    command: Command = field(default_factory=lambda: Command(""))
    #: The words of command= and environment= that are another in each of the program's processes (numprocs).
    numbered: frozenset[str] = frozenset()

    def flag(self, key: str, default: bool = False) -> bool:
        """A yes or no, as supervisord reads it."""
        text = self.values.get(key, "").strip().lower()
        return default if not text else text in ("true", "yes", "on", "1", "y")


@dataclass(frozen=True)
class Workload:
    """One container of a Kubernetes workload."""

    kind: str
    name: str
    #: The whole object, its pod's spec, and the container.
    document: Mapping[str, Any] = field(default_factory=dict)
    pod: Mapping[str, Any] = field(default_factory=dict)
    container: Mapping[str, Any] = field(default_factory=dict)
    command: Command = field(default_factory=lambda: Command(""))

    def probe(self, name: str) -> Mapping[str, Any] | None:
        """A probe of the container: "readiness", "liveness" or "startup"."""
        found = self.container.get(f"{name}Probe")
        return found if isinstance(found, Mapping) else None

    def path(self, name: str) -> str | None:
        """The path that the probe asks by HTTP."""
        asked = (self.probe(name) or {}).get("httpGet")
        return str(asked.get("path") or "/") if isinstance(asked, Mapping) else None


@dataclass(frozen=True)
class Service:
    """A service of a compose file."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    command: Command | None = None


@dataclass(frozen=True)
class Image:
    """A Dockerfile's last stage."""

    command: Command | None = None
    stop_signal: str = "SIGTERM"


@dataclass(frozen=True)
class Facts:
    """One deployment."""

    server: Server | None = None
    settings: Settings | None = None
    failure: str = ""
    boot: Boot | None = None
    host: Host | None = None
    unit: Unit | None = None
    program: Program | None = None
    workload: Workload | None = None
    service: Service | None = None
    image: Image | None = None
    #: The variables that the deployment sets, as far as they are written out.
    environ: Mapping[str, str] = field(default_factory=dict)
    #: The file that the deployment stands in.
    file: str = ""

    @property
    def budget(self) -> float:
        """The longest that a stop may last, in seconds: ours where gracehooks is in, else gunicorn's."""
        if self.server is not None and not self.server.attached:
            return float(self.server.graceful_timeout)
        return self.settings.stop_budget if self.settings is not None else 0.0

    @property
    def needed(self) -> float:
        """What a supervisor must wait before it kills: the budget, the master's own KILL, its report and its exit."""
        return self.budget + KILL_SLACK + LEAVE

    @property
    def recommended(self) -> int:
        """What the master says at its start that a supervisor should wait."""
        return math.ceil(self.budget + 5)

    @property
    def command(self) -> Command | None:
        """How the deployment starts the server, where it says so."""
        for each in (self.unit, self.program, self.workload, self.service, self.image):
            if each is not None:
                return each.command
        return None
