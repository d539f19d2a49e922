"""The command line: `gracehooks upgrade`, `reload`, `stop`, `status`, `history`, `check`, `run`, `demo`.

A command sends one signal and then reads the files that the masters keep, until they hold a verdict; it is no part of the
upgrade, and killing it changes nothing. Live progress goes to standard error, where that is a terminal; the result goes to
standard output, for people or, with `--json`, as one object. Exit codes are in `EXITS` and are relied upon.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gracehooks import __version__, processes
from gracehooks.deadline import Deadline
from gracehooks.instances import Instance, NoSuchInstance, find

__all__ = ["COMMANDS", "EXITS", "main", "parser"]

POLL = 0.05
#: Where the old master was killed, its successor takes over once it has loaded its configuration: so long it may take.
GONE_FOR = 10.0
#: How often it is looked whether a verdict can be written at all, in seconds.
ROOM = 2.0

#: command → {exit code: meaning}
EXITS: dict[str, dict[int, str]] = {
    "upgrade": {
        0: "the new generation serves",
        1: "rolled back: the old generation serves on, and the reason is printed",
        2: "wrong usage, or no such instance",
        3: "refused, and the reason is printed: one is under way, too many generations are draining, …",
        4: "no verdict in time",
    },
    "reload": {
        0: "the new workers serve",
        1: "rolled back: the old workers serve on, and the reason is printed",
        2: "wrong usage, or no such instance",
        3: "refused, and the reason is printed",
        4: "no verdict in time",
    },
    "stop": {
        0: "stopped, nothing was lost",
        1: "stopped, and what was lost is printed",
        2: "wrong usage, or no such instance",
        4: "it had not stopped in time, or ended without a report",
    },
    "status": {0: "the instance serves", 1: "it does not", 2: "wrong usage, or no such instance"},
    "history": {0: "printed", 2: "wrong usage, or no such instance"},
    "check": {0: "clean", 1: "findings, each with its cure", 2: "wrong usage, or a file that cannot be read"},
    "run": {0: "the server's own exit code, 128 + n where signal n ended it"},
    "demo": {0: "nothing was lost", 1: "something was lost"},
}


# -- words -------------------------------------------------------------------------------------------------------------
def seconds_in_words(seconds: float) -> str:
    """ "0.41 s", "12 s", "3 min", "5 h", "2 days": as much as a person needs."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def phases_in_words(phases: Mapping[str, float]) -> str:
    """ "booting 0.41 s, probation 2.00 s"."""
    return ", ".join(f"{name} {value:.2f} s" for name, value in phases.items())


def lost_in_lines(lost: Mapping[str, Any] | None) -> list[str]:
    """One line for each request and job that was lost, with its stack where the worker could tell it."""
    lines = []
    for each in (lost or {}).get("requests") or ():
        lines.append(f"lost request {each.get('method', '?')} {each.get('path', '?')} {_how(each)}")
        lines += _stack(each)
    for each in (lost or {}).get("jobs") or ():
        lines.append(f"lost job {each.get('id', '?')} {each.get('name', '?')} ({each.get('kind', '?')}) {_how(each)}")
        lines += _stack(each)
    return lines


def _how(each: Mapping[str, Any]) -> str:
    reason = f": {each['reason']}" if each.get("reason") else ""
    return f"after {seconds_in_words(float(each.get('age') or 0))}{reason}"


def _stack(each: Mapping[str, Any]) -> list[str]:
    where = each.get("where") or ()
    return [f"    {line}" for line in (where.splitlines() if isinstance(where, str) else where)]


def number_lost(record: Mapping[str, Any]) -> int:
    """How many requests and jobs the record says were lost."""
    lost = record.get("lost") or {}
    return len(lost.get("requests") or ()) + len(lost.get("jobs") or ())


