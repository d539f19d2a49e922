"""What the anchor decides: facts in, actions out. Reads no clock, sends no signal, knows no process but by its number.

What must hold: signals go to one master, the one that serves; that master's end is an end only when nobody has taken over
and it was meant (exit code 0, a stop, or a start that failed by itself); every other end is followed by a start, later
and later, and not for ever; a stop ends by its bound, whatever the processes do.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Iterable

__all__ = [
    "Action",
    "Alone",
    "End",
    "Exited",
    "Fact",
    "Forward",
    "KillAll",
    "Machine",
    "Master",
    "Moored",
    "Phase",
    "Renew",
    "Say",
    "Serving",
    "SignalStrays",
    "Signalled",
    "Start",
    "Started",
    "TimePassed",
    "Vanished",
]

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
#: What ends the waiting between two starts: the operator has mended something.
NOW = (signal.SIGHUP, signal.SIGUSR2)
#: How long a stop may last where no master has said its budget, and after INT or QUIT, in seconds.
UNKNOWN_BUDGET, QUICK = 600.0, 40.0
#: What a master gets beyond its own bound before it is killed, and what the kernel gets to end what was killed. Less than
#: the 5 s that the supervisor adds to the budget: the anchor is to be the first.
MARGIN = 3.0
#: The waits between starts, in seconds: none, then the first, doubled up to the longest.
BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
#: So many deaths in a row without ever being ready, and the anchor ends with the last code.
MOST_DEATHS = 5
#: A master that says nothing counts as ready after this time; one that served so long has earned a start without wait.
SETTLED, EARNED = 10.0, 60.0


class Phase(enum.Enum):
    """Where the anchor is; the only ways are the ones in `Machine`."""

    RUNNING = "running"  #: a master is there
    WAITING = "waiting"  #: none is; the next start has its moment
    STOPPING = "stopping"  #: a stop was passed on
    LEAVING = "leaving"  #: the last master has gone for good; others may still be finishing
    KILLING = "killing"  #: the bound has passed
    ENDED = "ended"


class Record:
    """A plain value: equal to another of its class with the same parts. (`dataclasses` would cost the anchor a fifth of its
    memory and half of its start-up.)
    """

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, each) == getattr(other, each) for each in self.__slots__)

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, each) for each in self.__slots__)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{each}={getattr(self, each)!r}' for each in self.__slots__)})"


class Master(Record):
    """A master seen alive; `successor_of` is the pid of the one that started it, 0 where unknown."""

    __slots__ = ("moored", "pid", "started", "successor_of")

    def __init__(self, pid: int, moored: bool = False, successor_of: int = 0, started: int = 0) -> None:
        self.pid, self.moored, self.successor_of, self.started = pid, moored, successor_of, started


class Fact(Record):
    """What has happened."""

    __slots__ = ()


class Signalled(Fact):
    """The anchor got this signal."""

    __slots__ = ("signal",)

    def __init__(self, signal: int) -> None:
        self.signal = signal


class Started(Fact):
    """The command was started as this process."""

    __slots__ = ("pid",)

    def __init__(self, pid: int) -> None:
        self.pid = pid


class Moored(Fact):
    """A process has said that it is a master."""

    __slots__ = ("pid",)

    def __init__(self, pid: int) -> None:
        self.pid = pid


class Serving(Fact):
    """A master has said that it is the serving one from now on, and how long a stop may take it, in seconds."""

    __slots__ = ("pid", "stop_budget")

    def __init__(self, pid: int, stop_budget: float | None = None) -> None:
        self.pid, self.stop_budget = pid, stop_budget


class Exited(Fact):
    """A child that matters has ended with this code (128 + n for signal n); `masters` are all that were alive just after."""

    __slots__ = ("code", "masters", "pid")

    def __init__(self, pid: int, code: int, masters: tuple[Master, ...] = ()) -> None:
        self.pid, self.code, self.masters = pid, code, masters


class Vanished(Fact):
    """A signal found nobody: its master had ended, and another process is the one to take its exit code."""

    __slots__ = ("masters", "pid", "signal")

    def __init__(self, pid: int, signal: int, masters: tuple[Master, ...] = ()) -> None:
        self.pid, self.signal, self.masters = pid, signal, masters


class Alone(Fact):
    """No child is left."""

    __slots__ = ()


class TimePassed(Fact):
    """Nothing but time."""

    __slots__ = ()


class Action(Record):
    """What is to be done."""

    __slots__ = ()


class Start(Action):
    """Start the command, with the sockets that are held; `instead_of` is the pid of the master before, 0 for the first."""

    __slots__ = ("instead_of",)

    def __init__(self, instead_of: int = 0) -> None:
        self.instead_of = instead_of


class Forward(Action):
    """Send the signal to the master."""

    __slots__ = ("pid", "signal")

    def __init__(self, pid: int, signal: int) -> None:
        self.pid, self.signal = pid, signal


class SignalStrays(Action):
    """Send the signal to every child but these, which are leaving by themselves."""

    __slots__ = ("signal", "spare")

    def __init__(self, signal: int, spare: frozenset[int] = frozenset()) -> None:
        self.signal, self.spare = signal, spare


class KillAll(Action):
    """SIGKILL to every descendant."""

    __slots__ = ()


class Renew(Action):
    """A new generation serves: look whether the anchor itself has been replaced on disk."""

    __slots__ = ()


class End(Action):
    """End with this code."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class Say(Action):
    """A line for the operator."""

    __slots__ = ("level", "text")

    def __init__(self, text: str, level: str = "INFO") -> None:
        self.text, self.level = text, level


