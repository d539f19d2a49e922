"""Replacing the master: the old side. Starts a successor with the listeners and a channel, and hears what becomes of it.

What must hold: everything that can be checked is checked before the fork; the child of the fork execs or ends, whatever
happens, and never returns into the master's code; a rollback ends the whole successor tree. Until the successor has
attached, its standard error runs through a pipe that this side copies on: its last line is the reason an operator needs.
It relies on GUNICORN_PID, GUNICORN_FD, `Arbiter.START_CTX`, `Chdir.default` and `cfg.env_orig` (tests/contract/test_reexec.py).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from gunicorn.config import Chdir

from gracehooks import processes
from gracehooks.errors import PreflightError
from gracehooks.gunicorn import pidfile
from gracehooks.gunicorn.losses import Losses
from gracehooks.systemd.driver import Speaker
from gracehooks.upgrade.channel import Channel
from gracehooks.upgrade.machine import Fact, Happened

__all__ = ["HANDOVER", "ReexecHost", "command_line", "last_words", "start_directory"]

#: The environment variable that tells a successor what it takes over.
HANDOVER = "GRACEHOOKS_HANDOVER"
#: What concerns one process only and must not reach its successor.
NOT_INHERITED = (
    *("LISTEN_PID", "LISTEN_FDS", "LISTEN_PIDFDID", "GUNICORN_FD", "GUNICORN_PID", HANDOVER),
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),  # the speaker's to hand over
)


def start_script() -> str:
    """The script that the interpreter was started with, as it was written; empty for `python -m gunicorn`."""
    script = sys.orig_argv[1] if len(sys.orig_argv) > 1 else ""
    return "" if script.startswith("-") else script


#: Whether the script stood beside our interpreter when we started: `venv/bin/gunicorn`, started by its first line.
BY_ITS_SCRIPT = bool(start_script()) and (
    os.path.dirname(os.path.realpath(start_script())) == os.path.realpath(os.path.dirname(sys.executable))
)


def interpreter(directory: str) -> str:
    """The interpreter of the successor, which starts in `directory`.

    Where each release has a virtual environment of its own, the script's path goes through a link
    (`current/venv/bin/gunicorn`), and its first line names the new release's interpreter; ours is the old one's.
    """
    if BY_ITS_SCRIPT:
        try:
            with open(os.path.join(directory, start_script()), "rb") as file:
                first = file.readline(4096)
        except OSError:
            return sys.executable
        named = os.fsdecode(first[2:].strip()) if first.startswith(b"#!") else ""
        if os.path.basename(named).startswith(("python", "pypy")) and os.path.isabs(named) and " " not in named:
            return named
    return sys.executable


def command_line(directory: str) -> list[str]:
    """What starts the successor: `sys.orig_argv`, which also has the `-m gunicorn` that `sys.argv` has lost."""
    return [interpreter(directory), *sys.orig_argv[1:]]


def start_directory(arbiter: Any) -> str:
    """Where the successor starts: where this process did, kept as a symbolic link.

    With a `chdir`, on the command line or in the configuration file, the master stands elsewhere by now, and relative
    names on the command line mean the directory that the shell was in: gunicorn's default for `chdir`, read at its import.
    """
    return str(Chdir.default if Chdir.default != arbiter.cfg.chdir else arbiter.START_CTX["cwd"])


def last_words(said: bytes) -> str:
    """The last line that says something: gunicorn puts a traceback in brackets, and its last line is "]"."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if any(map(str.isalnum, line))), "")


