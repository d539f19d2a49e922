"""A random walk: named requests all the time, one random act on the server after the other, and the account at the end.

The acts are drawn by one seed, and so is what the clients do; which request meets which act is up to the machine, so a
seed repeats the story and not the microseconds. `Walk.account` is where every request is accounted for.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gracehooks.demo import clients as clients_script
from tests.kit.footprint import footprint_of
from tests.kit.processes import alive, sockets, start_time, state
from tests.kit.server import VERDICTS, Server
from tests.kit.waiting import Late, eventually

__all__ = ["CONFIG", "Account", "NamedTraffic", "Walk", "named_load"]

#: What the walk's servers are configured with; everything is short, so that much happens in little time.
CONFIG = """
timeout = 6
max_requests = 200 if "Sync" in worker_class else 800
max_requests_jitter = max_requests // 2
gracehooks.configure(
    ready_timeout=30, probation=0.3, drain_timeout=3, job_timeout=2, cleanup_timeout=1, max_generations=3
)
if (__import__("pathlib").Path(__file__).parent / "broken-config").exists():
    raise RuntimeError("a broken configuration")
"""
WORKERS = 2
#: How much later than the end of its worker a client may see the end of its request, in seconds (a busy machine).
SLACK = 1.5
#: A worker that was hit is gone within so long, in seconds; later its pid is somebody else's.
LONGEST = 60.0
#: How often the descriptors are counted.
LOOKS = 3
#: How long a worker may lack a processor between an answer and the store that says so, in seconds (a busy machine).
UNTOLD = 0.5
#: The same for one whose event loop was blocked by a request that is stuck, until it is killed.
BLOCKED = 15.0
#: How long before the master's word a worker that was forced to end may have let go of its connections, in seconds.
FORCING = 2.0

#: What may happen, and how often in comparison.
ACTS = {
    "upgrade": 8,
    "broken upgrade": 3,
    "reload": 6,
    "broken reload": 3,
    "more workers": 2,
    "fewer workers": 2,
    "kill a worker": 4,
    "crash a worker": 3,
    "end a worker": 3,
    "quit a worker": 2,
    "halt a worker": 2,
    "a stuck request": 4,
    "window change": 1,
    "stop and start": 2,
    "hammer and start": 2,
    "kill the master": 1,
    "nothing": 2,
}
#: What may come between the beginning of an upgrade or a reload and its verdict.
BETWEEN = {
    "": 12,
    "kill a worker": 3,
    "crash a worker": 2,
    "end a worker": 1,
    "kill a new worker": 2,
    "kill the successor": 3,
    "kill the old master": 3,
    "upgrade again": 1,
    "reload again": 1,
    "stop": 1,
    "hammer": 1,
}


class NamedTraffic:
    """Named requests that run; made by `named_load`."""

    def __init__(self, process: subprocess.Popen[bytes], book: Path) -> None:
        self._process = process
        self._book = book

    def ask_stuck(self, mode: str) -> None:
        """Send one request that is never answered by itself."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"stuck": mode}).encode() + b"\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Let each client end its request."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return
        self._process.stdin.close()
        try:
            code = self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError("clients that never end") from None
        if code:
            raise AssertionError(f"the clients ended with {code}: some of them still waited for an answer")

    def records(self) -> list[dict[str, Any]]:
        """Every request that has ended, in the order of their ends."""
        return [json.loads(line) for line in self._book.read_text().splitlines() if line.endswith("}")]


@contextmanager
def named_load(server: Server, kinds: list[str], seed: str, think: float = 0.05) -> Iterator[NamedTraffic]:
    """Closed-loop load with one client for each of `kinds`, until the block ends; see named_clients.py."""
    book = server.dir / "book.jsonl"
    plan = {
        "address": asdict(server.address),
        "kinds": kinds,
        "seed": seed,
        "think": think,
        "pause": 0.3,
        "timeout": 45.0,
        "book": str(book),
    }
    process = subprocess.Popen(
        [sys.executable, "-S", "-B", str(Path(__file__).with_name("named_clients.py"))],
        stdin=subprocess.PIPE,
        env={"GRACEKIT_CLIENTS": os.path.dirname(clients_script.__file__)},
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(plan).encode() + b"\n")
        process.stdin.flush()
        eventually(book.exists, what="the clients")
        yield NamedTraffic(process, book)
    finally:
        process.kill()
        process.wait()
        if not process.stdin.closed:
            process.stdin.close()


