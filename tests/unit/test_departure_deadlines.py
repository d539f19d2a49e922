"""When the master kills a worker that was told to go."""

from __future__ import annotations

from gracehooks.deadline import Deadline
from gracehooks.gunicorn.pool import Departure

PAST, FUTURE = Deadline.after(-1.0), Deadline.after(1000.0)


def test_a_worker_that_knows_has_its_whole_bound():
    assert not Departure(FUTURE, "", heard=PAST).overdue(ready=True, leaving=True)
    assert Departure(PAST, "", heard=PAST).overdue(ready=True, leaving=True)


def test_a_worker_that_never_learned_of_it_is_overdue_after_the_drain_time():
    assert Departure(FUTURE, "", heard=PAST).overdue(ready=True, leaving=False)
    assert not Departure(FUTURE, "", heard=FUTURE).overdue(ready=True, leaving=False)


def test_a_class_that_does_not_say_so_and_a_worker_that_boots_have_their_own_bounds():
    assert not Departure(FUTURE, "").overdue(ready=True, leaving=False)
    assert not Departure(FUTURE, "", heard=PAST).overdue(ready=False, leaving=False)
