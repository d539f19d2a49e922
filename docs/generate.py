"""Writes what the documentation takes from the code: `python docs/generate.py`, or `--check` to see whether it is current.

A page marks the place: everything between `<!-- generated: NAME -->` and `<!-- end -->` is replaced. The tests run the
check, so a setting, an event or an exit code cannot change without its page.
"""

from __future__ import annotations

import argparse
import inspect
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from gracehooks import check, cli, demo, events, jobs, logs, settings
from gracehooks.gunicorn.arbiter import GracefulArbiter
from gracehooks.jobs.infrastructure import PACKAGES
from gracehooks.upgrade import machine

HERE = Path(__file__).resolve().parent
PLACE = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

#: What each setting means; a setting without its line fails the generation.
MEANINGS = {
    "ready_timeout": "A successor whose workers are not all ready by then is rolled back.",
    "ready_path": "Asked of the application inside each new worker (a WSGI or ASGI call, no socket) before the worker "
    "counts as ready. An answer of 400 or more, or an exception, is a failed boot.",
    "probation": "How long old and new serve side by side once all is ready; a new worker that dies in it rolls the "
    "upgrade back.",
    "lame_duck": "On a stop, not on an upgrade: readiness answers 503 while requests are still accepted.",
    "drain_timeout": "How long requests in flight may take, from the moment that accepting ends.",
    "job_timeout": "How long background jobs may take, from the moment that the last request ends.",
    "job_grace": "How long jobs run on undisturbed before they are told to stop; half of `job_timeout` unless set.",
    "cleanup_timeout": "How long `gracehooks.on_shutdown` callbacks and the lifespan shutdown may take.",
    "max_generations": "How many old generations may still be draining when the next upgrade starts.",
    "state_dir": "Where `status.json` and `history.jsonl` are kept: beside the pidfile unless set, else in a private "
    "directory of the user.",
    "on_event": "Called in the master with every [event](events.md).",
    "track": 'Which jobs are known by themselves: those born in a request, only those named (`"explicit"`), or none.',
}

#: What a signal to the master does; the handlers are checked against the arbiter.
SIGNALS = {
    "USR2": ("usr2", "Upgrade: start a new generation beside this one, verify it, hand over, leave."),
    "HUP": (
        "hup",
        "Verified reload: read the configuration again, start new workers, verify them, retire the old ones.",
    ),
    "TERM": (
        "term",
        "Bounded graceful stop. During a stop it changes nothing; during an upgrade that is not yet committed "
        "it ends both generations.",
    ),
    "INT": ("int", "The hammer: force now, with the report of what was lost."),
    "QUIT": ("quit", "The same as INT."),
    "TTIN": (None, "One worker more. The number outlives an upgrade."),
    "TTOU": (None, "One worker fewer. The number outlives an upgrade."),
    "USR1": (None, "Reopen the log files."),
    "WINCH": (None, "As gunicorn documents it: a daemon's workers leave."),
}


def settings_table() -> str:
    default = settings.Settings()
    rows = ["| setting | environment | default | takes | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in fields(settings.Settings):
        value = getattr(default, field.name)
        shown = {"job_grace": "half of `job_timeout`", "state_dir": "beside the pidfile"}.get(field.name)
        if shown is None:
            shown = "none" if value is None else f"`{value:g}`" if isinstance(value, (int, float)) else f'`"{value}"`'
        variable = "–" if field.name == "on_event" else f"`{settings.ENVIRONMENT_PREFIX}{field.name.upper()}`"
        rows.append(
            f"| `{field.name}` | {variable} | {shown} | {settings.RANGES[field.name]} | {MEANINGS[field.name]} |"
        )
    return "\n".join(rows)


def events_list() -> str:
    parts = []
    for name in sorted(events.__all__):
        event = getattr(events, name)
        if not (inspect.isclass(event) and issubclass(event, events.Event)) or event is events.Event:
            continue
        own = [field.name for field in fields(event) if field.name not in ("pid", "generation")]
        parts.append(f"### {name}\n\n{inspect.getdoc(event)}\n")
        parts.append(f"Facts: {', '.join(f'`{each}`' for each in own) or 'none of its own'}.\n")
        if name in logs.LINES:
            level, line = logs.LINES[name]
            parts.append(f"Log line ({logs.logging.getLevelName(level).lower()}): `gracehooks: {line}`\n")
    return "\n".join(parts).rstrip()


def signals_table() -> str:
    rows = ["| signal | effect |", "| --- | --- |"]
    for name, (handler, effect) in SIGNALS.items():
        if handler is not None and not hasattr(GracefulArbiter, f"handle_{handler}"):
            raise SystemExit(f"the arbiter does not handle {name} any more")
        rows.append(f"| `{name}` | {effect} |")
    return "\n".join(rows)


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    rows = []
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)) or action.help == argparse.SUPPRESS:
            continue
        names = ", ".join(f"`{each}`" for each in action.option_strings) or f"`{action.metavar or action.dest.upper()}`"
        metavar = (
            "" if action.nargs == 0 or not action.option_strings else f" *{action.metavar or action.dest.upper()}*"
        )
        rows.append(f"| {names}{metavar} | {(action.help or '').replace('|', '/')} |")
    return ["| option | meaning |", "| --- | --- |", *rows] if rows else []