class Machine:
    """The anchor's state; `handle` takes one fact and the moment, in monotonic seconds."""

    def __init__(self) -> None:
        self.phase = Phase.RUNNING
        self.current = 0  #: the master that serves, or is to serve
        self.child = 0  #: what was started last: the current master, or what wraps it
        self.retired: set[int] = set()  #: masters that served and handed over, while they live
        self.moored = False  #: whether the current master speaks to the anchor
        self.served = False  #: whether it has said that it serves
        self.ever_served = False
        self.since = 0.0  #: when the current master came
        self.deaths = 0  #: in a row, without being ready
        self.quick_deaths = 0  #: in a row, without having earned a start without wait
        self.stop_budget: float | None = None
        self.stop_signal = 0
        self.until: float | None = None  #: when the phase ends by itself
        self.code: int | None = None

    # -- facts ---------------------------------------------------------------------------------------------------
    def handle(self, fact: Fact, now: float) -> list[Action]:
        """What is to be done about `fact`."""
        if self.phase is Phase.ENDED:
            return []
        if isinstance(fact, Signalled):
            return self._signalled(fact.signal, now)
        if isinstance(fact, Started):
            return self._started(fact.pid, now)
        if isinstance(fact, Moored):
            return self._moored(fact.pid, now)
        if isinstance(fact, Serving):
            return self._serving(fact, now)
        if isinstance(fact, Exited):
            return self._exited(fact, now)
        if isinstance(fact, Vanished):
            return self._vanished(fact, now)
        if isinstance(fact, Alone):
            return self._alone()
        return self._time_passed(now)

    def knows(self, pid: int) -> bool:
        """Whether the end of this process can matter: any other child is an orphan, which is only reaped."""
        return pid in (self.current, self.child) or pid in self.retired

    def _signalled(self, sig: int, now: float) -> list[Action]:
        if sig not in STOPS:
            if self.phase is Phase.RUNNING:
                return [Forward(self.current, sig)]
            return self._start_again() if self.phase is Phase.WAITING and sig in NOW else []
        name = signal.Signals(sig).name
        if self.phase is Phase.RUNNING:
            self.phase, self.stop_signal = Phase.STOPPING, sig
            bound = self._bound(sig)
            self.until = now + bound
            return [
                Say(f"{name}: master {self.current} has {bound:g} s to stop"),
                Forward(self.current, sig),
            ]
        if self.phase is Phase.WAITING:
            return [Say(f"{name}: stopped while no master ran"), *self._leave(0, now)]
        if sig == signal.SIGTERM:
            return []  # a stop is under way
        if self.phase is Phase.STOPPING:
            self.stop_signal = sig
            self.until = min(self.until or now, now + self._bound(sig))
            return [Forward(self.current, sig)]
        if self.phase is Phase.LEAVING:
            self.until = min(self.until or now, now + MARGIN)
            return [SignalStrays(sig)]
        return []

    def _started(self, pid: int, now: float) -> list[Action]:
        self.phase, self.until = Phase.RUNNING, None
        self.current = self.child = pid
        self.moored = self.served = False
        self.since = now
        return []

    def _moored(self, pid: int, now: float) -> list[Action]:
        if pid == self.current:
            self.moored = True
        elif self.phase is Phase.WAITING:
            return self._follow(Master(pid, moored=True), now, "it was on its way when its master died")
        elif self.current == self.child and not self.moored and self.phase is Phase.RUNNING:
            self.current, self.moored = pid, True  # the command is a wrapper that waits for its master
        return []

    def _serving(self, fact: Serving, now: float) -> list[Action]:
        pid = fact.pid
        if self.phase in (Phase.LEAVING, Phase.KILLING):
            return []
        if fact.stop_budget is not None:
            self.stop_budget = fact.stop_budget
        before = self.current
        self.moored = self.served = self.ever_served = True
        self.deaths = 0
        self.retired.discard(pid)
        if pid == before:
            return []
        if self.phase is Phase.WAITING:
            self.phase, self.until = Phase.RUNNING, None
        else:
            self.retired.add(before)
        self.current, self.since = pid, now
        actions: list[Action] = [Say(f"master {pid} serves now, after {before}")]
        if self.phase is Phase.STOPPING:
            return [*actions, Forward(pid, self.stop_signal)]
        return [*actions, Renew()]

    def _exited(self, fact: Exited, now: float) -> list[Action]:
        alive = {each.pid for each in fact.masters}
        self.retired &= alive
        if self.phase in (Phase.LEAVING, Phase.WAITING):
            return []
        lost = fact.pid == self.current or self.current not in alive
        if self.phase is Phase.KILLING:
            if fact.pid == self.current:
                self.code = fact.code
            return []
        return self._current_ended(fact, now) if lost else []

    def _current_ended(self, fact: Exited, now: float) -> list[Action]:
        how = f"master {self.current} ended ({_in_words(fact.code)})"
        if self.phase is Phase.STOPPING:
            return [Say(how), *self._leave(fact.code, now)]
        heir = self._heir({fact.pid, self.current}, fact.masters)
        if heir is not None:
            return self._follow(heir, now, how)
        ready = self.served or (not self.moored and now - self.since >= SETTLED)
        self.ever_served = self.ever_served or ready
        if fact.code == 0:
            return [Say(f"{how} and nobody took over: the server has stopped"), *self._leave(0, now)]
        if not self.ever_served and fact.code < 128:
            return [Say(f"{how} before it ever served", "ERROR"), *self._leave(fact.code, now)]
        self.deaths = 0 if ready else self.deaths + 1
        self.quick_deaths = 0 if ready and now - self.since >= EARNED else self.quick_deaths + 1
        if self.deaths >= MOST_DEATHS:
            text = (
                f"{how}, {self.deaths} times in a row without being ready; giving up. Mend the release and start again"
            )
            return [Say(text, "ERROR"), *self._leave(fact.code, now)]
        wait = min(BACKOFF * 2 ** (self.quick_deaths - 2), LONGEST_BACKOFF) if self.quick_deaths > 1 else 0.0
        self.phase, self.until = Phase.WAITING, now + wait
        when = f"in {wait:g} s" if wait else "now"
        text = f"{how} and nobody took over: starting the command again {when}"
        return [Say(text, "ERROR"), *([] if wait else self._start_again())]

    def _vanished(self, fact: Vanished, now: float) -> list[Action]:
        if fact.pid != self.current or self.phase not in (Phase.RUNNING, Phase.STOPPING):
            return []
        alive = {each.pid: each for each in fact.masters if each.pid != fact.pid}
        heir = self._heir({fact.pid}, alive.values())
        if heir is None and alive.keys() & self.retired:
            heir = alive[max(alive.keys() & self.retired)]  # the one before it, which sees its end and resumes
        if heir is None:
            return []
        self._take(heir, now)
        return [Say(f"master {fact.pid} is gone; {heir.pid} gets its signals"), Forward(heir.pid, fact.signal)]

    def _alone(self) -> list[Action]:
        if self.phase in (Phase.LEAVING, Phase.KILLING):
            return self._end()
        return []

    def _time_passed(self, now: float) -> list[Action]:
        if self.until is None or now < self.until:
            return [KillAll()] if self.phase is Phase.KILLING else []
        if self.phase is Phase.WAITING:
            return self._start_again()
        if self.phase in (Phase.STOPPING, Phase.LEAVING):
            self.phase, self.until = Phase.KILLING, now + MARGIN
            return [Say("the bound of the stop has passed: killing what is left", "ERROR"), KillAll()]
        return self._end()

    # -- what follows --------------------------------------------------------------------------------------------
    def _bound(self, sig: int) -> float:
        budget = UNKNOWN_BUDGET if self.stop_budget is None else self.stop_budget
        return (budget if sig == signal.SIGTERM else min(budget, QUICK)) + MARGIN

    def _heir(self, dead: set[int], masters: Iterable[Master]) -> Master | None:
        """Who takes over: a master that spoke up, else one that one of `dead` started; never one that is leaving."""
        able = [each for each in masters if each.pid not in dead and each.pid not in self.retired]
        able = [each for each in able if each.moored or each.successor_of in dead]
        return min(able, key=lambda each: (not each.moored, each.successor_of not in dead, each.started), default=None)

    def _take(self, heir: Master, now: float) -> None:
        self.current, self.moored, self.served, self.since = heir.pid, heir.moored, False, now
        self.retired.discard(heir.pid)

    def _follow(self, heir: Master, now: float, how: str) -> list[Action]:
        self.phase, self.until = Phase.RUNNING, None
        self._take(heir, now)
        return [Say(f"{how}; following master {heir.pid}"), Renew()]

    def _start_again(self) -> list[Action]:
        self.phase, self.until = Phase.RUNNING, None
        return [Start(self.current)]

    def _leave(self, code: int, now: float) -> list[Action]:
        """The last master has gone: wait for those that are finishing, tell the rest to go."""
        if self.phase is not Phase.STOPPING:
            self.until = now + self._bound(signal.SIGTERM)
        sig = self.stop_signal or signal.SIGTERM
        self.phase, self.code = Phase.LEAVING, code
        return [SignalStrays(sig, frozenset(self.retired))]

    def _end(self) -> list[Action]:
        self.phase, self.until = Phase.ENDED, None
        return [End(128 + signal.SIGKILL if self.code is None else self.code)]


def _in_words(code: int) -> str:
    if code <= 128:
        return f"exit code {code}"
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"exit code {code}"
