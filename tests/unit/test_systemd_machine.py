"""What is said to systemd, replayed from facts."""

from __future__ import annotations

import pytest

from gracehooks.systemd.machine import TABLE, Happened, Say, Situation, State, extends, pings, speaks, status, step

S, H = State, Happened


def replay(state: State, *facts: Happened) -> tuple[State, list[Say]]:
    said: list[Say] = []
    for fact in facts:
        state, words = step(state, fact)
        said += words
    return state, said


def test_ready_is_said_when_the_workers_are_and_once():
    assert replay(S.BOOTING, H.ALL_READY, H.ALL_READY) == (S.SERVING, [Say.READY])


def test_an_upgrade_names_the_successor_after_ready_and_then_only_the_barrier_is_left():
    assert replay(S.SERVING, H.BEGUN, H.COMPLETED, H.RETIRING) == (
        S.SUCCEEDED,
        [Say.RELOADING, Say.READY, Say.FOLLOW_SUCCESSOR, Say.BARRIER],
    )


def test_a_successor_says_nothing_until_it_is_followed():
    assert replay(S.SUCCESSOR, H.ALL_READY, H.STOP, H.BEGUN, H.NAMED) == (S.SERVING, [])


def test_a_successor_whose_old_master_died_names_itself_once():
    assert replay(S.SUCCESSOR, H.ORPHANED, H.ORPHANED) == (S.SERVING, [Say.FOLLOW_ME, Say.READY])
    assert replay(S.SUCCESSOR, H.NAMED, H.ORPHANED) == (S.SERVING, [])


@pytest.mark.parametrize("verdict", [H.COMPLETED, H.ROLLED_BACK])
def test_what_began_is_ended_by_ready(verdict):
    assert replay(S.SERVING, H.BEGUN, verdict) == (S.SERVING, [Say.RELOADING, Say.READY])


def test_a_refusal_answers_notify_reload_which_waits_for_both_words():
    assert replay(S.SERVING, H.REFUSED) == (S.SERVING, [Say.RELOADING, Say.READY])
    assert replay(S.SERVING, H.BEGUN, H.REFUSED, H.ROLLED_BACK)[1] == [Say.RELOADING, Say.RELOADING, Say.READY]


def test_a_resumed_master_names_itself():
    state, said = replay(S.SERVING, H.RETIRING, H.RESUMED)
    assert (state, said[-2:]) == (S.SERVING, [Say.FOLLOW_ME, Say.READY])


def test_stopping_is_never_said_by_a_retiring_master_or_a_successor():
    assert {state for (state, _), (_, words) in TABLE.items() if Say.STOPPING in words} == {
        S.BOOTING,
        S.SERVING,
        S.RELOADING,
    }
    assert replay(S.SERVING, H.STOP, H.ROLLED_BACK, H.STOP) == (S.STOPPING, [Say.STOPPING])


def test_the_table_speaks_only_where_systemd_listens():
    for (state, happened), (after, words) in TABLE.items():
        assert not words or speaks(state) or Say.FOLLOW_ME in words, (state, happened)
        assert after not in (S.SUCCESSOR, S.BOOTING)


def test_exactly_one_master_feeds_the_watchdog():
    assert pings(S.SUCCEEDED, barrier_passed=False)
    assert not pings(S.SUCCESSOR, barrier_passed=True)
    assert not pings(S.SUCCEEDED, barrier_passed=True)
    assert all(pings(state, True) for state in (S.BOOTING, S.SERVING, S.RELOADING, S.STOPPING))


def test_a_boot_is_stretched_for_as_long_as_it_may_take():
    assert extends(S.BOOTING, 1.0)
    assert not extends(S.BOOTING, 0.0)
    assert not extends(S.SERVING, 1.0)
    assert extends(S.RELOADING, -1.0)
    assert extends(S.STOPPING, -1.0)


@pytest.mark.parametrize(
    ("state", "now", "line"),
    [
        (S.BOOTING, Situation(workers=2, ready=1), "Starting: 1 of 2 workers ready"),
        (S.SERVING, Situation(generation=3, ready=1), "Generation 3 serves with 1 worker"),
        (S.SERVING, Situation(ready=2, draining=2), "Generation 1 serves with 2 workers; 2 older generations drain"),
        (S.SERVING, Situation(ready=2, note="it failed"), "Generation 1 serves with 2 workers; it failed"),
        (
            S.RELOADING,
            Situation(ready=2, new_ready=1, new_workers=2, phase="booting", note="old news"),
            "Generation 1 serves with 2 workers; upgrade: 1 of 2 new workers ready",
        ),
        (
            S.RELOADING,
            Situation(ready=2, kind="reload", phase="booting"),
            "Generation 1 serves with 2 workers; reload: reading the new configuration",
        ),
        (
            S.RELOADING,
            Situation(ready=2, phase="rolling_back"),
            "Generation 1 serves with 2 workers; upgrade: rolling back",
        ),
        (
            S.STOPPING,
            Situation(leaving=1, requests=3, jobs=1, reason="SIGTERM", left=65),
            "Stopping (SIGTERM): 1 worker with 3 requests and 1 job; at most 65 s from the start",
        ),
        (S.STOPPING, Situation(), "Stopping: every worker has left"),
    ],
)
def test_a_human_reads_the_status(state, now, line):
    assert status(state, now) == line
