"""The anchor's decisions, as histories: facts with their moments, and what must be done about each."""

from __future__ import annotations

import signal
from collections.abc import Iterable

import pytest

from gracehooks.anchor.machine import (
    BACKOFF,
    LONGEST_BACKOFF,
    MARGIN,
    MOST_DEATHS,
    QUICK,
    UNKNOWN_BUDGET,
    Action,
    Alone,
    End,
    Exited,
    Fact,
    Forward,
    KillAll,
    Machine,
    Master,
    Moored,
    Phase,
    Renew,
    Say,
    Serving,
    Signalled,
    SignalStrays,
    Start,
    Started,
    TimePassed,
    Vanished,
)

TERM, INT, HUP, USR1, USR2, KILL = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGKILL,
)
KILLED = 128 + KILL


class Story:
    """A machine and its clock."""

    def __init__(self, *facts: Fact) -> None:
        self.machine = Machine()
        self.now = 1000.0
        for fact in facts:
            self.then(fact)

    def then(self, fact: Fact, after: float = 0.0) -> list[Action]:
        """What is done about `fact`, `after` seconds later; the lines for the operator left out."""
        self.now += after
        return [each for each in self.machine.handle(fact, self.now) if not isinstance(each, Say)]

    @property
    def current(self) -> int:
        return self.machine.current


def serving(pid: int = 10, budget: float | None = 60.0) -> Story:
    """A first master that serves."""
    return Story(Started(pid), Moored(pid), Serving(pid, budget))


def seen(*masters: int | Master) -> tuple[Master, ...]:
    return tuple(each if isinstance(each, Master) else Master(each, moored=True) for each in masters)


def left(code: int = 0, spare: Iterable[int] = (), sig: int = TERM) -> list[Action]:
    return [SignalStrays(sig, frozenset(spare))]


