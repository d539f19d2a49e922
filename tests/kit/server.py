"""A real gunicorn for a test: started in a directory of its own, watched by its events, ended whatever happens.

`serve` writes the application and the configuration, holds a port for as long as the test lasts (no other test can take
it, also while no server listens), starts gunicorn and waits until it answers. Leaving the block ends the server, TERM
first and KILL for all that is left, and fails the test when a clean stop left a process behind.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gracehooks.demo import clients
from tests.kit import apps, processes
from tests.kit.waiting import Late, eventually

__all__ = ["Address", "Answer", "Server", "StartFailed", "recent", "serve"]

#: The servers of the test that runs, for the report when it fails (conftest empties it before each test).
recent: list[Server] = []

VERDICTS = ("UpgradeCompleted", "UpgradeRolledBack", "UpgradeRefused")

_CONFIG = """\
import json as _json, os as _os, time as _time
import gracehooks

bind = {bind!r}
workers = {workers!r}
worker_class = {worker!r}
{threads}
pidfile = {pidfile!r}
control_socket = {control!r}
worker_tmp_dir = "/dev/shm" if _os.path.isdir("/dev/shm") else None


def _write_event(event):
    line = _json.dumps({{**event.facts(), "at": _time.monotonic()}}, default=str) + "\\n"
    file = _os.open({events!r}, _os.O_WRONLY | _os.O_APPEND | _os.O_CREAT, 0o600)
    try:
        _os.write(file, line.encode())
    finally:
        _os.close(file)


gracehooks.configure(
    probation=0.3, ready_timeout=30, drain_timeout=5, job_timeout=5, cleanup_timeout=2, on_event=_write_event
)

# -- the test's own --
"""


class StartFailed(AssertionError):  # noqa: N818 - a fact about the server
    """The server ended instead of serving; `code` is its exit code, `log` what it wrote."""

    def __init__(self, code: int, log: str) -> None:
        super().__init__(f"the server ended with {code} instead of serving:\n{log}")
        self.code = code
        self.log = log


@dataclass(frozen=True)
class Address:
    """Where a server listens: "tcp", "tcp6" or "unix"."""

    family: str
    host: str = ""
    port: int = 0
    path: str = ""
    tls: bool = False

    def connect(self, timeout: float = 60.0) -> socket.socket:
        """A new connection."""
        if self.family == "unix":
            connection = socket.socket(socket.AF_UNIX)
        else:
            connection = socket.socket(socket.AF_INET6 if self.family == "tcp6" else socket.AF_INET)
        connection.settimeout(timeout)
        connection.connect(self.path if self.family == "unix" else (self.host, self.port))
        return clients.TLS.wrap_socket(connection) if self.tls else connection

    def __str__(self) -> str:
        if self.family == "unix":
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if self.family == "tcp6" else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Answer:
    """What the server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: Address, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._address = address

    def connect(self) -> None:
        self.sock = self._address.connect(60.0)
        self.sock.settimeout(self.timeout)


