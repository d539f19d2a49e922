"""The driver on a fake host: histories replayed on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gracehooks import deadline, events
from gracehooks.errors import PreflightError
from gracehooks.settings import Settings
from gracehooks.upgrade import driver as driver_module
from gracehooks.upgrade.driver import TERM_TO_KILL, Driver
from gracehooks.upgrade.machine import Fact, Happened, State

SETTINGS = Settings(ready_timeout=10, probation=2, drain_timeout=5, job_timeout=4, cleanup_timeout=1)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


class FakeHost:
    kind = "upgrade"

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.done: list[str] = []
        self.news: list[Fact] = []
        self.ready, self.workers = 0, 2

    def preflight(self) -> None:
        if self.refusal:
            raise PreflightError(self.refusal)

    def launch(self, id: str) -> int:
        self.done.append("launch")
        return 4711

    def facts(self) -> Iterator[Fact]:
        while self.news:
            yield self.news.pop(0)

    def stands(self) -> str:
        return "views.py:3 in <module>"

    def numbers(self) -> tuple[int, int]:
        return self.ready, self.workers

    def roll_back(self, force: bool) -> None:
        self.done.append("kill" if force else "term")

    def __getattr__(self, name: str) -> Any:
        if name in ("clear_away", "commit", "retire", "force_own", "resume", "detach", "leave"):
            return lambda: self.done.append(name)
        raise AttributeError(name)


class Case:
    """A driver, its host, its clock, and what it said."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.records: list[dict[str, Any]] = []
        self.said: list[events.Event] = []
        self.host = FakeHost()
        self.driver = Driver(lambda: {"pid": 1, "generation": 1}, self.records.append)

    def begin(self, settings: Settings = SETTINGS) -> None:
        assert self.driver.begin(self.host, settings)

    def happens(self, *happened: Happened, reason: str = "") -> None:
        self.host.news += [Fact(each, reason) for each in happened]
        self.driver.tick()

    def later(self, seconds: float) -> None:
        self.clock.now += seconds
        self.driver.tick()

    def until(self, state: State) -> None:
        """A good upgrade, so far."""
        self.begin()
        if state is State.BOOTING:
            return
        self.happens(Happened.ALL_READY)
        if state is State.PROBATION:
            return
        self.later(2.1)
        if state is State.COMMITTING:
            return
        self.happens(Happened.COMMITTED)
        assert self.driver.state is state is State.RETIRING

    def names(self) -> list[str]:
        return [each.name for each in self.said]


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    clock = Clock()
    monkeypatch.setattr(driver_module, "time", clock)
    monkeypatch.setattr(deadline, "time", clock)
    case = Case(clock)
    events.subscribe(case.said.append)
    yield case
    events.unsubscribe(case.said.append)
    assert not [each for each in events._subscribers if getattr(each, "__self__", None) is case.said]


def test_a_good_upgrade(case: Case):
    case.until(State.RETIRING)
    assert case.driver.last["state"] == "completed"
    assert case.driver.last["phases"] == {"booting": 0.0, "probation": pytest.approx(2.1), "committing": 0.0}
    assert not case.driver.under_way
    case.driver.workers_gone()
    assert case.driver.state is State.RETIRED
    assert case.host.done == ["launch", "commit", "retire", "leave"]
    assert case.names() == ["UpgradeStarted", "ProbationStarted", "UpgradeCompleted"]
    assert case.records == []  # the successor writes it, when the old generation has left


def test_the_probation_lasts(case: Case):
    case.until(State.PROBATION)
    case.later(1.9)
    assert case.driver.state is State.PROBATION
    case.later(0.2)
    assert case.driver.state is State.COMMITTING


def test_a_failure_is_told_with_its_reason_and_forced_in_the_end(case: Case):
    case.until(State.BOOTING)
    case.happens(Happened.FAILED, reason="ImportError: no module")
    assert case.driver.state is State.ROLLING_BACK
    assert case.host.done[-1] == "term"
    case.later(TERM_TO_KILL + 0.1)
    assert case.host.done[-1] == "kill"
    case.happens(Happened.DIED, reason="SIGKILL")
    assert case.driver.state is State.SERVING
    assert case.host.done[-2:] == ["clear_away", "resume"]  # whatever its master has left behind goes too
    assert case.records[0]["outcome"] == "rolled_back"
    assert case.records[0]["reason"] == "ImportError: no module"
    assert case.names()[-1] == "UpgradeRolledBack"


def test_a_death_needs_nobody_to_be_told_to_go(case: Case):
    case.until(State.BOOTING)
    case.happens(Happened.DIED, reason="ended with exit code 1")
    assert case.driver.state is State.SERVING
    assert "term" not in case.host.done
    assert case.records[0]["reason"] == "ended with exit code 1"