def plural(count: int, noun: str) -> str:
    """ "1 worker", "2 workers"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


# -- progress and results ----------------------------------------------------------------------------------------------
class Progress:
    """One line that is written over, where standard error is a terminal; nothing elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._live = not quiet and sys.stderr.isatty()
        self._last = ""

    def show(self, text: str) -> None:
        """Show `text` in place of what was there."""
        if self._live and text != self._last:
            self._last = text
            width = _width()
            sys.stderr.write("\r\x1b[K" + text[: width - 1])
            sys.stderr.flush()

    def clear(self) -> None:
        """Leave the line empty, for the result."""
        if self._live and self._last:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._last = ""


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


@dataclass(frozen=True)
class Result:
    """How a command ended: the exit code, one line for people, and the facts for `--json`."""

    code: int
    line: str
    facts: Mapping[str, Any]
    more: Sequence[str] = ()


def tell(result: Result, as_json: bool) -> int:
    """Print the result, and give the exit code."""
    if as_json:
        print(json.dumps({**result.facts, "exit_code": result.code}))
    else:
        for line in (result.line, *result.more):
            if line:
                print(line, file=sys.stderr if result.code == 2 else sys.stdout)
    return result.code


# -- upgrade and reload ------------------------------------------------------------------------------------------------
@dataclass
class Watch:
    """Waits for the verdict on an upgrade or a reload that is asked for now; made just before the signal is sent."""

    instance: Instance
    kind: str
    status: dict[str, Any]
    since: int
    known: frozenset[str]

    @classmethod
    def begin(cls, instance: Instance, kind: str, status: dict[str, Any]) -> Watch:
        """Remember what is there already, so that only what comes next is ours."""
        known = {str(record.get("id")) for record in instance.history()}
        known.add(str((status.get("upgrade") or {}).get("id", "")))
        return cls(instance, kind, status, instance.history_size(), frozenset(known))

    def look(self) -> tuple[str, dict[str, Any]]:
        """("completed" | "rolled_back" | "refused" | "", the facts so far)."""
        # The history first: who is refused beside ours is in it only when ours is in the status.
        records = [each for each in self.instance.history(self.since) if str(each.get("id")) not in self.known]
        now = self.instance.status()
        current: dict[str, Any] = now.get("upgrade") or {}
        mine: dict[str, Any] = {} if str(current.get("id", "")) in self.known else current
        for record in records:
            # Once ours is known by its id, a refusal is somebody else's.
            if record.get("kind") in ("upgrade", "reload") and (not mine or record.get("id") == mine.get("id")):
                return str(record.get("outcome")), {**record, "generation": now.get("generation")}
        facts = {**mine, "generation": now.get("generation")}
        if mine.get("state") in ("completed", "rolled_back"):
            return str(mine["state"]), facts
        return "", facts

    def settled(self, id: str) -> dict[str, Any]:
        """The history record of `id` in its final form: with what the old generation lost; empty while it drains."""
        for record in self.instance.history(self.since)[::-1]:
            if record.get("id") == id:
                return record
        return {}

    def somebody_runs(self, pid: int, start: int) -> bool:
        """Whether a master that could still give a verdict runs: the one that was asked, its successor, or a later one."""
        return processes.alive(pid, start) or self.instance.master() is not None


def ask(instance: Instance, args: argparse.Namespace, kind: str, signal_number: int) -> Result:
    """Ask for an upgrade or a reload and wait for the verdict."""
    status = instance.status()
    master = instance.master(status)
    if master is None:
        return no_master(instance, kind)
    pid, start = master
    if args.no_wait:
        failure = send(pid, signal_number)
        return failure or Result(0, f"{kind} asked of master {pid}", {"kind": kind, "outcome": "asked", "reason": ""})
    try:
        with instance.alone() as alone:
            if not alone:
                reason = "another command waits for a verdict of this instance"
                return Result(3, f"refused: {reason}", {"kind": kind, "outcome": "refused", "reason": reason})
            reason = no_room(instance)
            if reason:
                return Result(3, f"{kind} refused: {reason}", facts_of(kind, "refused", reason, {}))
            watch = Watch.begin(instance, kind, status)
            failure = send(pid, signal_number)
            if failure:
                return failure
            result, id = verdict(watch, args, pid, start)
    except OSError as error:
        return Result(2, f"{instance.directory}: {error}", {"kind": kind, "outcome": "error", "reason": str(error)})
    if result.code == 0 and args.drained:
        return drained(watch, args, result, id)
    return result


