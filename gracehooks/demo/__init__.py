"""`gracehooks demo`: a real server, real load, three upgrades (one of them broken), a stop with jobs, and what was lost.

It runs the installed gunicorn in a temporary directory on a free port of 127.0.0.1, asks for each step through the command
line as an operator would, and counts with clients that call everything but a whole answer a loss. About ten seconds; exit
code 0 only if nothing was lost and every step ended as it should. Nothing stays behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gracehooks import processes
from gracehooks.deadline import Deadline
from gracehooks.demo import clients

__all__ = ["main"]

APP = '''
import itertools, os, random, threading, time
from pathlib import Path

VERSION = "{version}"
NUMBERS = itertools.count(1)


def work(seconds):
    """A job: what a request starts and does not wait for (a mail, a report, a webhook)."""
    time.sleep(seconds)
    Path(f"job-{{os.getpid()}}-{{next(NUMBERS)}}.done").touch()


def parts():
    for number in range(5):
        yield b"part\\n"
        time.sleep(0.02)


def app(environ, start_response):
    path = environ["PATH_INFO"]
    body = b"ok"
    if path == "/sleep":
        time.sleep(random.uniform(0, 0.2))
    elif path == "/slow":
        time.sleep(1)
    elif path == "/stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return parts()
    elif path == "/upload":
        body = str(len(environ["wsgi.input"].read())).encode()
    elif path == "/job":
        threading.Thread(target=work, args=(1.5,), name="send_mail").start()
    elif path == "/version":
        body = VERSION.encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
'''

BROKEN = "import a_package_that_nobody_installed\n"

CONFIG = """
import gracehooks

bind = "127.0.0.1:{port}"
worker_class = "{worker_class}"
workers = 2
threads = 4
pidfile = "{directory}/gunicorn.pid"
control_socket = "{directory}/gunicorn.ctl"
gracehooks.configure(probation=0.5, ready_timeout=20, drain_timeout=10, job_timeout=10)
"""

KINDS = {"new": "new connections", "keepalive": "keep-alive", "upload": "slow uploads", "stream": "streamed answers"}
LOSSES = ("refused", "reset_before_byte", "cut", "wrong_status", "timeout")
JOBS = 3
#: No step of the demo may take longer, in seconds.
LONGEST_STEP = 60.0


class Failed(Exception):  # noqa: N818 - the demo's own verdict
    """A step did not end as it should."""


@dataclass
class Step:
    """One line of the table."""

    name: str
    outcome: str
    seconds: float
    note: str
    good: bool


@dataclass
class Report:
    """What the demo found."""

    server: str
    steps: list[Step] = field(default_factory=list)
    requests: dict[str, dict[str, int]] = field(default_factory=dict)
    lost: list[dict[str, Any]] = field(default_factory=list)
    jobs: int = 0
    jobs_done: int = 0
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing was lost and each step ended as it should."""
        return (
            not self.failure
            and not self.lost
            and self.jobs == self.jobs_done
            and all(step.good for step in self.steps)
            and bool(self.requests)
        )

    def facts(self) -> dict[str, Any]:
        """The report for `--json`."""
        return {
            "server": self.server,
            "steps": [vars(step) for step in self.steps],
            "requests": self.requests,
            "lost": self.lost,
            "jobs": {"started": self.jobs, "finished": self.jobs_done},
            "failure": self.failure,
            "nothing_lost": self.good,
        }

    def table(self) -> list[str]:
        """The requests and the jobs, as a person reads them."""
        lines = ["", f"  {'':18} {'sent':>7} {'answered':>9} {'lost':>5}"]
        for kind, outcomes in self.requests.items():
            answered, lost = outcomes["ok"], sum(outcomes[each] for each in LOSSES)
            lines.append(f"  {KINDS.get(kind, kind):18} {answered + lost:7} {answered:9} {lost:5}")
        lines.append(f"  {'jobs':18} {self.jobs:7} {self.jobs_done:9} {self.jobs - self.jobs_done:5}")
        return [*lines, ""]


