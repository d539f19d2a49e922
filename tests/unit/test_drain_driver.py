"""The driver on a fake host: who ends which phase, what is reported, and who takes over from a thread that is stuck."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gracehooks import requests
from gracehooks.deadline import Deadline
from gracehooks.drain import cleanup, driver
from gracehooks.drain.driver import Drain
from gracehooks.jobs import threads, tracker
from gracehooks.scoreboard import Order, Page, Phase, RequestInFlight
from gracehooks.settings import Settings


class Exit(BaseException):
    """The process would have ended now."""


class Host:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.not_read = 0

    def stands(self) -> str:
        return "views.py:3 in <module>"

    def beat(self) -> None:
        self.said.append("beat")

    def wake(self) -> None:
        self.said.append("wake")

    def unread(self) -> int:
        return self.not_read

    def last_words(self) -> None:
        self.said.append("last words")


class Alarm:
    """The last resort, without its bite."""

    def __init__(self, descriptor: int = 2) -> None:
        self.armed: list[Deadline] = []
        self.descriptor = descriptor

    def print_to(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def arm(self, deadline: Deadline) -> None:
        self.armed.append(deadline)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(driver, "LastResort", Alarm)
    monkeypatch.setattr(driver.os, "getppid", lambda: 1)
    monkeypatch.setattr(tracker, "_current", None)
    cleanup.forget()
    mark = requests._current.set(None)  # a request that a test leaves unended marks its context
    yield
    requests._current.reset(mark)
    cleanup.forget()


def make(drain_timeout: float = 30, **settings: float) -> Drain:
    page = Page(requests=2, jobs=2)
    page.phase = Phase.SERVING
    chosen = Settings(drain_timeout=drain_timeout, **{"job_timeout": 5, "cleanup_timeout": 5, **settings})  # type: ignore[arg-type]
    drain = Drain(page, chosen, logging.getLogger("test"), Host(), parent=1, stacks=7)

    def leave(code: int, flushes: object = ()) -> None:
        raise Exit(code)

    drain._exit = leave  # type: ignore[method-assign]
    return drain


def begin(drain: Drain, path: str = "/slow") -> int:
    return drain.begin("GET", path, threading.get_ident())


def end_accepting(drain: Drain) -> None:
    drain.told("SIGTERM")
    drain.accepting_ends()
    drain.accepting_ended()


def report_of(drain: Drain) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(drain.page.report)
    return found


def test_an_exit_callback_that_hangs_is_not_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drain = make()
    del drain._exit
    called: list[str] = []

    def run() -> None:
        called.append("atexit")
        with pytest.raises(Exit):
            drain._exit(1)  # the sentinel comes meanwhile

    def gone(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr(driver.atexit, "_run_exitfuncs", run)
    monkeypatch.setattr(driver.os, "_exit", gone)
    monkeypatch.setattr(driver.logging, "shutdown", lambda: None)
    with pytest.raises(Exit) as raised:
        drain._exit(0)
    assert called == ["atexit"]
    assert raised.value.args == (0,)


# -- requests --------------------------------------------------------------------------------------------------------
def test_a_request_whose_application_failed_is_in_flight_until_the_server_has_said_so() -> None:
    drain = make()
    slots = {handle: drain.begin("GET", f"/{handle}", handle) for handle in ("a", "b", "c")}  # the page has two
    for handle, slot in slots.items():
        drain.fail(slot, handle)
    assert requests._current.get() is None, "what the server starts meanwhile is no job of the request's"
    assert drain.in_flight == 3
    for number, handle in enumerate(slots, 1):
        drain.end_failed(handle)
        drain.end_failed(handle)
        assert drain.in_flight == 3 - number


def test_a_second_failure_of_the_same_thread_shows_that_the_first_was_answered() -> None:
    drain = make()
    drain.fail(begin(drain, "/first"), threading.get_ident())
    drain.fail(begin(drain, "/second"), threading.get_ident())
    assert [each.path for each in drain.page.requests()] == ["/second"]


def test_a_worker_that_boots_too_long_is_ended_unless_it_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    for accepts in (False, True):
        drain = make()
        drain.page.phase = Phase.BOOTING
        drain.told("SIGTERM")
        if accepts:
            drain.accepting_begins()
        monkeypatch.setattr(driver, "BOOTING", -1.0)
        if accepts:
            assert drain.turn() > 0
        else:
            with pytest.raises(Exit):
                drain.turn()
            parked = threading.Thread(target=drain.accepting_begins, daemon=True)
            parked.start()
            parked.join(0.05)
            assert parked.is_alive(), "it must accept nothing while the process ends"


# -- told ------------------------------------------------------------------------------------------------------------
def test_the_handler_records_arms_and_wakes_once() -> None:
    drain = make()
    drain.told("SIGTERM")
    first = drain.deadline
    drain.told("SIGTERM")
    assert drain.leaving
    assert drain.deadline == first
    assert drain.host.said == ["wake"]  # type: ignore[attr-defined]
    assert 29 < first.left() <= 30
    assert drain._last_resort.armed[0].at == pytest.approx(first.at + driver.LAST_RESORT_REQUESTS)  # type: ignore[attr-defined]
    assert drain.page.phase is Phase.SERVING, "the loop does the rest"


@pytest.mark.parametrize(("order", "final"), [(Order.RETIRE, False), (Order.STOP, True)])
def test_an_order_on_the_page_is_as_good_as_the_signal(order: Order, final: bool) -> None:
    drain = make()
    assert not drain.look()
    drain.page.order = order
    assert drain.look()
    assert drain.final is final


def test_the_end_of_the_master_makes_it_final(monkeypatch: pytest.MonkeyPatch) -> None:
    drain = make()
    monkeypatch.setattr(driver.os, "getppid", lambda: 77)
    assert drain.look()
    assert drain.final
    assert drain.orphan
    assert drain._last_resort.descriptor == 2, "nobody is left who would read the page's file"


def test_a_boot_that_takes_long_says_where_it_stands() -> None:
    drain = make()
    drain.page.phase = Phase.BOOTING
    drain.turn()
    assert not drain.page.stands
    drain._long_boot = Deadline.after(0)
    drain.turn()
    assert drain.page.stands == "views.py:3 in <module>"


def test_a_lame_duck_order_changes_the_phase_and_nothing_else() -> None:
    drain = make()
    drain.page.order = Order.LAME_DUCK
    assert not drain.look()
    assert drain.page.phase is Phase.LAME_DUCK


# -- phases ----------------------------------------------------------------------------------------------------------
def test_a_clean_drain_loses_nothing_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    drain = make()
    called: list[Phase] = []
    cleanup.on_shutdown(lambda: called.append(drain.page.phase))
    drain.end(begin(drain))
    end_accepting(drain)
    assert drain.finish() == 0
    assert drain.page.phase is Phase.ENDED
    assert called == [Phase.CLEANUP]
    assert drain.page.report == ""
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_request_that_has_not_ended_is_reported_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    drain = make(drain_timeout=0)
    begin(drain, "/slow?secret=1")
    end_accepting(drain)
    assert drain.finish() == 1
    (lost,) = report_of(drain)["requests"]
    assert (lost["method"], lost["path"]) == ("GET", "/slow")
    assert "test_drain_driver" in lost["where"]
    assert "GET /slow" in caplog.text
    assert "secret" not in caplog.text + drain.page.report


def test_a_request_that_was_answered_late_is_not_lost() -> None:
    drain = make(drain_timeout=0)
    slot = begin(drain)
    cleanup.on_shutdown(lambda: drain.end(slot))
    end_accepting(drain)
    assert drain.finish() == 0
    assert drain.page.report == ""


def test_requests_that_nobody_read_and_those_without_a_slot_are_losses_without_a_name() -> None:
    drain = make(drain_timeout=0)
    for _ in range(3):  # the page has two slots
        begin(drain)
    drain.host.not_read = 2  # type: ignore[attr-defined]
    end_accepting(drain)
    assert drain.finish() == 1
    assert sorted(each["path"] for each in report_of(drain)["requests"]) == ["/slow", "/slow", "?", "?", "?"]


def test_a_request_marks_its_context() -> None:
    drain = make()
    assert requests.current() is None
    slot = begin(drain)
    assert requests.current() is not None
    drain.end(slot)
    assert requests.current() is None


def test_a_worker_may_keep_its_own_account() -> None:
    drain = make(drain_timeout=0)
    drain.account = lambda: {9: (RequestInFlight("WS", "/chat", time.monotonic()), None)}
    end_accepting(drain)
    assert drain.finish() == 1
    assert report_of(drain)["requests"][0]["path"] == "/chat"


def test_the_loop_is_not_needed_for_the_phases_to_be_one_each() -> None:
    drain = make()
    drain.told("SIGTERM")
    seen = [drain.page.phase]
    drain.accepting_ends()
    seen.append(drain.page.phase)
    drain.accepting_ends()
    drain.accepting_ended()
    seen.append(drain.page.phase)
    assert seen == [Phase.SERVING, Phase.ACCEPTING_ENDS, Phase.REQUESTS]


# -- the hammer ------------------------------------------------------------------------------------------------------
def test_the_hammer_reports_and_is_bounded() -> None:
    drain = make()
    begin(drain)
    assert drain.hammer("SIGQUIT") == 1
    assert drain.page.phase is Phase.ENDED
    assert report_of(drain)["reason"] == "SIGQUIT"
    assert drain._last_resort.armed[-1].left() < 0.5  # type: ignore[attr-defined]


def test_the_report_is_written_before_the_hammer_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """The killing takes turns of a hub, in which the greenlet that waits for the jobs finds none left."""
    drain = make()
    found = tracker.Tracker(drain.page, drain.settings)
    monkeypatch.setattr(tracker, "_current", found)
    seen: list[tuple[Phase, str]] = []

    class Sweeper:
        def adopt(self, tracker: Any, *, watch: bool = True) -> None:
            pass

        def kill(self, *, infrastructure: bool) -> None:
            seen.append((drain.page.phase, report_of(drain)["jobs"][0]["name"]))

    found.sweeper = Sweeper()  # type: ignore[assignment]
    found.begin(threads.THREAD, "mail", threading.current_thread())
    end_accepting(drain)
    assert drain.hammer("SIGQUIT") == 1
    assert seen == [(Phase.ENDED, "mail")]


def test_the_hammer_on_an_idle_worker_loses_nothing() -> None:
    drain = make()
    assert drain.hammer("SIGINT") == 0
    assert drain.page.report == ""


def test_a_braced_worker_is_hammered_by_the_sentinel_when_its_loop_does_not() -> None:
    drain = as_sentinel(make())
    begin(drain)
    drain.brace("SIGQUIT")
    assert drain.turn() > 0
    drain._braced = Deadline.after(0)
    with pytest.raises(Exit):
        drain.turn()
    assert drain.page.phase is Phase.ENDED
    assert "last words" in drain.host.said  # type: ignore[attr-defined]
    assert report_of(drain)["requests"]


# -- the sentinel ----------------------------------------------------------------------------------------------------
def as_sentinel(drain: Drain) -> Drain:
    drain._is_sentinel = lambda: True  # type: ignore[method-assign]
    return drain


def test_the_sentinel_beats_and_waits_while_there_is_time() -> None:
    drain = as_sentinel(make())
    assert drain.turn() == driver.BEAT
    drain.told("SIGTERM")
    assert 0 < drain.turn() <= driver.BEAT
    assert "beat" in drain.host.said  # type: ignore[attr-defined]
    assert drain.page.phase is Phase.SERVING


def test_the_sentinel_runs_every_phase_in_place_of_a_thread_that_is_stuck_in_a_request() -> None:
    drain = as_sentinel(make(drain_timeout=0))
    called: list[str] = []
    cleanup.on_shutdown(lambda: called.append("callback"))
    begin(drain)
    drain.told("SIGTERM")
    drain.deadline = Deadline.after(-1)
    with pytest.raises(Exit) as raised:
        drain.turn()
    assert raised.value.args == (1,)
    assert drain.page.phase is Phase.ENDED
    assert called == ["callback"]
    assert "last words" in drain.host.said  # type: ignore[attr-defined]
    assert report_of(drain)["requests"][0]["path"] == "/slow"


def test_callbacks_that_need_a_blocked_loop_are_named_and_not_run(caplog: pytest.LogCaptureFixture) -> None:
    drain = as_sentinel(make(drain_timeout=0))
    drain._takes_over = False
    cleanup.on_shutdown(lambda: pytest.fail("the loop is blocked"))
    begin(drain)
    drain.told("SIGTERM")
    drain.deadline = Deadline.after(-1)
    with pytest.raises(Exit):
        drain.turn()
    assert "callbacks_that_need_a_blocked_loop" in caplog.text


def test_a_hanging_callback_is_left() -> None:
    drain = as_sentinel(make())
    end_accepting(drain)
    drain._requests_over()
    drain._jobs_over([])
    assert drain.page.phase is Phase.CLEANUP
    drain.deadline = Deadline.after(-1)
    with pytest.raises(Exit):
        drain.turn()
    assert drain.page.phase is Phase.ENDED
    assert drain.exit_code == 1


def test_whoever_comes_second_parks(monkeypatch: pytest.MonkeyPatch) -> None:
    drain = make()
    drain.told("SIGTERM")
    drain._taken = True

    def parked(seconds: float) -> None:
        raise Exit

    monkeypatch.setattr(driver, "native", lambda module, name: parked)
    with pytest.raises(Exit):
        drain.accepting_ends()
    assert drain.page.phase is Phase.SERVING


def test_a_worker_that_boots_for_ever_is_left() -> None:
    drain = as_sentinel(make())
    drain.page.phase = Phase.BOOTING
    drain.told("SIGTERM")
    assert drain.turn() > 0
    drain._deadlines = driver.machine.Deadlines(drain.settings, Deadline.after(-1))
    with pytest.raises(Exit) as raised:
        drain.turn()
    assert raised.value.args == (0,)


def test_the_exit_does_not_wait_for_a_thread_that_is_no_job(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = make()
    end_accepting(drain)
    drain.finish()
    joined: list[float] = []
    monkeypatch.setattr(driver.threading, "_shutdown", lambda: joined.append(drain.turn()))
    monkeypatch.setattr(driver.signal, "signal", lambda number, handler: None)
    with pytest.raises(Exit):
        drain.leave()
    assert joined[0] <= 0.02, "the sentinel looks closely from then on"
    as_sentinel(drain).leave()  # it comes by here when it runs the last hook in the place of a thread that is stuck
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(60,), name="stays")
    thread.start()
    try:
        assert drain._exiting_at is not None
        drain._exiting_at -= driver.THREADS_AT_EXIT
        with pytest.raises(Exit) as raised:
            drain.turn()
    finally:
        stop.set()
        thread.join()
    assert raised.value.args == (0,)
    assert "stays" in caplog.text