def verdict(watch: Watch, args: argparse.Namespace, pid: int, start: int) -> tuple[Result, str]:
    """Wait for the verdict, showing progress; the result, and the id of what it is about."""
    kind, began = watch.kind, time.monotonic()
    deadline = Deadline.after(args.timeout)
    gone: Deadline | None = None
    room = Deadline.after(ROOM)
    progress = Progress(args.json)
    facts: dict[str, Any] = {}
    try:
        while True:
            outcome, facts = watch.look()
            if outcome:
                break
            progress.show(progress_line(kind, facts, time.monotonic() - began))
            if room.passed:
                room = Deadline.after(ROOM)
                reason = no_room(watch.instance)
                if reason:
                    return Result(4, f"{kind}: {reason}", facts_of(kind, "none", reason, facts)), ""
            if watch.somebody_runs(pid, start):
                gone = None
            elif gone is None:
                gone = Deadline.after(GONE_FOR)
            elif gone.passed:
                reason = "the server has ended without a verdict"
                return Result(4, f"{kind}: {reason}", facts_of(kind, "none", reason, facts)), ""
            if deadline.passed:
                reason = f"no verdict within {args.timeout:g} s ({facts.get('state', 'not begun')})"
                return Result(4, f"{kind}: {reason}", facts_of(kind, "none", reason, facts)), ""
            time.sleep(POLL)
    finally:
        progress.clear()
    reason, id = str(facts.get("reason") or ""), str(facts.get("id", ""))
    found = facts_of(kind, outcome, reason, facts)
    if outcome == "completed":
        line = f"{kind} completed: generation {facts.get('generation', '?')} serves"
        phases = phases_in_words({k: v for k, v in (facts.get("phases") or {}).items() if k != "retiring"})
        return Result(0, line + (f" ({phases})" if phases else ""), found), id
    if outcome == "refused":
        return Result(3, f"{kind} refused: {reason}", found), id
    return Result(1, f"{kind} rolled back, the old generation serves on: {reason}", found), id


def no_room(instance: Instance) -> str:
    """Why no verdict can be told, where the masters cannot write their files; else empty."""
    try:
        instance.needs_room()
    except OSError as error:
        return (
            f"{instance.directory} cannot be written ({error.strerror}), so no verdict can be told; the server goes on, "
            "and its log says what happens. Make room, then try again"
        )
    return ""