class Load:
    """The clients, in a process of their own."""

    def __init__(self, port: int, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", clients.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        plan = {
            "address": {"family": "tcp", "host": "127.0.0.1", "port": port},
            "kinds": list(KINDS),
            "clients": 8,
            "paths": ["/fast", "/fast", "/fast", "/sleep"],
            "think": 0.01,
            "timeout": 30,
            "stream_path": "/stream",
            "upload_path": "/upload",
            "upload_bytes": 65536,
            "upload_parts": 4,
            "upload_seconds": 0.1,
            "late": 0.2,
            "timeline": str(directory / "timeline"),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(plan).encode() + b"\n")
        self._process.stdin.flush()
        self._last: dict[str, Any] = {}
        self._lost: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last = json.loads(line)
            self._lost += self._last["lost"]

    @property
    def answered(self) -> int:
        """How many requests were answered so far."""
        return sum(row[0] for row in self._last.get("counts", ()))

    def wait(self, more: int) -> None:
        """Wait until `more` further requests were answered."""
        wanted, bound = self.answered + more, Deadline.after(LONGEST_STEP)
        while self.answered < wanted:
            if bound.passed or self._process.poll() is not None:
                raise Failed("the clients get no more answers")
            time.sleep(0.02)

    def end(self, report: Report) -> None:
        """Let each client finish its request; what happened goes into the report."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(LONGEST_STEP)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reader.join(LONGEST_STEP)  # it ends with the clients' output
        for kind, row in zip(KINDS, self._last.get("counts", ()), strict=False):
            report.requests[kind] = dict(zip(clients.OUTCOMES, row, strict=True))
        report.lost = self._lost


class Demo:
    """The server, the load and the steps; `say` takes each line as it becomes known."""

    def __init__(self, directory: Path, port: int, worker_class: str, say: Any) -> None:
        self._dir = directory
        self._port = port
        self._say = say
        self._pidfile = directory / "gunicorn.pid"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRACEHOOKS_", "GUNICORN_"))}
        run = directory / "run"
        run.mkdir(mode=0o700)
        self._environment = {**environment, "XDG_RUNTIME_DIR": str(run), "PYTHONDONTWRITEBYTECODE": "1"}
        config = CONFIG.format(port=port, worker_class=worker_class, directory=directory)
        (directory / "gunicorn.conf.py").write_text(config)
        self._release("1")
        self.report = Report(
            f"gunicorn {version('gunicorn')}, 2 workers of {worker_class}, Python {sys.version.split()[0]}"
        )
        self._server: subprocess.Popen[bytes] | None = None
        self._load: Load | None = None

    def run(self) -> None:
        """Every step; raises Failed."""
        self._say(f"{self.report.server}, http://127.0.0.1:{self._port}, 8 clients")
        self._start()
        load = self._load = Load(self._port, self._dir)
        load.wait(100)
        self._upgrade("2")
        load.wait(100)
        self._upgrade("3", broken=True)
        load.wait(100)
        self._upgrade("4")
        load.wait(100)
        load.end(self.report)
        self._stop()

    def _release(self, version: str, broken: bool = False) -> None:
        (self._dir / "app.py").write_text(BROKEN if broken else APP.format(version=version))

    def _ask(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=LONGEST_STEP) as answer:
            return str(answer.read().decode())

    def _start(self) -> None:
        with open(self._dir / "server.log", "ab") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "app:app"],
                cwd=self._dir,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        bound = Deadline.after(LONGEST_STEP)
        while not bound.passed and self._server.poll() is None:
            try:
                if self._ask("/version") == "1" and self._pidfile.exists():
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise Failed("the server does not start")

    def _command(self, *args: str) -> tuple[int, dict[str, Any], float]:
        """Run a command as an operator would; its exit code, what it says, the seconds."""
        began = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "gracehooks", *args, "--pidfile", str(self._pidfile), "--json"],
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=LONGEST_STEP,
                check=False,
            )
            said = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError):
            raise Failed(f"gracehooks {args[0]} gives no answer") from None
        return done.returncode, said, time.monotonic() - began

    def _upgrade(self, release: str, broken: bool = False) -> None:
        before = self._ask("/version")
        self._release(release, broken)
        code, said, seconds = self._command("upgrade")
        after = self._version_soon(release) if code == 0 else self._ask("/version")
        good = (code == 1 and after == before) if broken else (code == 0 and after == release)
        phases = ", ".join(f"{name} {value:.2f}" for name, value in (said.get("phases") or {}).items())
        note = str(said.get("reason") or phases)
        name = f"release {release}" + (", broken" if broken else "")
        self._step(Step(name, str(said.get("outcome", "?")).replace("_", " "), seconds, note, good))

    def _version_soon(self, wanted: str) -> str:
        """What the server answers once `wanted` does: the old generation may accept a last request after the verdict."""
        bound = Deadline.after(LONGEST_STEP)
        while (found := self._ask("/version")) != wanted and not bound.passed:
            time.sleep(0.02)
        return found

    def _stop(self) -> None:
        """A stop while three jobs run and one request is being answered."""
        report = self.report
        for _ in range(JOBS):
            self._ask("/job")
            report.jobs += 1
        answers: list[str] = []
        slow = threading.Thread(target=lambda: answers.append(self._ask("/slow")), daemon=True)
        slow.start()
        self._wait_for_the_slow_request()
        code, said, seconds = self._command("stop")
        slow.join(LONGEST_STEP)
        report.jobs_done = len(list(self._dir.glob("job-*.done")))
        note = f"{report.jobs_done} of {report.jobs} jobs done, {'1 request' if answers else 'no request'} answered meanwhile"
        self._step(Step("stop", str(said.get("outcome", "?")), seconds, note, code == 0 and answers == ["ok"]))

    def _wait_for_the_slow_request(self) -> None:
        """Until a worker shows it, or half its time is over: only a request that is being answered proves something."""
        status = self._pidfile.with_suffix(".gracehooks") / "status.json"
        bound = Deadline.after(0.5)
        while not bound.passed:
            try:
                workers = json.loads(status.read_text())["workers"]
            except (OSError, ValueError, KeyError):
                workers = []
            if any(each["path"] == "/slow" for worker in workers for each in worker["requests"]):
                return
            time.sleep(0.02)

    def _step(self, step: Step) -> None:
        self.report.steps.append(step)
        mark = "" if step.good else "   <- not as it should be"
        self._say(f"  {step.name:18} {step.outcome:12} {step.seconds:5.2f} s   {step.note}{mark}")

    def log(self) -> str:
        """The end of what the server wrote."""
        try:
            return "\n".join((self._dir / "server.log").read_text(errors="replace").splitlines()[-40:])
        except OSError:
            return ""

    def close(self) -> None:
        """End what is left: nothing after a demo that went well."""
        if self._load is not None and not self.report.requests:
            self._load.end(self.report)
        pids = {self._server.pid} if self._server is not None else set()
        try:
            pids.add(int(self._pidfile.read_text()))
        except (OSError, ValueError):
            pass
        for pid in pids:
            if processes.alive(pid):
                processes.signal_process(pid, signal.SIGINT)
                bound = Deadline.after(5.0)
                while processes.alive(pid) and not bound.passed:
                    time.sleep(0.05)
                    if self._server is not None:
                        self._server.poll()
                if processes.alive(pid):
                    processes.kill_tree(pid)
        if self._server is not None:
            self._server.wait(LONGEST_STEP)


def parser() -> argparse.ArgumentParser:
    """The command line of `gracehooks demo`."""
    found = argparse.ArgumentParser(
        prog="gracehooks demo",
        description="A real server, real load, three upgrades (one of them broken), a stop with jobs: about ten seconds.",
        epilog="exit codes: 0 nothing was lost, 1 something was lost",
    )
    found.add_argument("--worker-class", default="gracehooks.Worker", help="a WSGI worker class (gracehooks.Worker)")
    found.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return found


def _ended(number: int, _: object) -> None:
    """TERM, or HUP of a terminal that closes: the server and its directory go too; a second one changes nothing."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; its exit code."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is signal.SIG_DFL:  # `nohup` has HUP ignored, and means it
            signal.signal(each, _ended)
    args = parser().parse_args(argv)

    def say(line: str) -> None:
        if not args.json:
            print(line, flush=True)

    # The port stays held, bound and not listening: nobody else is given it, and gunicorn may bind it.
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        directory = Path(tempfile.mkdtemp(prefix="gracehooks-demo-")).resolve()
        demo = Demo(directory, held.getsockname()[1], args.worker_class, say)
        try:
            try:
                demo.run()
            except (Failed, OSError) as error:
                demo.report.failure = str(error)
            finally:
                demo.close()
            return _conclude(demo, args.json, say)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _conclude(demo: Demo, as_json: bool, say: Any) -> int:
    report = demo.report
    if as_json:
        print(json.dumps(report.facts()))
        return 0 if report.good else 1
    for line in report.table():
        say(line)
    if report.good:
        say("Nothing was lost.")
        return 0
    for each in report.lost[:20]:
        say(f"lost: {each}")
    say(f"Not everything went well{': ' + report.failure if report.failure else ''}. The end of the server's log:")
    say(demo.log())
    return 1