class ReexecHost:
    """The host of an upgrade by re-execution; `arbiter` is the serving master."""

    def __init__(self, arbiter: Any, kind: str = "upgrade") -> None:
        self.kind = kind
        self._arbiter = arbiter
        self.pid = 0
        self._channel: Channel | None = None
        self._stderr = -1
        self._said = b""
        self._ready, self._workers = 0, 0
        self._stands = ""
        self._served: set[int] = set()
        self._serving: set[int] = set()
        self._failure = ""
        self._when = "while booting"  #: for the reason of its death
        self._status: int | None = None
        self._told_end = False  #: of the channel, while the process lives
        self._told_death = False

    # -- before the fork ---------------------------------------------------------------------------------------
    def preflight(self) -> None:
        """Raise PreflightError, with the cure, where this master cannot be replaced."""
        arbiter = self._arbiter
        if arbiter.cfg.reuse_port:
            raise PreflightError(
                "reuse_port is set: each worker has listeners of its own, which cannot be handed over; "
                "remove --reuse-port, then upgrade"
            )
        anchored = "GRACEHOOKS_ANCHOR" in os.environ
        if os.getpid() == 1 and not anchored:
            raise PreflightError(
                "this master is PID 1, and the container ends when it leaves; start it as `gracehooks run -- gunicorn …`"
            )
        if os.environ.get("SUPERVISOR_ENABLED") and not anchored:
            raise PreflightError(
                "supervisord follows this pid and would start a duplicate; "
                "write command=gracehooks run -- gunicorn … in its section"
            )
        second = pidfile.second(arbiter) if arbiter.cfg.pidfile is not None else 0
        if second:
            raise PreflightError(
                f"{arbiter.cfg.pidfile}.2 names master {second}, which is still there: a generation that leaves, since the one "
                f"before it was killed; try again when it has gone, or kill -TERM {second}"
            )
        directory = start_directory(arbiter)
        if not os.path.isdir(directory) or not os.access(directory, os.X_OK):
            raise PreflightError(
                f"the start directory {directory} is gone or cannot be entered; restore it, then upgrade"
            )
        python = interpreter(directory)
        if not (os.path.isfile(python) and os.access(python, os.X_OK)):
            raise PreflightError(f"the interpreter {python} is gone; restore the virtual environment, then upgrade")
        script = start_script()
        if script and not os.path.exists(os.path.join(directory, script)):
            raise PreflightError(f"the start script {script} is gone; restore it, then upgrade")

    def launch(self, id: str) -> int:
        """Fork and exec the successor; its pid."""
        arbiter = self._arbiter
        try:
            ours, theirs = socket.socketpair()
            read_end, write_end = os.pipe()
            stderr = os.dup(2)
        except OSError as error:
            raise PreflightError(f"no descriptors are left for an upgrade ({error})") from error
        environ = {key: value for key, value in arbiter.cfg.env_orig.items() if key not in NOT_INHERITED}
        environ.update(arbiter.grace.speaker.environment())
        environ["GUNICORN_PID"] = str(os.getpid())
        environ["GUNICORN_FD"] = ",".join(str(each.fileno()) for each in arbiter.LISTENERS)
        environ[HANDOVER] = json.dumps(
            {
                "parent": os.getpid(),
                "channel": theirs.fileno(),
                "stderr": stderr,
                "generation": arbiter.grace.generation + 1,
                "state_dir": str(arbiter.grace.book.directory),
                "workers": arbiter.num_workers,
                "configured": arbiter.cfg.workers,
                "systemd": bool(arbiter.systemd),
                "own": arbiter.grace.own or [],
                "draining": [each.facts() for each in arbiter.grace.takeover.alive()],
                "id": id,
                "kind": self.kind,
            }
        )
        directory = start_directory(arbiter)
        args = command_line(directory)
        try:
            pid = os.fork()
        except OSError as error:
            for each in (ours, theirs):
                each.close()
            for fd in (read_end, write_end, stderr):
                os.close(fd)
            raise PreflightError(f"the fork failed ({error}); the server serves on") from error
        if pid == 0:
            self._become_successor(theirs, stderr, write_end, directory, args, environ)
        theirs.close()
        os.close(write_end)
        os.close(stderr)
        os.set_blocking(read_end, False)
        self.pid, self._channel, self._stderr = pid, Channel(ours), read_end
        arbiter.reexec_pid = pid
        return pid

    def _become_successor(
        self, channel: socket.socket, stderr: int, pipe: int, directory: str, args: list[str], environ: dict[str, str]
    ) -> None:
        """Run in the child of the fork: exec, or a hard exit with a line that says why."""
        try:
            os.set_inheritable(channel.fileno(), True)
            os.set_inheritable(stderr, True)
            for listener in self._arbiter.LISTENERS:
                os.set_inheritable(listener.fileno(), True)
            os.dup2(pipe, 2)
            self._arbiter.cfg.pre_exec(self._arbiter)
            os.chdir(directory)
            Speaker.adopt(environ)
            os.execve(args[0], args, environ)
        except BaseException as error:  # noqa: BLE001 - nothing may get back into the master's code
            try:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            except OSError:
                pass
        finally:
            os._exit(127)

    # -- what becomes of it ------------------------------------------------------------------------------------
    def numbers(self) -> tuple[int, int]:
        """How many new workers are ready, and how many there will be."""
        return self._ready, self._workers

    def stands(self) -> str:
        """Where one of the workers stands that are not ready."""
        return self._stands

    def ended(self, status: int) -> None:
        """The arbiter has reaped the successor."""
        self._status = status

    def facts(self) -> Iterator[Fact]:
        """What the channel, the pipe and the reaper say."""
        self._copy_stderr()
        if self._channel is not None:
            yield from self._heard(self._channel)
        gone = self._status is not None
        if gone and not self._told_death:
            self._told_death = True
            self._copy_stderr()
            # It may have been replaced already, and killed before it could say so.
            serving = self._arbiter.grace.book.serving_master()
            superseded = serving not in (0, os.getpid(), self.pid) and processes.alive(serving)
            yield Fact(Happened.SUPERSEDED if superseded else Happened.DIED, self._failure or self._death())

    def _heard(self, channel: Channel) -> Iterator[Fact]:
        for message in channel.receive():
            said = message.get("say")
            if said in ("hello", "progress", "ready"):
                self._served.update(message.get("pids", ()))
                self._serving.update(message.get("serving", ()))
                self._ready, self._workers = message["ready"], message["workers"]
                self._stands = str(message.get("stands", ""))
                if said == "ready":
                    self._when = "in its probation"
                    yield Fact(Happened.ALL_READY)
            elif said == "failed":
                self._failure = message["reason"]
                yield Fact(Happened.FAILED, self._failure)
            elif said == "lost":  # it served in the probation, and goes with us
                told = Losses(message["lost"], message["jobs"], message["answered"])
                self._arbiter.grace.pool.lost_elsewhere(self.pid, told)
            elif said == "committed":
                self._when = "while it served"
                yield Fact(Happened.COMMITTED)
            elif said == "superseded":
                yield Fact(Happened.SUPERSEDED)
        if channel.closed and not self._told_end and self._status is None and processes.alive(self.pid):
            # It lives and will never say that it serves; if it is dying, the reaper brings the better reason.
            self._told_end = True
            self._failure = self._failure or "closed the channel without a word"
            yield Fact(Happened.FAILED, self._failure)

    def _copy_stderr(self) -> None:
        while self._stderr >= 0:
            try:
                data = os.read(self._stderr, 65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                os.close(self._stderr)
                self._stderr = -1
                return
            self._said = (self._said + data)[-8192:]
            try:
                os.write(2, data)
            except OSError:
                pass  # our own standard error is gone: nothing to copy to

    def _death(self) -> str:
        how, words = processes.describe_status(self._status or 0), last_words(self._said)
        if self._when == "while it served":
            words = ""  # its log, by now
        return f"ended with {how} {self._when}" + (f": {words}" if words else "")

    # -- what it is told ---------------------------------------------------------------------------------------
    def commit(self) -> None:
        """Tell the successor to take over; the control socket's path is free for it from now on."""
        arbiter = self._arbiter
        arbiter._stop_control_server()
        if self._channel is not None:
            self._channel.send(say="commit", phases=dict(arbiter.grace.driver.last["phases"]))

    def announced(self) -> None:
        """systemd follows the successor from now on: let it know."""
        if self._channel is not None:
            self._channel.send(say="announced")

    def retire(self) -> None:
        """The old workers drain; the successor serves."""
        self._arbiter.grace.retire()

    def roll_back(self, force: bool) -> None:
        """TERM to the successor, or KILL to it and whatever descends from it."""
        tree = [pid for pid in processes.tree_of(self.pid) if pid != self.pid] if self._status is None else []
        if not force:
            self._served.update(tree)
            processes.signal_process(self.pid, signal.SIGTERM)
            processes.signal_process(self.pid, signal.SIGCONT)  # a stopped process takes no TERM
            return
        if self._status is None:
            processes.signal_process(self.pid, signal.SIGKILL)
        for pid in {*tree, *self._served}:
            # Its workers lead groups of their own; one that has left is no longer a child of that master's.
            if processes.alive(pid) and (pid in tree or self._is_orphan_of_ours(pid)):
                processes.kill_group(pid)
                processes.signal_process(pid, signal.SIGKILL)

    def hammer(self) -> None:
        """INT to the successor: it forces its workers, and says what they lost; a forced rollback follows if it does not."""
        processes.signal_process(self.pid, signal.SIGINT)
        processes.signal_process(self.pid, signal.SIGCONT)

    def clear_away(self) -> None:
        """The successor is gone, killed perhaps: its workers that serve finish what they have, the others are killed."""
        for pid in self._served:
            if processes.alive(pid) and self._is_orphan_of_ours(pid):
                if pid in self._serving:
                    self._arbiter.grace.pool.see_out(pid)
                else:
                    processes.kill_group(pid)
                    processes.signal_process(pid, signal.SIGKILL)

    def _is_orphan_of_ours(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return f"GUNICORN_PID={os.getpid()}".encode() in file.read().split(b"\0")
        except OSError:
            return False

    def force_own(self) -> None:
        """Kill what is left of the old workers."""
        self._arbiter.grace.pool.kill("the drain timeout of the upgrade")

    def resume(self) -> None:
        """The old generation serves again, with its pidfile and control socket."""
        self._close()
        self._arbiter.reexec_pid = 0
        self._arbiter.grace.serve_again()

    def detach(self) -> None:
        """The successor has been replaced itself: its end is no reason to come back."""
        self._told_death = True

    def leave(self) -> None:
        """The last old worker has left: report to the successor, then end."""
        grace = self._arbiter.grace
        if self._channel is not None:
            ended = grace.pool.ended
            self._channel.send(say="drained", lost=ended.lost, jobs=ended.jobs, answered=ended.answered)
            self._channel.flush_within(1.0)
        grace.leave()

    def _close(self) -> None:
        self._copy_stderr()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def descriptors(self) -> list[int]:
        """What a worker must not keep."""
        found = [self._stderr] if self._stderr >= 0 else []
        if self._channel is not None and self._channel.fileno() >= 0:
            found.append(self._channel.fileno())
        return found