def test_a_hang_is_told_with_the_number_of_ready_workers(case: Case):
    case.until(State.BOOTING)
    case.host.ready = 1
    case.later(9.9)
    assert case.driver.state is State.BOOTING
    case.later(0.2)
    assert case.driver.state is State.ROLLING_BACK
    case.happens(Happened.DIED)
    assert case.records[0]["reason"] == (
        "hung for 10 s while booting (1 of 2 workers were ready), at views.py:3 in <module>"
    )


def test_a_successor_that_does_not_take_over_is_rolled_back(case: Case):
    case.until(State.COMMITTING)
    case.later(10.1)
    assert case.driver.last["reason"] == "did not take over within 10 s"


def test_workers_that_served_get_the_leave_budget_in_a_rollback(case: Case):
    case.until(State.PROBATION)
    case.happens(Happened.FAILED, reason="worker 5 ended in the probation")
    case.later(TERM_TO_KILL + 1)
    assert case.host.done[-1] == "term"  # they may hold requests
    case.later(10)
    assert case.host.done[-1] == "kill"


@pytest.mark.parametrize("state", [State.BOOTING, State.PROBATION, State.COMMITTING])
def test_a_stop_aborts_what_is_not_committed(case: Case, state: State):
    case.until(state)
    case.driver.stop_asked()
    assert case.driver.state is State.ROLLING_BACK
    assert "retire" not in case.host.done


def test_a_stop_after_the_commit_changes_nothing(case: Case):
    case.until(State.RETIRING)
    case.driver.stop_asked()
    assert case.driver.state is State.RETIRING


def test_a_stop_without_an_upgrade_changes_nothing(case: Case):
    case.driver.stop_asked()
    case.driver.workers_gone()
    case.driver.tick()
    assert case.driver.state is State.SERVING


def test_a_successor_that_dies_while_we_leave_brings_us_back(case: Case):
    case.until(State.RETIRING)
    case.happens(Happened.DIED, reason="SIGKILL")
    assert case.driver.state is State.SERVING
    assert case.host.done[-2:] == ["clear_away", "resume"]
    assert case.names()[-1] == "UpgradeResumed"
    assert case.records[0]["outcome"] == "rolled_back"
    case.host = FakeHost()
    case.begin()  # and the next one may come


def test_a_successor_that_was_replaced_is_watched_no_more(case: Case):
    case.until(State.RETIRING)
    case.happens(Happened.SUPERSEDED)
    assert case.host.done[-1] == "detach"
    assert case.driver.state is State.RETIRING


def test_old_workers_that_stay_are_killed_at_the_leave_budget(case: Case):
    case.until(State.RETIRING)
    case.later(10.4)
    assert "force_own" not in case.host.done
    case.later(0.2)
    assert case.host.done[-1] == "force_own"


@pytest.mark.parametrize("state", [State.BOOTING, State.PROBATION, State.COMMITTING, State.RETIRING])
def test_a_second_upgrade_is_refused(case: Case, state: State):
    case.until(state)
    second = FakeHost()
    assert not case.driver.begin(second, SETTINGS)
    assert second.done == []
    assert case.driver.state is state
    assert case.records[-1]["outcome"] == "refused"
    assert "under way" in case.records[-1]["reason"]
    assert case.records[-1]["id"] != case.driver.id


def test_a_preflight_or_a_policy_that_says_no_is_a_refusal_and_changes_nothing(case: Case):
    case.host.refusal = "the start directory is gone"
    assert not case.driver.begin(case.host, SETTINGS)
    case.host.refusal = ""
    assert not case.driver.begin(case.host, SETTINGS, "3 older generations are still draining")
    assert case.host.done == []
    assert case.driver.state is State.SERVING
    assert case.driver.last == {}
    assert [each["reason"] for each in case.records] == [
        "the start directory is gone",
        "3 older generations are still draining",
    ]
    assert case.names() == ["UpgradeRefused"] * 2


def test_facts_of_one_turn_are_taken_in_order(case: Case):
    case.until(State.BOOTING)
    case.happens(Happened.ALL_READY, Happened.FAILED, Happened.DIED, reason="crashed just after")
    assert case.driver.state is State.SERVING
    assert case.records[0]["reason"] == "crashed just after"


def test_the_first_reason_is_the_one_that_is_told(case: Case):
    case.until(State.BOOTING)
    case.happens(Happened.FAILED, reason="the true one")
    case.happens(Happened.FAILED, reason="a later one")
    case.happens(Happened.DIED, reason="exit code 1")
    assert case.records[0]["reason"] == "the true one"


def test_a_host_that_stays_may_begin_again(case: Case):
    case.until(State.RETIRING)
    case.driver.workers_gone()
    case.driver.idle()
    assert case.driver.state is State.SERVING
    case.host = FakeHost()
    case.begin()
