"""Performs what the machine decides: one loop, one thread, every wait with its end beside it.

What must hold: each turn hears the masters first, then reaps, then takes signals, so that a successor's word counts before
its predecessor's end; no error of ours ends the anchor while a server runs; a signal whose handler the master has not yet
set up waits for that, since its default action would end the master.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Sequence

from gracehooks import processes
from gracehooks.anchor import family, kernel, launch, renewal
from gracehooks.anchor.harbour import Berth, Harbour
from gracehooks.anchor.lines import ADDRESS, KEPT
from gracehooks.anchor.machine import (
    STOPS,
    Action,
    Alone,
    End,
    Exited,
    Fact,
    Forward,
    KillAll,
    Machine,
    Master,
    Phase,
    Renew,
    Say,
    Signalled,
    SignalStrays,
    Start,
    Started,
    TimePassed,
    Vanished,
)
from gracehooks.anchor.say import say

__all__ = ["HANDLED", "Anchor", "main"]

HANDLED = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGWINCH,
    signal.SIGCHLD,
}
#: The longest sleep, while a signal waits for its handler, and how many may wait.
LONGEST_SLEEP, POLL, MOST_WAITING = 60.0, 0.1, 64
#: How long a rehearsal of the new files may take, in seconds.
REHEARSAL = 20.0
#: What concerns one process only: the command that we start is nobody's successor.
NOT_INHERITED = ("GUNICORN_PID", "GUNICORN_FD", "GRACEHOOKS_HANDOVER", renewal.STATE, KEPT)


class Anchor:
    """The running anchor of `command`."""

    def __init__(self, command: list[str], machine: Machine, harbour: Harbour, directory: str) -> None:
        self.command = command
        self.machine = machine
        self.harbour = harbour
        self.directory = directory
        self.environ = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        self.environ["GRACEHOOKS_ANCHOR"] = str(os.getpid())
        self.environ.pop(ADDRESS, None)
        if harbour.address is not None:
            self.environ[ADDRESS] = harbour.address
        self.mask: set[int] = set()
        self.waiting: list[int] = []  # signals whose handlers the master has not set up yet
        self.files = renewal.fingerprint()
        self.rehearsing = 0
        self.rehearsal_until = 0.0
        self.code: int | None = None
        self._selector = selectors.DefaultSelector()
        self._awake, self._wake = os.pipe()

    # -- the loop ------------------------------------------------------------------------------------------------
    def run(self, fresh: bool) -> int:
        """Start the command, unless it runs already, and stay until it is over; the exit code."""
        self._listen()
        if fresh:
            self._perform(Start())
        troubles = 0
        while self.code is None:
            try:
                self._turn()
                troubles = 0
            except Exception as error:  # noqa: BLE001 - the server must not lose its parent by an error of ours
                troubles += 1
                say(f"{type(error).__name__}: {error} (the server is not affected)", "ERROR")
                time.sleep(min(0.1 * troubles, 5.0))
        return self.code

    def _listen(self) -> None:
        for fd in (self._awake, self._wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for each in HANDLED:
            signal.signal(each, _record)
        self._selector.register(self._awake, selectors.EVENT_READ)
        if self.harbour.door is not None:
            self._selector.register(self.harbour.door, selectors.EVENT_READ)
        for berth in self.harbour.berths:
            self._selector.register(berth.line, selectors.EVENT_READ)
        self.mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED) - HANDLED
        os.write(self._wake, bytes([signal.SIGCHLD]))  # whoever ended before the handlers stood

    def _turn(self) -> None:
        self._selector.select(self._sleep())
        signals = self._signals()
        for berth, fact in self.harbour.arrivals(self._forget, self.machine.child):
            self._selector.register(berth.line, selectors.EVENT_READ)
            self._take(fact)
        for berth in list(self.harbour.berths):
            for fact in self.harbour.hear(berth, self._forget):
                self._take(fact)
        self.harbour.hold(self.machine.current)
        self._reap()
        for number in signals:
            if number != signal.SIGCHLD:
                self._take(Signalled(number))
        self._take(TimePassed())
        self._deliver()

    def _sleep(self) -> float:
        now, ends = time.monotonic(), [LONGEST_SLEEP]
        if self.machine.until is not None:
            ends.append(self.machine.until - now)
        if self.waiting:
            ends.append(POLL)
        if self.rehearsing:
            ends.append(self.rehearsal_until - now)
        return max(0.0, min(ends))

    def _signals(self) -> bytes:
        try:
            return os.read(self._awake, 4096)
        except BlockingIOError:
            return b""

    def _forget(self, berth: Berth) -> None:
        self._selector.unregister(berth.line)

    def _masters(self) -> tuple[Master, ...]:
        machine = self.machine
        return family.masters(self.harbour.masters(), {machine.current, *machine.retired})

    def _reap(self) -> None:
        ended: list[tuple[int, int]] = []
        alone = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                alone = True
                break
            if pid == 0:
                break
            code = os.waitstatus_to_exitcode(status)
            ended.append((pid, code if code >= 0 else 128 - code))
        for pid, code in ended:
            if pid == self.rehearsing:
                self._rehearsed(code)
            elif self.machine.knows(pid):
                self._take(Exited(pid, code, self._masters()))
        if alone:
            self._take(Alone())
        elif self.rehearsing and time.monotonic() >= self.rehearsal_until:
            processes.signal_process(self.rehearsing, signal.SIGKILL)

    # -- decisions and deeds -------------------------------------------------------------------------------------
    def _take(self, fact: Fact) -> None:
        for action in self.machine.handle(fact, time.monotonic()):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        if isinstance(action, Say):
            say(action.text, action.level)
        elif isinstance(action, Start):
            self._start(action.instead_of)
        elif isinstance(action, Forward):
            self._forward(action)
        elif isinstance(action, SignalStrays):
            self.waiting.clear()
            for pid in family.children():
                if pid not in action.spare:
                    processes.signal_process(pid, action.signal)
        elif isinstance(action, KillAll):
            for pid in processes.tree_of(os.getpid())[1:]:
                processes.signal_process(pid, signal.SIGKILL)
        elif isinstance(action, Renew):
            self._look_for_new_files()
        elif isinstance(action, End):
            self.code = action.code

    def _start(self, instead_of: int) -> None:
        self.waiting.clear()
        sockets = self.harbour.fit_to_inherit() if instead_of else []
        kept = {KEPT: self.harbour.keepsake} if instead_of and self.harbour.keepsake else {}
        try:
            pid = launch.launch(
                self.command,
                {**self.environ, **kept},
                directory=self.directory,
                signals=HANDLED,
                mask=self.mask,
                sockets=sockets,
                instead_of=instead_of,
            )
        except OSError as error:
            say(f"cannot fork: {error}", "ERROR")
            self._take(Started(-1))
            self._take(Exited(-1, os.EX_OSERR, self._masters()))
            return
        self._take(Started(pid))
        what = f" with {len(sockets)} sockets held ({', '.join(self.harbour.names)})" if sockets else ""
        say(f"started {self.command[0]} as {pid}{what}")

    def _forward(self, action: Forward) -> None:
        if action.signal in STOPS:
            self.waiting.clear()
            self._send(action.pid, action.signal)
        elif self.waiting or not family.handles(action.pid, action.signal):
            if len(self.waiting) < MOST_WAITING:
                self.waiting.append(action.signal)
        else:
            self._send(action.pid, action.signal)

    def _deliver(self) -> None:
        """Send what has waited, in its order, to the master that serves by now."""
        if self.machine.phase is not Phase.RUNNING:
            return
        while self.waiting and family.handles(self.machine.current, self.waiting[0]):
            self._send(self.machine.current, self.waiting.pop(0))

    def _send(self, pid: int, number: int) -> None:
        if pid > 0 and not processes.signal_process(pid, number):
            self._take(Vanished(pid, number, self._masters()))

    # -- our own replacement -------------------------------------------------------------------------------------
    def _look_for_new_files(self) -> None:
        if self.rehearsing:
            return
        try:
            found = renewal.fingerprint()
        except OSError as error:
            say(f"cannot look at my own files ({error}); staying as I am", "WARNING")
            return
        if found == self.files:
            return
        self.files = found
        state = renewal.carry(self.machine, self.harbour, self.directory)
        self.rehearsing = launch.launch(
            renewal.arguments(self.command, renewal.REHEARSE),
            {**os.environ, renewal.STATE: state},
            directory="/",
            signals=HANDLED,
            mask=self.mask,
        )
        self.rehearsal_until = time.monotonic() + REHEARSAL

    def _rehearsed(self, code: int) -> None:
        self.rehearsing = 0
        if code != 0:
            say(f"the new files of the anchor do not take over ({code}); staying as I am", "WARNING")
            return
        if self.machine.phase is not Phase.RUNNING:
            return
        say("my own files have changed: executing the new ones in place")
        try:
            state = renewal.carry(self.machine, self.harbour, self.directory)
            renewal.take_over(self.command, state, self.harbour, HANDLED)
        except OSError as error:
            say(f"cannot execute them ({error}); staying as I am", "WARNING")


def _record(*_: object) -> None:
    """The number of the signal is in the wake-up pipe already."""


def main(argv: Sequence[str]) -> int:
    """The anchor proper: `argv` is what `renewal.arguments` makes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    argv = list(argv)
    options, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    state = os.environ.pop(renewal.STATE, None)
    if renewal.REHEARSE in options:
        renewal.restore(state or "", rehearsal=True)
        return 0
    kernel.load()
    adopts = os.getpid() == 1 or kernel.be_subreaper()
    if state is not None:
        machine, harbour, directory = renewal.restore(state)
    else:
        machine, harbour, directory = Machine(), Harbour.opened(), launch.directory_to_start_in()
        if not adopts:
            say("this system has no child subreaper: an upgrade will end the anchor", "WARNING")
    return Anchor(command, machine, harbour, directory).run(fresh=state is None)