# -- signals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["HUP", "USR1", "USR2", "TTIN", "TTOU", "WINCH"])
def test_a_signal_goes_to_the_master(name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    assert serving().then(Signalled(number)) == [Forward(10, number)]


def test_a_stop_is_passed_on_and_its_code_is_mirrored() -> None:
    story = serving()
    assert story.then(Signalled(TERM)) == [Forward(10, TERM)]
    assert story.then(Exited(10, 0), after=3) == left()
    assert story.then(Alone()) == [End(0)]
    assert story.machine.phase is Phase.ENDED
    assert story.then(Signalled(TERM)) == []


def test_a_second_term_changes_nothing_and_int_makes_haste() -> None:
    story = serving(budget=300)
    story.then(Signalled(TERM))
    assert story.then(Signalled(TERM), after=1) == []
    assert story.then(Signalled(INT)) == [Forward(10, INT)]
    assert story.machine.until == story.now + QUICK + MARGIN


@pytest.mark.parametrize(("budget", "bound"), [(60.0, 60.0), (None, UNKNOWN_BUDGET)])
def test_a_stop_that_lasts_too_long_is_ended_by_force(budget: float | None, bound: float) -> None:
    story = serving(budget=budget)
    story.then(Signalled(TERM))
    assert story.then(TimePassed(), after=bound + MARGIN - 0.1) == []
    assert story.then(TimePassed(), after=0.2) == [KillAll()]
    assert story.then(Exited(10, KILLED)) == []
    assert story.then(TimePassed()) == [KillAll()], "whoever was born or adopted meanwhile"
    assert story.then(Alone()) == [End(KILLED)]


def test_what_not_even_a_kill_ends_does_not_hold_the_anchor() -> None:
    story = serving()
    story.then(Signalled(TERM))
    story.then(TimePassed(), after=100)
    assert story.then(TimePassed(), after=MARGIN) == [End(KILLED)]


def test_other_signals_during_a_stop_are_not_passed_on() -> None:
    story = serving()
    story.then(Signalled(TERM))
    assert story.then(Signalled(USR2)) == []


# -- generations -------------------------------------------------------------------------------------------------
def test_signals_go_to_the_new_master_as_soon_as_it_serves() -> None:
    story = serving(10)
    assert story.then(Moored(20)) == []
    assert story.then(Signalled(HUP)) == [Forward(10, HUP)], "the new one has not proved itself"
    assert story.then(Serving(20, 60.0)) == [Renew()]
    assert story.then(Signalled(USR2)) == [Forward(20, USR2)]
    assert story.then(Exited(10, 0, seen(20)), after=30) == [], "the old one has drained"
    assert story.current == 20


def test_a_successor_that_never_served_changes_nothing() -> None:
    story = serving(10)
    story.then(Moored(20))
    assert story.then(Exited(20, 3, seen(10))) == []
    assert story.current == 10
    assert story.then(Signalled(USR2)) == [Forward(10, USR2)]


def test_the_old_master_dies_while_its_successor_boots() -> None:
    story = serving(10)
    story.then(Moored(20))
    assert story.then(Exited(10, KILLED, seen(20))) == [Renew()]
    assert story.current == 20


def test_a_stock_master_is_followed_by_its_environment() -> None:
    story = Story(Started(10))
    stranger, heir = Master(30, successor_of=7, started=5), Master(20, successor_of=10, started=9)
    job = Master(40, successor_of=10, started=11)
    assert story.then(Exited(10, 0, (stranger, job, heir)), after=60) == [Renew()]
    assert story.current == 20, "the oldest of them: a job of a worker shows the same environment"


def test_one_that_is_draining_does_not_inherit() -> None:
    story = serving(10)
    story.then(Serving(20))
    story.then(Serving(30))
    assert story.then(Exited(30, KILLED, seen(10))) == [Start(30)]


def test_the_old_master_serves_again() -> None:
    story = serving(10)
    story.then(Serving(20))
    assert story.then(Serving(10)) == [Renew()]
    assert story.then(Signalled(HUP)) == [Forward(10, HUP)]
    assert story.then(Exited(20, KILLED, seen(10))) == []


def test_a_signal_for_a_new_master_that_has_just_died_goes_to_the_old_one() -> None:
    story = serving(10)
    story.then(Serving(20))
    assert story.then(Vanished(20, HUP, seen(10))) == [Forward(10, HUP)]
    assert story.current == 10


def test_a_stop_at_the_moment_of_the_handover_reaches_both() -> None:
    story = serving(10)
    assert story.then(Signalled(TERM)) == [Forward(10, TERM)]
    assert story.then(Serving(20)) == [Forward(20, TERM)]
    assert story.then(Exited(10, 0, seen(20))) == []
    assert story.then(Exited(20, 0)) == left()


def test_a_stop_waits_for_an_older_generation() -> None:
    story = serving(10)
    story.then(Serving(20))
    story.then(Signalled(TERM))
    assert story.then(Exited(20, 0, seen(10))) == left(spare={10})
    assert story.then(Exited(10, 0)) == []
    assert story.then(Alone()) == [End(0)]


def test_a_wrapper_is_not_the_master() -> None:
    story = Story(Started(10), Moored(11), Serving(11, 5.0))
    assert story.then(Signalled(USR2)) == [Forward(11, USR2)]
    assert story.then(Exited(10, KILLED)) == [Start(11)], "the shell mirrors the code of its child"


# -- ends --------------------------------------------------------------------------------------------------------
def test_a_clean_end_without_a_stop_is_an_end() -> None:
    story = serving()
    assert story.then(Exited(10, 0), after=5) == left()
    assert story.then(Alone()) == [End(0)]


@pytest.mark.parametrize("code", [1, 3, 4, 127])
def test_a_first_start_that_fails_by_itself_is_the_supervisors_business(code: int) -> None:
    story = Story(Started(10))
    assert story.then(Exited(10, code), after=1) == left()
    assert story.then(Alone()) == [End(code)]


def test_a_killed_master_is_started_again_at_once_then_later_and_later() -> None:
    story = serving()
    assert story.then(Exited(10, KILLED), after=100) == [Start(10)]
    waits = []
    for pid in range(11, 22):
        for fact in (Started(pid), Moored(pid), Serving(pid)):
            story.then(fact)
        actions = story.then(Exited(pid, KILLED), after=1)
        if not actions:
            assert story.machine.until is not None
            waits.append(story.machine.until - story.now)
            actions = story.then(TimePassed(), after=waits[-1])
        assert actions == [Start(pid)]
    assert waits[0] == BACKOFF
    assert waits[:4] == [BACKOFF * 2**each for each in range(4)]
    assert max(waits) == LONGEST_BACKOFF


def test_a_long_service_earns_a_start_without_wait() -> None:
    story = serving()
    for pid in (11, 12, 13):
        assert story.then(Exited(pid - 1, KILLED), after=61) == [Start(pid - 1)]
        story.then(Started(pid))
        story.then(Moored(pid))
        story.then(Serving(pid))


def test_a_master_that_keeps_dying_before_it_is_ready_ends_the_anchor() -> None:
    story = serving()
    story.then(Exited(10, KILLED), after=100)
    for pid in range(11, 11 + MOST_DEATHS):
        story.then(Started(pid))
        actions = story.then(Exited(pid, 3), after=1)
        if not actions:
            story.then(TimePassed(), after=60)
    assert actions == left()
    assert story.then(Alone()) == [End(3)]


def test_the_operator_ends_the_waiting() -> None:
    story = _waiting()
    assert story.then(Signalled(HUP)) == [Start(11)]
    story = _waiting()
    assert story.then(Signalled(TERM)) == left()
    assert story.then(Alone()) == [End(0)]
    story = _waiting()
    assert story.then(Signalled(USR1)) == []


def test_a_successor_that_comes_while_waiting_is_followed() -> None:
    story = _waiting()
    assert story.then(Moored(20)) == [Renew()]
    assert story.current == 20
    assert story.then(TimePassed(), after=60) == []


def _waiting() -> Story:
    story = serving()
    story.then(Exited(10, KILLED), after=1)
    story.then(Started(11))
    assert story.then(Exited(11, KILLED)) == []
    assert story.machine.phase is Phase.WAITING
    return story


def test_only_a_known_process_matters() -> None:
    story = serving(10)
    story.then(Serving(20))
    assert [story.machine.knows(pid) for pid in (10, 20, 30)] == [True, True, False]


def test_facts_and_actions_are_values() -> None:
    assert Forward(1, 2) == Forward(1, 2)
    assert Forward(1, 2) != Forward(2, 1)
    assert Moored(1) != Started(1)
    assert len({KillAll(), KillAll(), Renew()}) == 2
    assert repr(Say("x")) == "Say(level='INFO', text='x')"