def facts_of(kind: str, outcome: str, reason: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `--json` says of an upgrade or a reload."""
    return {
        "id": facts.get("id", ""),
        "kind": kind,
        "outcome": outcome,
        "reason": reason,
        "phases": facts.get("phases") or {},
        "generation": facts.get("generation"),
        **({"lost": facts["lost"]} if "lost" in facts else {}),
    }


def progress_line(kind: str, facts: Mapping[str, Any], seconds: float) -> str:
    """What a person sees while waiting."""
    state = facts.get("state")
    if not state:
        return f"{kind}: asked, {seconds:.1f} s"
    ready = f", {facts.get('workers_ready', 0)} of {facts['workers']} workers ready" if facts.get("workers") else ""
    return f"{kind}: {str(state).replace('_', ' ')}{ready}, {seconds:.1f} s"


def drained(watch: Watch, args: argparse.Namespace, result: Result, id: str) -> Result:
    """After the verdict: wait until the old generation has left too, and say what it lost."""
    began, deadline = time.monotonic(), Deadline.after(args.timeout)
    progress = Progress(args.json)
    try:
        while not (record := watch.settled(id)):
            if deadline.passed:
                more = [f"the old generation had not left within {args.timeout:g} s"]
                return Result(4, result.line, {**result.facts, "reason": more[0]}, more)
            if watch.instance.master() is None and not watch.settled(id):
                more = ["the server has ended before the old generation's report was written"]
                return Result(4, result.line, {**result.facts, "reason": more[0]}, more)
            old = watch.instance.status().get("draining") or []
            workers = sum(int(each.get("workers") or 0) for each in old)
            left = f", {plural(workers, 'worker')} left" if workers else ""
            progress.show(f"{watch.kind}: completed; the old generation drains{left}, {time.monotonic() - began:.1f} s")
            time.sleep(POLL)
    finally:
        progress.clear()
    facts = {**result.facts, "phases": record.get("phases") or {}, "lost": record.get("lost") or {}}
    if record.get("outcome") != "completed":
        reason = str(record.get("reason") or "")
        facts |= {"outcome": record.get("outcome"), "reason": reason}
        return Result(1, f"{watch.kind} rolled back, the old generation serves again: {reason}", facts)
    lines = lost_in_lines(record.get("lost"))
    took = float((record.get("phases") or {}).get("retiring") or 0.0)
    return Result(
        0, result.line, facts, [f"the old generation left after {took:.2f} s, {len(lines) or 'nothing'} lost", *lines]
    )


def send(pid: int, signal_number: int) -> Result | None:
    """Send the signal; a result only where that failed."""
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return Result(2, f"master {pid} has just ended", {"outcome": "error", "reason": "the master has ended"})
    except PermissionError:
        reason = f"you may not signal master {pid}; it runs for another user"
        return Result(2, reason, {"outcome": "error", "reason": reason})
    return None


def no_master(instance: Instance, kind: str) -> Result:
    """What to say where the files are there and the master is not."""
    reason = f"no master is running for {instance.directory}"
    return Result(2, reason, {"kind": kind, "outcome": "error", "reason": reason})


# -- stop --------------------------------------------------------------------------------------------------------------
def stop(instance: Instance, args: argparse.Namespace) -> Result:
    """TERM, and wait for the end; the loss report."""
    status = instance.status()
    master = instance.master(status)
    if master is None:
        return no_master(instance, "stop")
    pid, start = master
    since, began = instance.history_size(), time.monotonic()
    failure = send(pid, signal.SIGTERM)
    if failure:
        return failure
    budget = float(status.get("stop_budget") or 0.0)
    deadline = Deadline.after(args.timeout if args.timeout is not None else max(120.0, budget + 30.0))
    progress = Progress(args.json)
    try:
        while processes.alive(pid, start):
            if deadline.passed:
                reason = f"master {pid} had not ended after {time.monotonic() - began:.0f} s"
                return Result(4, reason, {"kind": "stop", "outcome": "none", "reason": reason})
            progress.show(stop_line(instance.status(), time.monotonic() - began, budget))
            time.sleep(POLL)
    finally:
        progress.clear()
    records = [each for each in instance.history(since) if each.get("kind") == "stop"]
    if not records:
        reason = f"master {pid} has ended without a report"
        return Result(4, reason, {"kind": "stop", "outcome": "none", "reason": reason})
    record = records[-1]
    lines, count = lost_in_lines(record.get("lost")), number_lost(record)
    took = float((record.get("phases") or {}).get("stopping") or time.monotonic() - began)
    forced = ", by force" if record.get("outcome") == "forced" else ""
    line = f"stopped after {took:.2f} s{forced}, {count or 'nothing'} lost"
    answered, jobs = record.get("requests_answered"), jobs_in_words(record.get("jobs") or {})
    summary = f"{answered} requests answered{jobs}" if answered else jobs.removeprefix("; ")
    return Result(1 if count else 0, line, record, [*lines, summary])


def jobs_in_words(jobs: Mapping[str, int]) -> str:
    """ "; 7 jobs: 6 succeeded, 1 abandoned", or nothing where there was none."""
    if not jobs.get("accepted") and not jobs.get("rejected"):
        return ""
    kinds = ", ".join(f"{count} {name}" for name, count in jobs.items() if count and name != "accepted")
    return f"; {plural(jobs.get('accepted', 0), 'job')}" + (f": {kinds}" if kinds else "")


def stop_line(status: Mapping[str, Any], seconds: float, budget: float) -> str:
    """What a person sees while waiting for the end."""
    workers = status.get("workers") or []
    requests, jobs = (sum(_number(each, what) for each in workers) for what in ("requests", "jobs"))
    bound = f" of at most {budget:g} s" if budget else ""
    return (
        f"stop: {str(status.get('state', 'stopping')).replace('_', ' ')}, {plural(len(workers), 'worker')}, "
        f"{plural(requests, 'request')}, {plural(jobs, 'job')}, {seconds:.1f} s{bound}"
    )


# -- status and history ------------------------------------------------------------------------------------------------
def status(instance: Instance) -> Result:
    """What the instance does now."""
    found = instance.status()
    running = instance.master(found) is not None
    state = str(found.get("state", "unknown")) if running or found.get("state") == "stopped" else "gone"
    facts = {**found, "state": state}
    passed = max(0.0, time.time() - float(found.get("at") or time.time())) if running else 0.0
    lines = []
    for worker in found.get("workers") or () if running else ():
        busy = [
            _busy(worker, "request", lambda each: f"{each['method']} {each['path']}", passed),
            _busy(worker, "job", lambda each: f"{each['name']} ({each['kind']})", passed),
        ]
        lines.append("  ".join([f"  worker {worker['pid']}", worker["phase"].replace("_", " "), *filter(None, busy)]))
    lines += [
        f"  generation {each['generation']} (master {each['master_pid']}) is still draining, "
        f"{plural(int(each.get('workers') or 0), 'worker')}"
        for each in (found.get("draining") or () if running else ())
    ]
    lines.append(_last(found.get("upgrade") or {}))
    line = (
        f"generation {found.get('generation', '?')}, master {found.get('master_pid', '?')}: {state.replace('_', ' ')}"
    )
    return Result(0 if running and state == "serving" else 1, line, facts, lines)


def _number(worker: Mapping[str, Any], what: str) -> int:
    return int(worker.get(f"{what}_in_flight") or len(worker.get(what) or ()))


def _busy(worker: Mapping[str, Any], noun: str, name: Callable[[Any], str], passed: float) -> str:
    found = worker.get(noun + "s")
    if not found:
        return ""
    oldest = max(found, key=lambda each: float(each["age"]))
    age = seconds_in_words(float(oldest["age"]) + passed)
    return f"{plural(_number(worker, noun + 's'), noun)} (oldest {name(oldest)}, {age})"


def _last(upgrade: Mapping[str, Any]) -> str:
    if not upgrade.get("id"):
        return ""
    ago = max(0.0, time.time() - float(upgrade.get("started_at") or 0.0))
    reason = f": {upgrade['reason']}" if upgrade.get("reason") else ""
    phases = f" ({phases_in_words(upgrade['phases'])})" if upgrade.get("phases") else ""
    state = str(upgrade.get("state", "?")).replace("_", " ")
    return f"  last {upgrade.get('kind', 'upgrade')}: {state}, begun {seconds_in_words(ago)} ago{phases}{reason}"


def history(instance: Instance, args: argparse.Namespace) -> int:
    """Past upgrades, reloads and stops, and what workers lost between them; oldest first."""
    records = instance.history()
    if args.last is not None:
        records = records[-args.last :] if args.last else []
    if args.json:
        print(json.dumps(records))
        return 0
    for record in records:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(record.get("at") or 0)))
        count = number_lost(record)
        parts = [when, f"{record.get('kind', '?'):7}", f"{record.get('outcome', '?').replace('_', ' '):11}"]
        details = [
            phases_in_words(record.get("phases") or {}),
            str(record.get("reason") or ""),
            f"lost {count}" if count else ("" if record.get("outcome") == "refused" else "nothing lost"),
        ]
        print("  ".join([*parts, "; ".join(filter(None, details))]))
    if not records:
        print("no upgrade, reload or stop yet")
    return 0


# -- the parser --------------------------------------------------------------------------------------------------------
COMMANDS = {
    "upgrade": "replace master, code, interpreter and dependencies; wait for the verdict",
    "reload": "replace the workers, read the configuration again; wait for the verdict",
    "stop": "stop in order, within the stop budget; print what was lost",
    "status": "what the instance does now",
    "history": "past upgrades, reloads and stops, and what workers lost between them",
    "check": "what in a configuration would lose requests or break an upgrade",
    "run": "run a server under a parent whose pid never changes, for supervisord and containers",
    "demo": "a real server, real load, three upgrades, a stop with jobs",
}
#: Commands that are modules of their own: they read their arguments themselves.
_ELSEWHERE = {"check": "gracehooks.check", "run": "gracehooks.anchor", "demo": "gracehooks.demo"}


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86400:
        raise ValueError(text)
    return value


_seconds.__name__ = "number of seconds, 0 to 86400"


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


_count.__name__ = "number, 0 or more"


def parser() -> argparse.ArgumentParser:
    """The whole command line; the reference is generated from it."""
    target = argparse.ArgumentParser(add_help=False)
    one = target.add_mutually_exclusive_group()
    one.add_argument("--pidfile", metavar="FILE", help="the instance with this pidfile")
    one.add_argument("--pid", metavar="N", type=int, help="the instance of this master, or of this anchor")
    one.add_argument(
        "--state-dir",
        metavar="DIR",
        help="the instance with this state directory; without a target, the only one running",
    )
    target.add_argument("--json", action="store_true", help="print one JSON object instead of lines")

    top = argparse.ArgumentParser(prog="gracehooks", description="Verified upgrades and bounded stops for gunicorn.")
    top.add_argument("--version", action="version", version=f"gracehooks {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name in _ELSEWHERE:
            commands.add_parser(name, help=text, add_help=False, prefix_chars="\0")
            continue
        exits = "\n".join(f"  {code}  {meaning}" for code, meaning in EXITS[name].items())
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            parents=[target],
            epilog=f"exit codes:\n{exits}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in ("upgrade", "reload"):
            command.add_argument(
                "--timeout",
                metavar="S",
                type=_seconds,
                default=300.0,
                help="how long to wait for the verdict, in seconds (300)",
            )
            command.add_argument("--no-wait", action="store_true", help="send the signal and go")
            command.add_argument(
                "--drained", action="store_true", help="wait until the old generation has left too; print what it lost"
            )
        elif name == "stop":
            command.add_argument(
                "--timeout",
                metavar="S",
                type=_seconds,
                help="how long to wait for the end, in seconds (the stop budget and 30 more, at least 120)",
            )
        elif name == "history":
            command.add_argument("--last", metavar="N", type=_count, help="only the last N records")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _ELSEWHERE:
        return int(importlib.import_module(_ELSEWHERE[arguments[0]]).main(arguments[1:]))
    args = parser().parse_args(arguments)
    try:
        instance = find(pidfile=args.pidfile, pid=args.pid, state_dir=args.state_dir)
    except NoSuchInstance as error:
        return tell(Result(2, f"gracehooks: {error}", {"outcome": "error", "reason": str(error)}), args.json)
    try:
        return _run(instance, args)
    except KeyboardInterrupt:
        print(f"\ngracehooks: interrupted; the {args.command} goes on, see `gracehooks status`", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - whoever read us has gone; say no more
        return 128 + signal.SIGPIPE


def _run(instance: Instance, args: argparse.Namespace) -> int:
    if args.command == "history":
        return history(instance, args)
    if args.command == "upgrade":
        return tell(ask(instance, args, "upgrade", signal.SIGUSR2), args.json)
    if args.command == "reload":
        return tell(ask(instance, args, "reload", signal.SIGHUP), args.json)
    return tell(stop(instance, args) if args.command == "stop" else status(instance), args.json)


if __name__ == "__main__":
    sys.exit(main())
