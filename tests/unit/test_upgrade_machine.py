"""The upgrade's table: every history ends where it must, and nothing outside the table changes anything."""

from __future__ import annotations

import itertools

import pytest

from gracehooks.upgrade.machine import TABLE, Action, Fact, Happened, State, step

H, S, A = Happened, State, Action


def replay(*happened: Happened, state: State = S.BOOTING) -> tuple[State, list[Action]]:
    """The state after a history, and everything that was done."""
    done: list[Action] = []
    for each in happened:
        state, actions = step(state, Fact(each))
        done += actions
    return state, done


def test_a_good_upgrade():
    state, done = replay(H.ALL_READY, H.TIME_UP, H.COMMITTED, H.WORKERS_GONE)
    assert state is S.RETIRED
    assert done == [A.BEGIN_PROBATION, A.COMMIT, A.RETIRE, A.LEAVE]


@pytest.mark.parametrize("before", [(), (H.ALL_READY,), (H.ALL_READY, H.TIME_UP)])
@pytest.mark.parametrize("why", [H.FAILED, H.DIED, H.STOP_ASKED])
def test_whatever_fails_before_the_commit_is_rolled_back(before: tuple[Happened, ...], why: Happened):
    state, done = replay(*before, why)
    assert state is S.ROLLING_BACK
    assert done[-1] is A.ROLL_BACK
    assert A.RETIRE not in done


def test_a_boot_or_a_takeover_that_hangs_is_rolled_back():
    assert replay(H.TIME_UP)[0] is S.ROLLING_BACK
    assert replay(H.ALL_READY, H.TIME_UP, H.TIME_UP)[0] is S.ROLLING_BACK


def test_a_rollback_ends_when_the_successor_is_gone_and_is_forced_where_it_does_not_go():
    state, done = replay(H.FAILED, H.TIME_UP, H.TIME_UP, H.DIED)
    assert state is S.SERVING
    assert done == [A.ROLL_BACK, A.FORCE, A.FORCE, A.FINISH_ROLLBACK]


def test_a_late_word_of_a_successor_that_is_rolled_back_changes_nothing():
    for late in (H.ALL_READY, H.COMMITTED, H.FAILED, H.STOP_ASKED, H.SUPERSEDED):
        assert step(S.ROLLING_BACK, Fact(late)) == (S.ROLLING_BACK, ())


def test_a_successor_that_dies_while_the_old_one_leaves_brings_it_back():
    state, done = replay(H.ALL_READY, H.TIME_UP, H.COMMITTED, H.DIED)
    assert state is S.SERVING
    assert done[-1] is A.RESUME


def test_a_successor_that_was_itself_replaced_is_not_missed():
    state, done = replay(H.ALL_READY, H.TIME_UP, H.COMMITTED, H.SUPERSEDED)
    assert state is S.RETIRING
    assert done[-1] is A.DETACH


def test_old_workers_that_do_not_leave_are_forced_and_the_end_still_comes():
    state, done = replay(H.ALL_READY, H.TIME_UP, H.COMMITTED, H.TIME_UP, H.TIME_UP, H.WORKERS_GONE)
    assert state is S.RETIRED
    assert done[-3:] == [A.FORCE_OWN, A.FORCE_OWN, A.LEAVE]


def test_the_old_workers_are_told_to_leave_only_by_a_confirmed_commit():
    rows = [(state, happened) for (state, happened), (_, actions) in TABLE.items() if A.RETIRE in actions]
    assert rows == [(S.COMMITTING, H.COMMITTED)]


def test_serving_and_retired_take_no_fact():
    for state, happened in itertools.product((S.SERVING, S.RETIRED), H):
        assert step(state, Fact(happened)) == (state, ())


def test_every_state_with_a_bound_has_a_row_for_its_end():
    for state in (S.BOOTING, S.PROBATION, S.COMMITTING, S.RETIRING, S.ROLLING_BACK):
        assert (state, H.TIME_UP) in TABLE


def test_every_history_of_five_facts_keeps_the_rules():
    """All of them: no LEAVE before RETIRE, no RETIRE before COMMIT, at most one of each verdict."""
    for history in itertools.product(H, repeat=5):
        state, done = replay(*history)
        assert done.count(A.COMMIT) <= 1
        assert done.count(A.RETIRE) <= done.count(A.COMMIT)
        assert done.count(A.LEAVE) <= done.count(A.RETIRE)
        verdicts = done.count(A.FINISH_ROLLBACK) + done.count(A.RESUME) + done.count(A.LEAVE)
        assert verdicts <= 1
        assert (verdicts == 1) == (state in (S.SERVING, S.RETIRED))
