"""Traps in a systemd service: systemd.service(5), systemd.kill(5), systemd.exec(5)."""

from __future__ import annotations

import os
from collections.abc import Iterator

from gracehooks.check.facts import Facts, Unit
from gracehooks.check.rules import Seen, rule, seen
from gracehooks.check.units import INFINITY, managed_directories, span

PAGE = "docs/how-to/timeouts.md#systemd"
UNIT = "docs/how-to/systemd.md"
#: systemd's own defaults (systemd-system.conf(5)).
DEFAULT_TIMEOUT = 90.0
NOTIFY = ("notify", "notify-reload")


def _limit(unit: Unit, key: str) -> tuple[str, float]:
    """TimeoutStartSec= or TimeoutStopSec=, or what TimeoutSec= sets for both; 0 stands for none."""
    for name in (key, "TimeoutSec"):
        text = unit.get(name)
        if text:
            found = span(text)
            if found is not None:
                return f"{name}={text}", found or INFINITY
    return f"{key}={DEFAULT_TIMEOUT:g} (systemd's default)", DEFAULT_TIMEOUT


def _notifies(unit: Unit) -> bool:
    """Whether gracehooks can ask this systemd for more time (EXTEND_TIMEOUT_USEC=)."""
    return unit.notify_access != "none"