class Server:
    """A running server; made by `serve`."""

    def __init__(
        self,
        directory: Path,
        address: Address,
        command: Sequence[str],
        cwd: Path,
        python: str,
        environment: dict[str, str],
        config_head: str,
    ) -> None:
        self.environment = environment
        self._config_head = config_head
        self._command = list(command)
        self._cwd = cwd
        self.dir = directory
        self.address = address
        self.port = address.port
        self.python = python
        self.exit_codes: dict[int, int] = {}
        self.clean = False
        self._sessions: set[int] = set()
        self.process = self._spawn()
        self._events: list[dict[str, Any]] = []
        self._read = 0
        self._kept_log: str | None = None
        self._closed = threading.Event()
        self._reaping = threading.Lock()
        self._reaper = threading.Thread(target=self._reap, name="reaper", daemon=True)
        self._reaper.start()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with open(self.dir / "server.log", "ab") as log:
            process = subprocess.Popen(
                self._command,
                cwd=self._cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._sessions.add(process.pid)
        return process

    def start_again(self, answers: str | None = "/") -> None:
        """Start the same command once more, after a stop: what a deploy without upgrades does."""
        # The first thread of a process that was killed may be a zombie while another one is still on its way out.
        eventually(lambda: self.process.poll() is not None, what="the end of the server that ran before")
        self.process = self._spawn()
        if answers is not None:
            self.wait_until_it_answers(answers)

    def wait_until_it_answers(self, path: str = "/") -> None:
        """Wait until the server answers `path` with less than 500; StartFailed where it ends instead."""
        daemon = "--daemon" in self._command or "-D" in self._command

        def answers() -> bool:
            code = self.process.poll()
            if code is not None and not (daemon and code == 0):
                raise StartFailed(code, self.log())
            try:
                return self.get(path, timeout=30).status < 500 and self._pidfile() > 0
            except (OSError, http.client.HTTPException):
                return False

        eventually(answers, 60.0, "the first answer of the server")
        # One worker answers; a test that changes the application now would break those that still load it.
        if "gracehooks: a stop lasts" in self.log():
            eventually(
                lambda: (
                    any(each in self.log() for each in ("gracehooks: serving with", "gracehooks: ServingStarted"))
                    or self.process.poll() is not None
                ),
                60.0,
                "all workers",
            )

    # -- processes -----------------------------------------------------------------------------------------------
    def _reap(self) -> None:
        """Reap what ended, at once, as an init would: a zombie master would be taken for a living one."""
        while not self._closed.wait(0.02):
            self._reap_once()

    def _reap_once(self) -> None:
        with self._reaping:  # the reaper's thread and a test may both be here; an exit code is told once
            pid = self._pidfile()
            if pid:
                self._sessions.add(processes.session(pid) or pid)
            if self.process.poll() is not None:
                self.exit_codes.setdefault(self.process.pid, self.process.returncode)
            processes.reap(self._sessions, self.exit_codes)

    @property
    def pidfile(self) -> Path:
        return self.dir / "gunicorn.pid"

    def _pidfile(self) -> int:
        try:
            return int(self.pidfile.read_text())
        except (OSError, ValueError):
            return 0

    @property
    def pid(self) -> int:
        """The master that serves now, as the pidfile says."""
        pid = self._pidfile()
        if not pid:
            raise AssertionError(f"no pid in {self.pidfile}")
        return pid

    def signal(self, name: str, pid: int | None = None) -> None:
        """Send SIG<name> to `pid`, else to the master."""
        os.kill(self.pid if pid is None else pid, getattr(signal, f"SIG{name.removeprefix('SIG')}"))

    def workers(self, master: int | None = None) -> list[int]:
        """The worker processes of the master (the serving one, unless given), not a successor that it started."""
        master = self.pid if master is None else master
        mine = _environment(master)
        return [
            pid for pid in processes.children(master) if processes.alive(pid) and mine and _environment(pid) == mine
        ]

    def processes(self) -> list[int]:
        """Every running process of this server: masters, workers, and what they started."""
        return processes.of_directory(str(self.dir))

    # -- what it says --------------------------------------------------------------------------------------------
    def events(self) -> list[dict[str, Any]]:
        """Every event so far, in order; `n` is its number, `at` its monotonic time."""
        try:
            with open(self.dir / "events.jsonl", "rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            new = b""
        for line in new.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            self._read += len(line)
            self._events.append({**json.loads(line), "n": len(self._events)})
        return list(self._events)

    def mark(self) -> int:
        """This moment among the events, for `wait_for(…, after=mark)`."""
        return len(self.events())

    def wait_for(
        self, name: str | Sequence[str], timeout: float = 60.0, after: int | Mapping[str, Any] = 0, **fields: Any
    ) -> dict[str, Any]:
        """The first event of that name (or one of those names) and those fields after `after`, a mark or an event."""
        names = (name,) if isinstance(name, str) else tuple(name)
        start = after if isinstance(after, int) else after["n"] + 1
        until = time.monotonic() + timeout
        looked = time.monotonic()
        while True:
            for event in self.events()[start:]:
                if event["event"] in names and all(event.get(key) == value for key, value in fields.items()):
                    return event
            now = time.monotonic()
            if now >= until:
                raise Late(f"{' or '.join(names)} {fields or ''} not within {timeout:g} s; {self._lately(start)}")
            if now - looked > 1.0:
                looked = now
                if not self.processes() and not any(each["event"] in names for each in self.events()[start:]):
                    raise AssertionError(
                        f"every process is gone and {' or '.join(names)} never came; {self._lately(start)}"
                    )
            time.sleep(0.01)

    def _lately(self, start: int) -> str:
        return "since then came " + (", ".join(each["event"] for each in self.events()[start:]) or "nothing")

    @property
    def state_dir(self) -> Path:
        return self.dir / "gunicorn.gracehooks"

    def status(self) -> dict[str, Any]:
        """status.json, as it is now."""
        return json.loads((self.state_dir / "status.json").read_text())

    def history(self) -> list[dict[str, Any]]:
        """history.jsonl; empty before the first line."""
        try:
            text = (self.state_dir / "history.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def log(self) -> str:
        """What masters and workers wrote so far."""
        if self._kept_log is not None:
            return self._kept_log
        return (self.dir / "server.log").read_text(errors="replace")

    # -- talking to it -------------------------------------------------------------------------------------------
    def get(self, path: str = "/", timeout: float = 60.0, method: str = "GET", body: bytes | None = None) -> Answer:
        """Ask once, on a new connection."""
        connection = _Connection(self.address, timeout)
        try:
            connection.request(method, path, body=body, headers={"Connection": "close"})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def write(self, name: str, text: str) -> Path:
        """Write a file of the server's directory; `app.py` and `version.txt` make the next release."""
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def configure(self, config: str) -> None:
        """Write the configuration file anew, as `serve(config=…)` wrote it, for the next reload or upgrade."""
        (self.dir / "gunicorn.conf.py").write_text(self._config_head + textwrap.dedent(config))

    def upgrade(self, timeout: float = 60.0) -> dict[str, Any]:
        """Send USR2 and wait for the verdict: UpgradeCompleted, UpgradeRolledBack or UpgradeRefused."""
        mark = self.mark()
        self.signal("USR2")
        return self.wait_for(VERDICTS, timeout, after=mark)

    def reload(self, timeout: float = 60.0) -> dict[str, Any]:
        """Send HUP and wait for the verdict."""
        mark = self.mark()
        self.signal("HUP")
        return self.wait_for(VERDICTS, timeout, after=mark)

    def cli(self, *args: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run `gracehooks …` on this server: give the target yourself, `--pidfile server.pidfile` say."""
        return subprocess.run(
            [self.python, "-m", "gracehooks", *args],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.dir,
            env=self.environment,
            check=False,
        )

    # -- the end -------------------------------------------------------------------------------------------------
    def wait_gone(self, pid: int, timeout: float = 60.0) -> int | None:
        """Wait until the process has ended; its exit code, or None where the kernel told it to somebody else."""

        def ended() -> bool:
            self._reap_once()
            return not processes.alive(pid)

        eventually(ended, timeout, f"the end of process {pid}")
        self._reap_once()
        return self.exit_codes.get(pid)

    def stop(self, timeout: float = 60.0) -> int | None:
        """TERM to the master, wait for its end; its exit code."""
        pid = self.pid
        self.signal("TERM", pid)
        code = self.wait_gone(pid, timeout)
        self.clean = True
        return code

    def close(self, patience: float = 5.0) -> list[int]:
        """End everything: TERM, then KILL; the processes that a clean stop left behind, by their pids."""
        pid = self._pidfile()
        if pid and processes.alive(pid):
            processes.kill([pid], signal.SIGTERM)
            try:
                self.wait_gone(pid, patience)
                self.clean = True
            except Late:
                pass
        left: list[int] = []
        try:
            # Those that see the end of their master by themselves get a moment for it.
            eventually(lambda: not self.processes(), 3.0 if self.clean else 0.0)
        except Late:
            left = self.processes()
        until = time.monotonic() + 10
        while (rest := self.processes()) and time.monotonic() < until:
            processes.kill(rest)
            time.sleep(0.02)
            self._reap_once()
        self._reap_once()
        self._closed.set()
        self._reaper.join()
        self.events()
        self._kept_log = self.log()
        if self.processes():
            raise AssertionError(f"processes that not even SIGKILL ends: {self.processes()}")
        return left if self.clean else []


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def hold_port(family: int, host: str) -> socket.socket:
    """A bound socket that never listens: the kernel gives its port to nobody who asks for any, and gunicorn may bind it."""
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind((host, 0))
    return held


def _make_certificate(directory: Path) -> None:
    """A certificate for localhost and its key, as `cert.pem` and `key.pem`."""
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    command = ["openssl", "req", "-x509", *kind, *files, "-subj", "/CN=localhost"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@contextmanager
def serve(
    app: str = "",
    config: str = "",
    worker: str | None = "gracehooks.Worker",
    workers: int = 2,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
    module: bool = False,
    *,
    bind: str = "tcp",
    files: Mapping[str, str] | None = None,
    target: str = "app:app",
    answers: str | None = "/",
    command: Sequence[str] | None = None,
    cwd: str = "",
    prepare: Callable[[Path], object] | None = None,
    leftovers: bool = False,
    tls: bool = False,
) -> Iterator[Server]:
    """A real gunicorn, serving.

    `app` is a source for app.py (by default the catalogue's, WSGI or ASGI as `worker` needs it); `config` is appended to
    the kit's own configuration, so it may use and change what stands there (`bind`, `gracehooks`). `module` starts it as
    `python -m gunicorn`. `bind` is "tcp", "tcp6" or "unix". `answers` is the path that must answer below 500 before the
    block begins; None does not wait. `command` replaces the whole command line (`{config}`, `{target}`, `{address}` and
    `{directory}` stand for the file, the application, where to listen, and the server's directory). `cwd` is where it is
    started, below its directory, and may go through a symbolic link; `prepare` makes what must be there before.
    `leftovers` allows processes to outlive a clean stop (they are killed all the same). `tls` makes a certificate, and the
    server and its clients speak TLS. With TEST_KEEP=1 the directory of one that failed stays, its whole log within.
    """
    processes.be_subreaper()
    directory = Path(tempfile.mkdtemp(prefix="gracekit-")).resolve()
    held: socket.socket | None = None
    if bind == "unix":
        address = Address("unix", path=str(directory / "gunicorn.sock"))
    else:
        family, host = (socket.AF_INET6, "::1") if bind == "tcp6" else (socket.AF_INET, "127.0.0.1")
        held = hold_port(family, host)
        address = Address("tcp6" if bind == "tcp6" else "tcp", host, held.getsockname()[1], tls=tls)
    name = worker or ""
    asynchronous = any(part in name.lower() for part in ("asgi", "uvicorn"))
    threaded = name in ("gracehooks.Worker", "gthread")
    head = _CONFIG.format(
        bind=str(address),
        workers=workers,
        worker=worker or "sync",
        threads="threads = 4" if threaded else "",
        pidfile=str(directory / "gunicorn.pid"),
        control=str(directory / "gunicorn.ctl"),
        events=str(directory / "events.jsonl"),
    )
    if tls:
        head += "certfile, keyfile = 'cert.pem', 'key.pem'\n"
        _make_certificate(directory)
    (directory / "app.py").write_text(textwrap.dedent(app) if app else (apps.ASGI if asynchronous else apps.WSGI))
    (directory / "gunicorn.conf.py").write_text(head + textwrap.dedent(config))
    for each, text in (files or {}).items():
        (directory / each).parent.mkdir(parents=True, exist_ok=True)
        (directory / each).write_text(textwrap.dedent(text))
    if command is None:
        script = Path(python).parent / "gunicorn"
        start = [python, "-m", "gunicorn"] if module or not script.exists() else [python, str(script)]
        command = [*start, "-c", "gunicorn.conf.py", *args, target]
    else:
        places = {"config": "gunicorn.conf.py", "target": target, "address": address, "directory": directory}
        command = [part.format(**places) for part in command]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("GRACEHOOKS_", "GUNICORN_"))},
        "PYTHONDONTWRITEBYTECODE": "1",  # a release of the same second and size would run from the old cache
        "PYTHONUNBUFFERED": "1",
        "XDG_RUNTIME_DIR": str(directory / "run"),
        "TMPDIR": str(directory / "tmp"),
        processes.MARK: str(directory),
        **(env or {}),
    }
    for private in ("run", "tmp"):
        (directory / private).mkdir(mode=0o700)
    where = directory / cwd
    if cwd:
        environment["PWD"] = str(where)  # as a shell that went there has it: gunicorn keeps the link by it
    if prepare is not None:
        prepare(directory)
    server = Server(directory, address, command, where, python, environment, head)
    recent.append(server)
    failed = True
    try:
        if answers is not None:
            server.wait_until_it_answers(answers)
        yield server
        failed = False
    finally:
        try:
            left = server.close()
        finally:
            if held is not None:
                held.close()
            if not (failed and os.environ.get("TEST_KEEP")):
                shutil.rmtree(directory, ignore_errors=True)
    if left and not failed and not leftovers:
        raise AssertionError(f"a clean stop left processes behind: {left}")