def cli_reference() -> str:
    (commands,) = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    parts = []
    for name, meaning in cli.COMMANDS.items():
        parser = {"demo": demo.parser, "check": check.parser}.get(name, lambda name=name: commands.choices[name])()
        parts += [f"### gracehooks {name}", "", f"{meaning[0].upper()}{meaning[1:]}.", ""]
        options = options_of(parser)
        if options:
            parts += [*options, ""]
        if name == "run":
            parts += ["`gracehooks run [--] COMMAND [ARGUMENT …]`, where COMMAND ends in a gunicorn master.", ""]
    return "\n".join(parts).rstrip()


def exits_table() -> str:
    rows = ["| command | exit code | meaning |", "| --- | --- | --- |"]
    for command, codes in cli.EXITS.items():
        rows += [
            f"| `{command}` | {'the server’s' if command == 'run' else code} | {text} |" for code, text in codes.items()
        ]
    return "\n".join(rows)


def upgrade_diagram() -> str:
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, happened), (after, _) in machine.TABLE.items():
        arrows.setdefault((state.name, after.name), []).append(happened.value)
    lines = [
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> SERVING",
        "    SERVING --> BOOTING: USR2 or HUP, preflight passed",
    ]
    for (state, after), reasons in arrows.items():
        lines.append(f"    {state} --> {after}: {'<br>'.join(reasons)}")
    return "\n".join([*lines, "    RETIRED --> [*]", "```"])


def _signature(function: Callable[..., object]) -> str:
    """The parameters without their types, which the table has no room for."""
    plain = [each.replace(annotation=each.empty) for each in inspect.signature(function).parameters.values()]
    return (
        str(inspect.Signature([each for each in plain if each.name != "self"]))
        .replace(" = ", "=")
        .replace(repr(signal.SIGTERM), "SIGTERM")
    )


def _row(name: str, thing: object) -> str:
    doc = " ".join((inspect.getdoc(thing) or "").split()).replace("|", "/")
    return f"| `{name}` | {doc} |"


def jobs_table() -> str:
    rows = ["| name | |", "| --- | --- |"]
    for name in sorted(jobs.__all__, key=lambda name: (name[0].isupper(), name)):
        thing = getattr(jobs, name)
        callable_one = inspect.isfunction(thing) or name == "Executor"
        shown = _signature(thing.__init__ if inspect.isclass(thing) else thing) if callable_one else ""
        rows.append(_row(name + (shown or "()" * (name == "shield")), thing))
    return "\n".join(rows)


def token_table() -> str:
    rows = ["| name | |", "| --- | --- |"]
    for name in ("is_set", "wait", "raise_if_set", "remaining"):
        method = getattr(jobs.Token, name)
        rows.append(_row(name + _signature(method), method))
    return "\n".join(rows)


def infrastructure_list() -> str:
    return ", ".join(f"`{each}`" for each in sorted(PACKAGES, key=str.lower)) + "."


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "events": events_list,
    "signals": signals_table,
    "cli": cli_reference,
    "exits": exits_table,
    "upgrade-diagram": upgrade_diagram,
    "jobs": jobs_table,
    "jobs-token": token_table,
    "jobs-infrastructure": infrastructure_list,
}


def pages() -> list[Path]:
    return sorted([*HERE.rglob("*.md"), HERE.parent / "README.md"])


def current(text: str) -> str:
    """The page as it should be."""
    return PLACE.sub(lambda found: f"{found[1]}\n{GENERATED[found[2]]()}\n\n{found[3]}", text)


def main(argv: list[str]) -> int:
    stale = []
    for page in pages():
        text = page.read_text()
        wanted = current(text)
        if text != wanted:
            stale.append(page)
            if "--check" not in argv:
                page.write_text(wanted)
    for page in stale:
        print(f"{'stale' if '--check' in argv else 'written'}: {page.relative_to(HERE.parent)}")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