def ports_of(pid: int) -> set[int] | None:
    """The far ends of the TCP connections that the process has; None where they cannot be seen."""
    found = set()
    try:
        with sockets(pid) as connections:
            for each in connections.values():
                try:
                    peer = each.getpeername()
                except OSError:
                    continue  # a listener, or one that has ended
                if isinstance(peer, tuple):
                    found.add(peer[1])
    except OSError:
        return None  # it is gone
    return found


@dataclass
class Violence:
    """Something was ended by force from `began` to `ended`: the worker `pid`, or whatever there was (0)."""

    what: str
    pid: int
    began: float
    ended: float = float("inf")
    #: Whether there was no server at all meanwhile.
    down: bool = False
    #: A stop in good order: it may refuse, and loses nothing.
    gentle: bool = False
    #: The far ends of the connections that it cost, where they are known: all others must live.
    ports: set[int] | None = None

    def explains(self, record: dict[str, Any], before: float = 0.0) -> bool:
        """Whether it can have cost this request; one that ended up to `before` seconds earlier as well."""
        return (
            not self.gentle
            and (self.pid == 0 or record["pid"] in (0, self.pid))
            and (self.ports is None or record["port"] in self.ports)
            and self.began - before <= record["ended"] <= self.ended + SLACK
            and record["begun"] <= self.ended
        )


@dataclass
class Account:
    """Every request, in one of these numbers."""

    sent: int = 0
    answered: int = 0
    reported: int = 0  #: lost, and named in a report
    unread: int = 0  #: ended by force before any process of the server had read them
    refused: int = 0  #: while there was no server
    late_reports: int = 0  #: answered and reported all the same: its worker was killed between the two
    jobs: int = 0
    jobs_done: int = 0
    jobs_reported: int = 0
    acts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        acts = ", ".join(f"{name} {count}" for name, count in sorted(self.acts.items()))
        return (
            f"{self.sent} sent = {self.answered} answered + {self.reported} reported lost + {self.unread} unread"
            f" + {self.refused} refused; {self.late_reports} reported though answered;"
            f" {self.jobs} jobs = {self.jobs_done} done + {self.jobs_reported} reported; acts: {acts}"
        )