@rule(
    "systemd-type",
    finds="a `Type=` that is not notify or notify-reload",
    happens="{happens}",
    moment="{moment}",
    cure="Type=notify (or notify-reload from systemd 253 on) and NotifyAccess=all",
    source="systemd.service(5), Type= and NotifyAccess=; measured on systemd 252",
    page=UNIT,
)
def type_(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    if unit is None or unit.type in NOTIFY:
        return
    daemon = facts.server is not None and facts.server.daemon
    if unit.type == "forking":
        if daemon:
            happens = "systemd follows the pidfile instead of the server: it takes the start for done before a worker is ready"
            moment = "at each start"
        else:
            happens = (
                "systemd waits for the first process to exit, which gunicorn never does, and kills it as timed out"
            )
            moment = "TimeoutStartSec after each start"
    elif unit.type == "oneshot":
        happens = "systemd waits for the command to end before it takes the unit for started, which is never"
        moment = "at each start"
    elif unit.notify_access == "none":
        happens = (
            "systemd hears nothing from the server: when the old master leaves, it takes the unit for ended and kills the "
            "new generation with it; and a start counts as done before a worker is ready"
        )
        moment = "when the first upgrade has completed; at each start"
    else:
        happens = (
            "a start counts as done before a worker is ready: what is ordered after this unit finds nobody serving"
        )
        moment = "at each start and restart"
    yield seen("Type", unit.type, happens=happens, moment=moment)


@rule(
    "systemd-notify-access",
    finds="a `NotifyAccess=` that lets only the main process speak",
    happens="systemd drops what any other master says: the old one that serves again because the successor died, and a new "
    "one whose old master was killed before it named it; it follows a process that is gone, and a watchdog or the next stop "
    "kills a unit that serves",
    moment="after an upgrade in which a master died",
    cure="NotifyAccess=all",
    source="systemd.service(5), NotifyAccess=; MAINPID= by itself is also accepted from the main process",
    page=UNIT,
)
def notify_access(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    if unit is not None and unit.type in NOTIFY and unit.notify_access != "all":
        given = unit.get("NotifyAccess")
        yield seen("NotifyAccess", given or f"not set, which Type={unit.type} makes {unit.notify_access}")


@rule(
    "systemd-kill-mode",
    finds="a `KillMode=` that is not mixed",
    happens="{happens}",
    moment="{moment}",
    cure="KillMode=mixed",
    source="systemd.kill(5), KillMode=",
    page=UNIT,
)
def kill_mode(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    if unit is None:
        return
    mode = unit.get("KillMode", "control-group").lower()
    says = unit.get("KillMode") or "control-group (systemd's default)"
    if mode == "control-group":
        happens = (
            "systemd sends TERM to every process of the unit at once: child processes of jobs are interrupted before their "
            "grace began, and workers leave before the master has told them how"
        )
        moment = "at once at `systemctl stop` and `restart`"
    elif mode == "process":
        happens = (
            "only the master is ever killed: what outlives it (workers, children of jobs) runs on unseen, with the port"
        )
        moment = "when the master is killed: a stop that timed out, a crash, the OOM killer"
    elif mode == "none":
        happens = (
            "systemd sends no signal: unless an ExecStop= ends it, the server runs on while the unit counts as stopped"
        )
        moment = "at `systemctl stop` and `restart`"
    else:
        return
    yield seen("KillMode", says, happens=happens, moment=moment)


@rule(
    "systemd-kill-signal",
    finds="a `KillSignal=` that is gracehooks' hammer, or no stop at all",
    happens="{happens}",
    moment="at `systemctl stop` and `restart`",
    cure="remove KillSignal=; the default, SIGTERM, is the graceful stop",
    source="systemd.kill(5), KillSignal=; gunicorn's signals",
)
def kill_signal(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    for key in ("KillSignal", "RestartKillSignal"):
        given = unit.get(key).upper() if unit is not None else ""
        name = {"2": "SIGINT", "3": "SIGQUIT", "9": "SIGKILL", "1": "SIGHUP"}.get(given, given)
        name = name if name.startswith("SIG") or not name else f"SIG{name}"
        if name in ("SIGINT", "SIGQUIT"):
            yield seen(key, given, happens="the server drops every request and job in flight and reports them as lost")
        elif name == "SIGKILL":
            yield seen(key, given, happens="the server is killed without a word: requests and jobs in flight are lost")
        elif name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGWINCH"):
            yield seen(
                key, given, happens="the server does something else than stop, and is killed when the time is up"
            )


@rule(
    "systemd-stop-unwaited",
    finds="no `ExecStop=` that runs `gracehooks stop`",
    happens="the master that an upgrade brought is no child of systemd's, which does not wait for a stranger: right after its "
    "TERM everything is killed, and requests and jobs in flight are lost",
    moment="at the first `systemctl stop` or `restart` after an upgrade",
    cure="ExecStop=-{stop}",
    source="measured on systemd 252; src/core/unit.c, unit_kill_context(): an alien main process is not waited for",
    page=UNIT,
)
def stop_unwaited(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    if unit is None or not _attached(facts) or not _notifies(unit):
        return  # where systemd hears nothing, no upgrade lasts that long: systemd-type
    if unit.command.anchored:
        return  # the anchor is systemd's own child for good, and is waited for
    commands = unit.lists.get("ExecStop", ())
    if not any("gracehooks" in each and " stop" in each for each in commands):
        says = "; ".join(commands) or "not set"
        yield seen("ExecStop", says, stop=_upgrade(facts).replace(" upgrade ", " stop "))


@rule(
    "systemd-stop-timeout",
    finds="a `TimeoutStopSec=` shorter than the stop budget, in a unit that cannot be asked for more time",
    happens="systemd kills the whole unit with SIGKILL: requests and jobs in flight are lost, and nothing is reported",
    moment="{limit:g} s after `systemctl stop` began; the stop may last {budget} s",
    cure="TimeoutStopSec={recommended}",
    source="systemd.service(5), TimeoutStopSec=; measured on systemd 252",
    page=PAGE,
)
def stop_timeout(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    if unit is None or facts.settings is None:
        return
    says, limit = _limit(unit, "TimeoutStopSec")
    if limit < facts.needed and not (_notifies(unit) and _attached(facts)):
        yield seen(*says.split("=", 1), limit=limit)


@rule(
    "systemd-stop-extended",
    finds="a `TimeoutStopSec=` shorter than the stop budget, which gracehooks extends while it drains",
    happens="the stop lasts longer than the unit says (gracehooks asks systemd for more time); a master that hangs cannot "
    "ask, and everything is killed then, with workers that still drain",
    moment="{limit:g} s after `systemctl stop` began; the stop may last {budget} s",
    cure="TimeoutStopSec={recommended}",
    source="systemd.service(5), TimeoutStopSec= and EXTEND_TIMEOUT_USEC=; measured on systemd 252",
    page=PAGE,
    advice=True,
)
def stop_extended(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    if unit is None or facts.settings is None:
        return
    says, limit = _limit(unit, "TimeoutStopSec")
    if limit < facts.needed and _notifies(unit) and _attached(facts):
        yield seen(*says.split("=", 1), limit=limit)


def _attached(facts: Facts) -> bool:
    return facts.server is not None and facts.server.attached


@rule(
    "systemd-reload-missing",
    finds="no way for `systemctl reload`",
    happens="`systemctl reload` is refused, and what people do instead, `systemctl restart`, refuses connections from the "
    "end of the drain until the new workers are ready",
    moment="at the next release",
    cure="ExecReload={upgrade}",
    source="systemd.service(5), ExecReload= and Type=notify-reload",
    page=UNIT,
)
def reload_missing(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    if unit is not None and unit.type != "notify-reload" and not unit.get("ExecReload"):
        yield seen("ExecReload", "not set", upgrade=_upgrade(facts))


def _upgrade(facts: Facts) -> str:
    """The command that waits for the verdict, beside the program that the unit starts."""
    program = facts.command.program if facts.command is not None else ""
    directory = os.path.dirname(program)
    return f"{directory + '/' if directory else ''}gracehooks upgrade --pid $MAINPID"


@rule(
    "systemd-reload-blind",
    finds="an `ExecReload=` that sends a signal and does not wait",
    happens="`systemctl reload` succeeds at once, also when the new code then fails to start and is rolled back: a deploy "
    "script goes on as if it were live",
    moment="at each `systemctl reload`",
    cure="ExecReload={upgrade}",
    source="systemd.service(5), ExecReload=: «usually not a good choice, because this is an asynchronous operation»",
    page=UNIT,
)
def reload_blind(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    command = unit.get("ExecReload") if unit is not None else ""
    words = command.lstrip("@-:+!").split()
    if not words:
        return
    sends = any(os.path.basename(word) in ("kill", "pkill", "killall") for word in words)
    leaves = any(os.path.basename(word) == "gracehooks" for word in words) and "--no-wait" in words
    if sends or leaves:
        yield seen("ExecReload", command, upgrade=_upgrade(facts))


@rule(
    "systemd-restart",
    finds="no `Restart=`, or one that does not follow a SIGKILL",
    happens="the unit stays down",
    moment="when the master is killed (the OOM killer, a crash in C code)",
    cure="Restart=on-failure (or always)",
    source="systemd.service(5), Restart=: no is the default",
    page=UNIT,
)
def restart(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    if unit is not None and unit.get("Restart", "no").lower() in ("no", "on-success", "on-watchdog"):
        yield seen("Restart", unit.get("Restart") or "no (systemd's default)")


@rule(
    "systemd-oom-policy",
    finds="an `OOMPolicy=` that ends the whole unit for one worker",
    happens="systemd {verb} the whole unit, although gunicorn would have replaced the one worker",
    moment="when the kernel's OOM killer takes a worker or a job's child process",
    cure="OOMPolicy=continue",
    source="systemd.service(5), OOMPolicy=: DefaultOOMPolicy= is stop",
    page=UNIT,
)
def oom_policy(facts: Facts) -> Iterator[Seen]:
    unit = facts.unit
    if unit is None or unit.get("Delegate", "no").lower() not in ("no", "false", "off", "0"):
        return
    policy = unit.get("OOMPolicy", "stop").lower()
    if policy in ("stop", "kill"):
        says = unit.get("OOMPolicy") or "stop (systemd's default)"
        yield seen("OOMPolicy", says, verb="stops" if policy == "stop" else "kills")


@rule(
    "systemd-pidfile-differs",
    finds="a `PIDFile=` that is not gunicorn's pidfile",
    happens="systemd waits for a file that nobody writes, and ends the server as failed",
    moment="TimeoutStartSec after each start",
    cure="remove PIDFile= and use Type=notify; or pidfile = {wanted!r} in the configuration",
    source="systemd.service(5), PIDFile=",
)
def pidfile_differs(facts: Facts) -> Iterator[Seen]:
    unit, server = facts.unit, facts.server
    if unit is None or server is None or unit.type != "forking" or not unit.get("PIDFile"):
        return
    wanted = os.path.join("/run", unit.get("PIDFile"))
    own = os.path.join(server.chdir, server.pidfile) if server.pidfile else ""
    if _plain(own) != _plain(wanted):
        yield seen("PIDFile", f"{wanted}, and gunicorn's is {own or 'not set'}", wanted=wanted)


def _plain(path: str) -> str:
    path = os.path.normpath(path) if path else ""
    return "/run/" + path.removeprefix("/var/run/") if path.startswith("/var/run/") else path


@rule(
    "systemd-shell",
    finds="an `ExecStart=` through a shell that stays in front of the server",
    happens="the shell is the main process: it dies of the TERM, and systemd then kills the server with SIGKILL at once; "
    "under NotifyAccess=main the server's READY=1 is dropped, too, and the start times out",
    moment="at `systemctl stop`; at the start",
    cure="start gunicorn directly, or write `exec` before it",
    source="measured on systemd 252; dash 0.5.12 stays in front of its last command, bash does only in a pipeline",
)
def shell(facts: Facts) -> Iterator[Seen]:
    if facts.unit is not None and facts.unit.command.shell:
        yield seen("ExecStart", facts.unit.command.text)


@rule(
    "systemd-read-only",
    finds="a pidfile or `state_dir` that the unit's sandbox makes read-only or hides",
    happens="the {what} cannot be written there: {then}",
    moment="at the start",
    cure="{cure}",
    source="systemd.exec(5), ProtectSystem=, ProtectHome=, ReadWritePaths=",
)
def read_only(facts: Facts) -> Iterator[Seen]:
    unit, server = facts.unit, facts.server
    if unit is None or server is None:
        return
    places = {"pidfile": os.path.join(server.chdir, server.pidfile) if server.pidfile else ""}
    if facts.settings is not None and facts.settings.state_dir and _attached(facts):
        places["state_dir"] = os.path.join(server.chdir, facts.settings.state_dir)
    for what, path in places.items():
        by = _sealed(unit, path) if path else ""
        if by:
            directory = os.path.dirname(path) if what == "pidfile" else path
            then = "the server does not start" if what == "pidfile" else "no status, no history"
            cure = f"ReadWritePaths={directory}, or a path below a RuntimeDirectory= of the unit"
            yield seen(by, f"{what} = {path}", what=what, then=then, cure=cure)


def _sealed(unit: Unit, path: str) -> str:
    """The setting that makes the path read-only or hides it; empty where none does."""
    path = _plain(path)
    allowed = [*managed_directories(unit)]
    for line in unit.lists.get("ReadWritePaths", ()):
        allowed += [each.lstrip("-+") for each in line.split()]
    if unit.get("PrivateTmp").lower() in ("yes", "true", "on", "1"):
        allowed += ["/tmp", "/var/tmp"]
    if any(path.startswith(each.rstrip("/") + "/") or path == each for each in allowed):
        return ""
    system = unit.get("ProtectSystem", "no").lower()
    if unit.get("DynamicUser", "no").lower() in ("yes", "true", "on", "1"):
        system = "strict"
    home = unit.get("ProtectHome", "no").lower()
    if home in ("yes", "true", "on", "1", "read-only", "tmpfs") and path.startswith(("/home/", "/root/", "/run/user/")):
        return f"ProtectHome={home}"
    if system == "strict" and not path.startswith(("/dev/", "/proc/", "/sys/")):
        return "ProtectSystem=strict" if unit.get("ProtectSystem") else "DynamicUser=yes"
    roots = {"yes": ("/usr/", "/boot/", "/efi/"), "full": ("/usr/", "/boot/", "/efi/", "/etc/")}
    roots.update(dict.fromkeys(("true", "on", "1"), roots["yes"]))
    return f"ProtectSystem={system}" if path.startswith(roots.get(system, ("\0",))) else ""


@rule(
    "systemd-private-tmp",
    finds="`PrivateTmp=` (or `DynamicUser=`) with neither pidfile nor `state_dir`",
    happens="the server keeps its state below /tmp, which is the unit's own: commands outside the unit find no server",
    moment="at each `gracehooks upgrade`, `status` or `history` in a shell or a deploy script",
    cure="{cure}",
    source="systemd.exec(5), PrivateTmp=; gracehooks/upgrade/history.py, default_state_dir()",
    page=UNIT,
)
def private_tmp(facts: Facts) -> Iterator[Seen]:
    unit, server, settings = facts.unit, facts.server, facts.settings
    if unit is None or server is None or settings is None or not _attached(facts):
        return
    if server.pidfile or settings.state_dir or facts.environ.get("XDG_RUNTIME_DIR"):
        return
    for key in ("PrivateTmp", "DynamicUser"):
        if unit.get(key).lower() in ("yes", "true", "on", "1"):
            own = next((each for each in managed_directories(unit) if each.startswith("/run/")), "")
            name = unit.name.partition(".")[0]
            cure = f"pidfile = {own or '/run/' + name}/gunicorn.pid" + ("" if own else f", and RuntimeDirectory={name}")
            yield seen(key, unit.get(key), cure=cure)
            return


@rule(
    "systemd-runtime-directory",
    finds="a `RuntimeDirectory=` with the state in it, and no `RuntimeDirectoryPreserve=`",
    happens="systemd removes the directory, and the history of upgrades, reloads and stops with it",
    moment="at each stop and restart",
    cure="RuntimeDirectoryPreserve=yes (or state_dir below a StateDirectory=)",
    source="systemd.exec(5), RuntimeDirectoryPreserve=: no is the default",
    page=UNIT,
    advice=True,
)
def runtime_directory(facts: Facts) -> Iterator[Seen]:
    unit, server = facts.unit, facts.server
    if unit is None or server is None or not _attached(facts) or unit.get("RuntimeDirectoryPreserve", "no") != "no":
        return
    state = (facts.settings.state_dir if facts.settings is not None else None) or server.pidfile
    path = _plain(os.path.join(server.chdir, state)) if state else ""
    for each in managed_directories(unit):
        if each.startswith("/run/") and path.startswith(each + "/"):
            yield seen("RuntimeDirectory", each.removeprefix("/run/"))
            return


@rule(
    "systemd-start-timeout",
    finds="a `TimeoutStartSec=` shorter than `ready_timeout`, with `preload_app`",
    happens="the application is loaded in the master before that can ask systemd for more time: a load that takes longer is "
    "ended as failed, although ready_timeout allows {ready:g} s",
    moment="{limit:g} s after the start",
    cure="TimeoutStartSec={wanted:g}, or no preload_app",
    source="systemd.service(5), TimeoutStartSec= and EXTEND_TIMEOUT_USEC=; gunicorn/arbiter.py, setup()",
    page=PAGE,
)
def start_timeout(facts: Facts) -> Iterator[Seen]:
    unit, settings, server = facts.unit, facts.settings, facts.server
    if unit is None or settings is None or server is None or not server.attached or unit.type not in NOTIFY:
        return
    says, limit = _limit(unit, "TimeoutStartSec")
    ready = settings.ready_timeout
    if server.preload_app and limit < ready:
        yield seen(*says.split("=", 1), limit=limit, ready=ready, wanted=ready + 10)
