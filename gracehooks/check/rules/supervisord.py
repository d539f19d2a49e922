"""Traps in a supervisord section (supervisord.org/configuration.html and supervisor/options.py, process.py)."""

from __future__ import annotations

from collections.abc import Iterator

from gracehooks.check.facts import Facts
from gracehooks.check.rules import Seen, rule, seen

PAGE = "docs/how-to/timeouts.md#supervisord"


@rule(
    "supervisord-no-anchor",
    finds="a `command=` without `gracehooks run`",
    happens="supervisord follows one pid for ever: it would see its process exit when the old master leaves, and start a "
    "duplicate beside the new one; so gracehooks refuses the upgrade",
    moment="at the first upgrade",
    cure="command=gracehooks run -- {command}",
    source="supervisor/process.py, finish(); gracehooks/gunicorn/successor.py, preflight()",
)
def no_anchor(facts: Facts) -> Iterator[Seen]:
    program = facts.program
    if program is not None and program.command.args is not None and not program.command.anchored:
        yield seen("command", program.command.text, command=program.command.text)


@rule(
    "supervisord-stop-wait",
    finds="`stopwaitsecs` shorter than the stop budget",
    happens="supervisord sends SIGKILL: requests and jobs in flight are lost, and nothing is reported",
    moment="{limit} s after `supervisorctl stop` or `restart` began; the stop may last {budget} s",
    cure="stopwaitsecs={recommended}",
    source="supervisor/process.py, transition(): SIGKILL after stopwaitsecs, 10 by default",
    page=PAGE,
)
def stop_wait(facts: Facts) -> Iterator[Seen]:
    program = facts.program
    if program is None or facts.settings is None:
        return
    text = program.values.get("stopwaitsecs", "").strip()
    try:
        limit = int(text or 10)
    except ValueError:
        return
    if limit < facts.needed:
        yield seen("stopwaitsecs", text or "10 (supervisord's default)", limit=limit)


@rule(
    "supervisord-stop-signal",
    finds="a `stopsignal` other than TERM",
    happens="{happens}",
    moment="at `supervisorctl stop` and `restart`",
    cure="remove stopsignal; the default, TERM, is the graceful stop",
    source="supervisord's documentation, stopsignal; gunicorn's signals",
)
def stop_signal(facts: Facts) -> Iterator[Seen]:
    program = facts.program
    given = program.values.get("stopsignal", "").strip().upper() if program is not None else ""
    name = given.removeprefix("SIG")
    if name in ("", "TERM", "15"):
        return
    if name in ("INT", "QUIT", "2", "3"):
        happens = "the server drops every request and job in flight and reports them as lost"
    elif name in ("KILL", "9"):
        happens = "the server is killed without a word: requests and jobs in flight are lost"
    else:
        happens = "the server does something else than stop, and is killed after stopwaitsecs"
    yield seen("stopsignal", given, happens=happens)


@rule(
    "supervisord-shell",
    finds="a `command=` through a shell that stays in front of the server",
    happens="supervisord signals the shell, which dies of it: the server runs on with nobody to stop it and keeps the port",
    moment="at `supervisorctl stop` and `restart`",
    cure="start it directly, or write `exec` before it",
    source="measured: dash 0.5.12 stays in front of its last command, bash does only in a pipeline",
)
def shell(facts: Facts) -> Iterator[Seen]:
    if facts.program is not None and facts.program.command.shell:
        yield seen("command", facts.program.command.text)


@rule(
    "supervisord-kill-group",
    finds="`stopasgroup=true` with `killasgroup=false`",
    happens="supervisord refuses the whole file: «Cannot set stopasgroup=true and killasgroup=false»",
    moment="at `supervisorctl reread` and at its own start",
    cure="remove killasgroup, which follows stopasgroup",
    source="supervisor/options.py, _processes_from_section()",
)
def kill_group(facts: Facts) -> Iterator[Seen]:
    program = facts.program
    if program is not None and program.flag("stopasgroup") and not program.flag("killasgroup", default=True):
        yield seen("killasgroup", "false")


@rule(
    "supervisord-numprocs",
    finds="`numprocs` above 1 with one pidfile or `state_dir` for all of them",
    happens="{happens}",
    moment="{moment}",
    cure="numprocs=1 and more workers; or a pidfile and a bind of its own for each: command=… --pid …/%(process_num)s.pid",
    source="gunicorn/pidfile.py, validate(); supervisord's documentation, numprocs",
)
def numprocs(facts: Facts) -> Iterator[Seen]:
    program, server = facts.program, facts.server
    if program is None or server is None or not program.values.get("numprocs", "1").strip().isdigit():
        return
    many = int(program.values.get("numprocs", "1"))
    if many < 2:
        return
    state_dir = facts.settings.state_dir if facts.settings is not None and server.attached else None
    if server.pidfile and server.pidfile not in program.numbered:
        happens = "the first writes the pidfile, and the others do not start: «Already running on PID …»"
        yield seen("numprocs", f"{many}, with pidfile = {server.pidfile}", happens=happens, moment="at the start")
    elif state_dir and state_dir not in program.numbered:
        happens = "they write one status.json: `gracehooks upgrade` and `status` meet any of them"
        yield seen("numprocs", f"{many}, with state_dir = {state_dir}", happens=happens, moment="at each command")


@rule(
    "supervisord-restart",
    finds="`autorestart=false`",
    happens="the program stays down",
    moment="when the server ends by itself: the OOM killer, a crash",
    cure="autorestart=true",
    source="supervisord's documentation, autorestart",
)
def restart(facts: Facts) -> Iterator[Seen]:
    program = facts.program
    text = program.values.get("autorestart", "").strip().lower() if program is not None else ""
    if text in ("false", "no", "off", "0", "n"):
        yield seen("autorestart", text)
