"""The phases as a table: one order, every fact in its place, and deadlines whose sum is kept."""

from __future__ import annotations

import ast
import inspect

import pytest

from gracehooks.deadline import Deadline
from gracehooks.drain import machine
from gracehooks.drain.machine import STAGES, TRANSITIONS, Action, Deadlines, Fact, Step, linger, step
from gracehooks.scoreboard import Phase
from gracehooks.settings import Settings

SETTINGS = Settings(drain_timeout=30, job_timeout=20, cleanup_timeout=5)


def walk(*facts: Fact, start: Phase = Phase.SERVING) -> tuple[Phase, list[Action]]:
    phase, actions = start, []
    for fact in facts:
        found = step(phase, fact)
        phase = found.phase
        actions += found.actions
    return phase, actions


def test_a_clean_end_passes_every_phase_in_order() -> None:
    phase, actions = walk(
        Fact.TOLD_TO_LEAVE, Fact.ACCEPTING_ENDED, Fact.REQUESTS_ENDED, Fact.JOBS_ENDED, Fact.CLEANUP_ENDED
    )
    assert phase is Phase.ENDED
    assert actions == [
        Action.STOP_SERVICES,
        Action.STOP_ACCEPTING,
        Action.END_REQUESTS,
        Action.END_JOBS,
        Action.CLEAN_UP,
        Action.EXIT,
    ]


def test_every_deadline_reports_and_the_next_phase_begins() -> None:
    late = Fact.DEADLINE_PASSED
    phase, actions = walk(Fact.TOLD_TO_LEAVE, Fact.ACCEPTING_ENDED, late, late, late)
    assert phase is Phase.ENDED
    assert [each for each in actions if each.name.startswith("REPORT")] == [
        Action.REPORT_REQUESTS,
        Action.REPORT_JOBS,
        Action.REPORT_CLEANUP,
    ]
    assert actions.index(Action.REPORT_REQUESTS) < actions.index(Action.END_JOBS)
    assert actions.index(Action.REPORT_JOBS) < actions.index(Action.CLEAN_UP)


def test_a_backlog_that_never_ends_is_bounded_like_the_requests() -> None:
    assert step(Phase.ACCEPTING_ENDS, Fact.DEADLINE_PASSED).phase is Phase.JOBS


@pytest.mark.parametrize("phase", list(Phase))
def test_a_phase_never_goes_back_and_an_ended_worker_does_nothing_more(phase: Phase) -> None:
    for fact in Fact:
        found = step(phase, fact)
        assert found.phase >= phase
        if found.phase is phase:
            assert found.actions == ()
    if phase is Phase.ENDED:
        assert all(step(phase, fact) == Step(Phase.ENDED) for fact in Fact)


@pytest.mark.parametrize("phase", [each for each in Phase if each is not Phase.ENDED])
def test_the_hammer_ends_it_from_everywhere_with_a_report(phase: Phase) -> None:
    found = step(phase, Fact.HAMMERED)
    assert found.phase is Phase.ENDED
    assert Action.REPORT_REQUESTS in found.actions


def test_a_lame_duck_serves_and_a_booting_worker_has_nothing_to_drain() -> None:
    assert step(Phase.SERVING, Fact.TOLD_LAME_DUCK) == Step(Phase.LAME_DUCK)
    assert step(Phase.LAME_DUCK, Fact.TOLD_LAME_DUCK) == Step(Phase.LAME_DUCK)
    assert step(Phase.LAME_DUCK, Fact.TOLD_TO_LEAVE).phase is Phase.ACCEPTING_ENDS
    assert step(Phase.BOOTING, Fact.TOLD_TO_LEAVE).phase is Phase.ENDED


def test_every_phase_is_a_stage_with_a_setting_that_exists() -> None:
    assert [each.phase for each in STAGES] == list(Phase)
    assert all(hasattr(SETTINGS, each.bound) for each in STAGES if each.bound)
    assert {phase for phase, _ in TRANSITIONS} == set(Phase) - {Phase.ENDED}


def test_a_phase_that_ends_early_gives_its_time_to_nobody() -> None:
    deadlines = Deadlines(SETTINGS, Deadline(100.0))
    assert deadlines.of(Phase.ACCEPTING_ENDS, Deadline(100.0)) == Deadline(130.0)
    assert deadlines.of(Phase.REQUESTS, Deadline(104.0)) == Deadline(130.0)
    assert deadlines.of(Phase.JOBS, Deadline(110.0)) == Deadline(130.0)
    assert deadlines.of(Phase.CLEANUP, Deadline(111.0)) == Deadline(116.0)


def test_time_that_was_lost_is_taken_from_the_next_phase() -> None:
    deadlines = Deadlines(SETTINGS, Deadline(100.0))
    assert deadlines.of(Phase.JOBS, Deadline(133.0)) == Deadline(150.0)
    assert deadlines.of(Phase.CLEANUP, Deadline(153.0)) == Deadline(155.0)
    assert deadlines.of(Phase.ENDED, Deadline(156.0)) == Deadline(155.0)


@pytest.mark.parametrize(
    ("drain_timeout", "used", "final", "expected"),
    [
        (30.0, False, True, 2.0),
        (30.0, False, False, 2.0),
        (30.0, True, True, 2.0),
        (30.0, True, False, 10.0),
        (3.0, True, False, 1.5),
        (3.0, False, True, 1.5),
        (0.0, True, False, 0.0),
    ],
)
def test_the_linger(drain_timeout: float, used: bool, final: bool, expected: float) -> None:
    assert linger(Settings(drain_timeout=drain_timeout), used=used, final=final) == expected


def test_it_imports_nothing_that_can_act() -> None:
    tree = ast.parse(inspect.getsource(machine))
    modules = {each.module for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)}
    assert not any(isinstance(each, ast.Import) for each in ast.walk(tree))
    assert modules == {
        "__future__",
        "collections.abc",
        "dataclasses",
        "enum",
        "gracehooks.deadline",
        "gracehooks.scoreboard",
        "gracehooks.settings",
    }