class Walk:
    """One walk on one server."""

    def __init__(self, server: Server, traffic: NamedTraffic, seed: int, preloaded: bool = False) -> None:
        self.server = server
        self.traffic = traffic
        self.chance = random.Random(seed)
        self.wanted = WORKERS
        self.preloaded = preloaded  #: a reload is an upgrade then, which keeps the number of workers
        self.story: list[str] = []
        self.acts: Counter[str] = Counter()
        self.violence: list[Violence] = []
        self.footprints: list[dict[str, list[int]]] = []
        #: Stops that took longer than they may, on a machine that may be busy: said when everything was accounted for.
        self.late: list[str] = []
        self.began = time.monotonic()
        self._masters: dict[int, int] = {}
        self._heard = self._listened = 0
        self._master_killed = 0.0

    # -- the story ---------------------------------------------------------------------------------------------------
    def tell(self, text: str) -> None:
        """Note what is done and what came of it."""
        self.story.append(f"{time.monotonic() - self.began:8.3f} ({time.monotonic():.3f}) {text}")

    def go(self, seconds: float) -> None:
        """Walk for so long, and then stop the server."""
        self.settle()
        self.pause(0.5)
        self.footprints.append(self.look_at_footprint(max))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            (act,) = self.chance.choices(list(ACTS), list(ACTS.values()))
            self.acts[act] += 1
            self.tell(act)
            self.act(act)
            if self.chance.random() < 0.7 or not self.server_lives():
                self.settle()
            self.pause(self.chance.uniform(0, 0.5))
        self.settle()
        self.pause(0.5)
        while self.wanted != WORKERS:
            self.one_worker(more=self.wanted < WORKERS)
        self.footprints.append(self.look_at_footprint(min))
        self.tell("the last stop")
        self.stop("TERM")

    def act(self, act: str) -> None:
        """Do it."""
        chance = self.chance
        if act in ("upgrade", "reload"):
            self.replace(act, "")
        elif act == "broken upgrade":
            self.replace("upgrade", chance.choice(["raises", "exits", "dies"]))
        elif act == "broken reload":
            self.replace("reload", chance.choice(["raises", "exits", "dies", "config"]))
        elif act == "more workers" and self.wanted < 4:
            self.one_worker(more=True)
        elif act == "fewer workers" and self.wanted > 1:
            self.one_worker(more=False)
        elif act in ("kill a worker", "crash a worker", "quit a worker", "end a worker"):
            self.hit_a_worker({"k": "KILL", "c": "SEGV", "q": "QUIT", "e": "TERM"}[act[0]])
        elif act == "halt a worker":
            pid = self.a_worker()
            if pid:
                self.send("STOP", pid)
                self.pause(chance.uniform(0.1, 1.0))
                self.send("CONT", pid)
        elif act == "a stuck request":
            self.ask_stuck(chance.choice(["", "block"]))
        elif act == "window change":
            self.send("WINCH", self.server.pid)
        elif act == "stop and start":
            self.stop("TERM")
        elif act == "hammer and start":
            self.stop("INT")
        elif act == "kill the master":
            self.kill_master(self.server.pid)

    # -- acts --------------------------------------------------------------------------------------------------------
    def replace(self, how: str, broken: str) -> None:
        """An upgrade or a reload, of a release that works or not, with something in between or not."""
        server, chance = self.server, self.chance
        (between,) = chance.choices(list(BETWEEN), list(BETWEEN.values()))
        delay = chance.uniform(0, 1.5)
        file = "broken-config" if broken == "config" else "broken"
        mark, master = server.mark(), server.pid
        if not alive(master):  # it was killed just before, and whoever comes after it has not taken the pidfile yet
            self.tell("  nobody was there to be replaced")
            return
        if broken:
            server.write(file, broken)
        self.send("USR2" if how == "upgrade" else "HUP", master)
        if between:
            self.acts[f"… {between}"] += 1
            self.pause(delay)
            self.come_between(between, mark, master)
        verdict = self.verdict(mark, master)
        (server.dir / file).unlink(missing_ok=True)
        event = verdict.get("event", "")
        self.tell(f"  {how}{f' ({broken})' if broken else ''}: {event or 'no verdict'} {verdict.get('reason', '')}")
        if event == "UpgradeCompleted" and broken:
            raise AssertionError(f"a broken release was taken for a good one: {verdict}")
        # An orphan that boots, after the one between it and this master was killed, writes gunicorn's second pidfile late.
        reasons = {
            "UpgradeRefused": ("draining", "under way", "still there"),
            "UpgradeRolledBack": ("Already running on PID",),
        }
        busy = any(each in verdict.get("reason", "") for each in reasons.get(event, ()))
        if not between and not broken and event != "UpgradeCompleted" and not busy:
            raise AssertionError(f"a good release was not taken: {verdict}")

    def come_between(self, what: str, mark: int, master: int) -> None:
        """Disturb the upgrade or reload that began at `mark`."""
        started = [each for each in self.server.events()[mark:] if each["event"] == "UpgradeStarted"]
        successor = started[-1]["successor"] if started and started[-1]["kind"] == "upgrade" else 0
        self.tell(f"  {what}")
        if what == "kill a worker":
            self.hit_a_worker("KILL", master)
        elif what == "crash a worker":
            self.hit_a_worker("SEGV", master)
        elif what == "end a worker":
            self.hit_a_worker("TERM", master)
        elif what == "kill a new worker":
            self.hit_a_worker("KILL", successor or master)
        elif what == "kill the successor" and successor and alive(successor) and alive(master):
            self.kill_master(successor)
        elif what == "kill the old master":
            self.kill_master(master)
        elif what == "upgrade again":
            self.send("USR2", master)
        elif what == "reload again":
            self.send("HUP", master)
        elif what in ("stop", "hammer"):
            self.stop("TERM" if what == "stop" else "INT")

    def verdict(self, mark: int, master: int) -> dict[str, Any]:
        """The verdict on what began after `mark`, or the refusal; no event when the master is gone before it."""

        def found() -> dict[str, Any] | None:
            gone = not alive(master)
            mine = [each for each in self.server.events()[mark:] if each["pid"] == master]
            begun = next((each["id"] for each in mine if each["event"] == "UpgradeStarted"), None)
            for each in mine:
                if each["event"] in VERDICTS and begun in (each["id"], None):
                    return each
            return {"reason": "the master is gone"} if gone else None

        return eventually(found, 60, "the verdict")

    def one_worker(self, *, more: bool) -> None:
        """One worker more, or less; two equal signals at once would be one."""
        self.settle()  # a master that is just being replaced would not hear it
        self.send("TTIN" if more else "TTOU", self.server.pid)
        self.wanted += 1 if more else -1
        self.settle()  # signals have no order: an upgrade right after it may take the old number along

    def a_worker(self, master: int = 0) -> int:
        """One of the workers; 0 when there is none."""
        try:
            found = sorted(self.server.workers(master or self.server.pid))
        except AssertionError:
            found = []
        return self.chance.choice(found) if found else 0

    def hit_a_worker(self, name: str, master: int = 0) -> None:
        """A signal to one of the workers."""
        pid = self.a_worker(master)
        if not pid or name == "TERM":
            return self.send(name, pid) if pid else None
        act = Violence(f"SIG{name}", pid, time.monotonic())
        self.violence.append(act)
        if name != "QUIT":  # one that stands still accepts no more: it has these connections, and no others
            self.send("STOP", pid)
            eventually(lambda: state(pid) in "TZX", what="a worker that stands still")
            act.began, act.ports = time.monotonic(), ports_of(pid)
        self.send(name, pid)
        return self.send("CONT", pid)

    def ask_stuck(self, mode: str) -> None:
        """A request that never ends; mode "block" blocks an event loop as well."""
        before = self.begun("/stuck/")
        self.traffic.ask_stuck(mode)
        try:
            eventually(lambda: self.begun("/stuck/") > before or not self.server_lives(), 10, "the stuck request")
        except Late:
            self.tell(
                "  which nobody has begun"
            )  # its connection died with the worker that had it; the account knows it

    def kill_master(self, pid: int) -> None:
        """SIGKILL to a master: another generation may be there, or nobody."""
        self._master_killed = time.monotonic()
        if not [each for each in self.masters() if each != pid]:
            self.violence.append(Violence("the only master was killed", 0, self._master_killed, down=True))
        self.send("KILL", pid)
        eventually(lambda: not alive(pid), what="the end of the master")

    def masters(self) -> list[int]:
        """Every master that was heard of and lives; pids come again, so each is known with its start."""
        for each in self.server.events()[self._listened :]:
            self._listened += 1
            heard = {each["pid"]}
            if each["event"] == "UpgradeStarted" and each["kind"] == "upgrade":
                heard.add(each["successor"])
            self._masters.update({pid: start_time(pid) for pid in heard if pid not in self._living()})
        if self.server.process.poll() is None:
            self._masters[self.server.process.pid] = start_time(self.server.process.pid)
        return self._living()

    def _living(self) -> list[int]:
        return [pid for pid, start in self._masters.items() if start and alive(pid) and start_time(pid) == start]

    def stop(self, name: str) -> None:
        """A final stop; the walk starts the server again when it settles."""
        began = time.monotonic()
        pid = self.server.pid
        if not alive(pid):  # as above
            self.tell("  nobody was there to stop")
            return
        self.violence.append(Violence(f"SIG{name} to the master", 0, began, down=True, gentle=name == "TERM"))
        self.send(name, pid)
        eventually(lambda: not alive(pid), what=f"the end after SIG{name}")
        eventually(lambda: not self.server.processes(), 15, f"the end of every process after SIG{name}")
        took = time.monotonic() - began
        self.tell(f"  stopped after {took:.2f} s")
        if took > (3 + 2 + 1 + 1 if name == "TERM" else 1.0) + 5:
            self.late.append(f"SIG{name} took {took:.2f} s")

    def send(self, name: str, pid: int) -> None:
        """A signal, which may come too late."""
        self.tell(f"  SIG{name} to {pid}")
        try:
            os.kill(pid, getattr(signal, f"SIG{name}"))
        except ProcessLookupError:
            self.tell("  which was gone")

    # -- waiting -----------------------------------------------------------------------------------------------------
    def pause(self, seconds: float) -> None:
        """Let the load go on for so long: chance is what is waited for here."""
        until = time.monotonic() + seconds
        eventually(lambda: time.monotonic() >= until, seconds + 30, "the end of a pause")

    def begun(self, prefix: str) -> int:
        """How many application calls have begun whose names begin so."""
        return sum(1 for what, name, _ in self.application_book() if what == "begun" and name.startswith(prefix))

    def server_lives(self) -> bool:
        """Whether some master lives."""
        return bool(self.masters())

    def settle(self) -> None:
        """Wait until one generation serves with the workers that were asked for; start the server where there is none."""
        until = time.monotonic() + 90
        while not self._settled():
            if not self.server_lives():  # a successor that has not said anything yet lives as well
                eventually(lambda: self.server_lives() or not self.server.processes(), 20, "the end of the orphans")
                if not self.server_lives():
                    self.start_again()
            if time.monotonic() > until:
                raise Late(
                    f"one serving generation; status {self.server.status()}, processes {self.server.processes()}"
                )
            time.sleep(0.05)

    def start_again(self) -> None:
        """Start anew, which must have been made necessary."""
        if not self._down():
            if time.monotonic() - self._master_killed > 30:
                raise AssertionError("the server is gone, and nobody has ended it")
            # It was killed just when the other generation, which was leaving, had left.
            self.violence.append(Violence("the last master was killed", 0, self._master_killed, down=True))
        for each in self.server.dir.glob("broken*"):
            each.unlink()
        self.server.start_again()
        for each in self._down():
            each.ended = time.monotonic()
        self.wanted = WORKERS
        self.tell("  started again")

    def _down(self) -> list[Violence]:
        return [each for each in self.violence if each.down and each.ended == float("inf")]

    def _settled(self) -> bool:
        server = self.server
        for each in server.events()[self._heard :]:
            self._heard += 1
            if each["event"] == "UpgradeCompleted" and each["kind"] == "reload" and not self.preloaded:
                self.wanted = WORKERS  # what the configuration says, as with gunicorn itself
        try:
            pid = server.pid
            status = server.status()
        except (AssertionError, OSError, ValueError):
            return False
        if not alive(pid) or status["master_pid"] != pid or status["state"] != "serving" or status["draining"]:
            return False
        mine = set(server.workers())
        phases = {each["pid"]: each["phase"] for each in status["workers"]}
        return (
            len(mine) == self.wanted
            and set(phases) == mine
            and set(phases.values()) == {"serving"}
            and set(server.processes()) == {pid, *mine}
        )

    def look_at_footprint(self, choose: Callable[[int, int], int]) -> dict[str, list[int]]:
        """Descriptors and memory, master first, of some looks the most (before) or the least (afterwards).

        A file that is just written is no leak, and gunicorn's control socket is away while a worker is forked.
        """
        chosen: dict[int, dict[str, int]] = {}
        looks = 0

        def looked() -> bool:
            nonlocal looks
            if self._settled():
                looks += bool(len(chosen) > 1)
                for pid in (self.server.pid, *self.server.workers()):
                    try:
                        found = footprint_of(pid)
                    except OSError:
                        continue  # a worker that has just been recycled
                    before = chosen.setdefault(pid, found)
                    chosen[pid] = {name: choose(value, before[name]) for name, value in found.items()}
            return looks >= LOOKS

        eventually(looked, 60, "looks at a settled server")
        master = chosen.pop(self.server.pid)
        return {name: [value, *(each[name] for each in chosen.values())] for name, value in master.items()}

    # -- the account -------------------------------------------------------------------------------------------------
    def application_book(self) -> list[list[str]]:
        """What the application wrote down: what, which name, in which process."""
        try:
            return [line.split() for line in (self.server.dir / "begun.txt").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def account(self) -> Account:
        """Where every request and every job went."""
        found = Account(acts=self.acts)
        problem: Callable[[str], None] = found.problems.append
        ends = [each for each in self.server.events() if each["event"] == "WorkerEnded"]
        self._see_ends(ends)
        book = self.application_book()
        begun = {name for what, name, _ in book if what == "begun"}
        reports, nameless = self._reports(ends)
        blocked = {each.partition(":")[0] for name, by in reports.items() if name.startswith("/stuck/") for each in by}
        records = {each["name"]: each for each in self.traffic.records()}

        for record in records.values():
            name, outcome = record["name"], record["outcome"]
            found.sent += 1
            reported = reports.pop(name, None)
            if outcome == "ok":
                found.answered += 1
                if reported:
                    untold = BLOCKED if reported[0].partition(":")[0] in blocked else UNTOLD
                    if any(each.explains(record, untold) for each in self.violence):
                        found.late_reports += 1
                    else:
                        problem(f"reported as lost, and answered: {record} {reported}")
            elif reported is not None:
                found.reported += 1
                if len(reported) > 1:
                    problem(f"reported more than once: {record} {reported}")
            elif name in begun and record["detail"].startswith("500 ") and self._explained(record):
                found.answered += 1  # by its application: after the hammer a worker takes no job any more
            elif name in begun:
                problem(f"lost, and nobody said so: {record}")
            elif outcome == "refused":
                found.refused += 1
                if not any(each.down and each.began <= record["ended"] <= each.ended + SLACK for each in self.violence):
                    problem(f"refused, while there was a server: {record}")
            elif self._explained(record):
                found.unread += 1
            elif nameless:
                nameless.pop()
                found.unread += 1
            else:
                problem(f"lost before it was read, while nothing was forced: {record}")
        for name, reported in reports.items():
            if name != "/":
                problem(f"reported as lost, and no client has sent it: {name} {reported}")
        self._account_of_jobs(found, book, ends)
        return found

    def _explained(self, record: dict[str, Any]) -> bool:
        return any(each.explains(record) for each in self.violence)

    def _see_ends(self, ends: list[dict[str, Any]]) -> None:
        """When each act of violence was over, and what else was ended by force: time-outs, bounds."""
        for each in ends:
            acts = [
                act
                for act in self.violence
                if act.pid == each["worker"] and act.began <= each["at"] < act.began + LONGEST
            ]
            if acts:
                acts[-1].ended = min(acts[-1].ended, each["at"])
            elif each["reason"] != "drained":
                self.violence.append(Violence(each["reason"], each["worker"], each["at"] - FORCING, each["at"]))
        for each in self.violence:
            if each.ended == float("inf"):
                each.ended = each.began + 5.0 if each.pid > 0 else time.monotonic()

    def _reports(self, ends: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
        """Each name that was reported lost, with the workers that lost it; and the reports without a name."""
        named: dict[str, list[str]] = {}
        nameless = []
        for each in ends:
            for lost in each["lost"]["requests"]:
                if lost["path"] == "?":
                    nameless.append(f"{each['worker']}: {each['reason']}")
                else:
                    named.setdefault(lost["path"], []).append(f"{each['worker']}: {each['reason']}")
        for each in self.server.events():
            if each["event"] == "Stopped":  # what no worker had accepted is in the report of the whole alone
                nameless += [each["id"] for lost in each["lost"]["requests"] if lost["worker"] == 0]
        # A worker whose master was killed has nobody but the log to tell.
        nameless += re.findall(r"^\? \?, [\d.]+ s", self.server.log(), re.MULTILINE)
        for name in re.findall(r"^(?:GET|POST|WS) (/\w+/\S+), [\d.]+ s", self.server.log(), re.MULTILINE):
            named.setdefault(name, [])
        return named, nameless

    def _account_of_jobs(self, found: Account, book: list[list[str]], ends: list[dict[str, Any]]) -> None:
        started = {name for what, name, _ in book if what == "job"}
        done = {name for what, name, _ in book if what == "done"}
        lost = Counter(job["name"] for each in ends for job in each["lost"]["jobs"])
        logged = set(re.findall(r"^job \d+ \((/job/\S+)\), ", self.server.log(), re.MULTILINE))
        found.jobs, found.jobs_done, found.jobs_reported = len(started), len(done), len(started - done)
        for name in sorted(started - done):
            if name not in lost and name not in logged:
                found.problems.append(f"a job that was lost, and nobody said so: {name}")
        for name in sorted(set(lost) - {name for what, name, _ in book if what == "begun"}):
            found.problems.append(f"a job that was reported as lost and never began: {name}")
