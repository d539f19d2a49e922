"""One page of shared memory a worker: what it does now, readable by the master at any time, also after its death.

The worker object is made in the master before the fork, so one anonymous mapping is seen by both: no file, no lock, no
system call. The worker writes; the master reads, and writes `order`. A slot is published by writing its state last and
freed by writing that first, so a reader never sees half a slot, even when the writer was killed between two stores. The
state of a request's slot is a count with one byte that says "taken": it has one writer, so no lock is needed on the request
path, and the sum over the slots is the number of requests. A job's slot has its own counts of how its jobs ended, for the
same reason: whoever has the slot is their one writer. There are few slots at first, and more when they run out, up to a
bound; memory that no slot has touched is not taken from the system. Beyond the bound the counters stay exact and only the
names of the rest are given up.

This module knows no server, no signal and no settings.
"""

from __future__ import annotations

import heapq
import mmap
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from time import monotonic
from typing import Any, NamedTuple

__all__ = ["REPORT_ROOM", "JobInFlight", "Order", "Outcome", "Page", "Parts", "Phase", "RequestInFlight"]


class Phase(IntEnum):
    """Where a worker is in its life; the order is the order in which it passes through."""

    BOOTING = 0
    SERVING = 1
    LAME_DUCK = 2
    ACCEPTING_ENDS = 3
    REQUESTS = 4
    JOBS = 5
    CLEANUP = 6
    ENDED = 7


class Order(IntEnum):
    """What the master wants of a worker: written before the signal is sent, so one that still boots learns of it."""

    NONE = 0
    LAME_DUCK = 1  #: serve on, but answer 503 to readiness
    RETIRE = 2  #: leave; others hold the listener, the backlog is theirs
    STOP = 3  #: leave; serve the backlog first, nobody else will


class Outcome(IntEnum):
    """How a job ended."""

    SUCCEEDED = 0
    FAILED = 1
    CANCELLED = 2
    ABANDONED = 3
    REJECTED = 4


@dataclass(frozen=True)
class RequestInFlight:
    """A request that has begun and not ended; `started` is monotonic seconds, `path` has no query.

    `counted` says that a page counts it; a worker may know of others, whose answers were cut say.
    """

    method: str
    path: str
    started: float
    counted: bool = True

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return max(0.0, time.monotonic() - self.started)


@dataclass(frozen=True)
class JobInFlight:
    """A job that was accepted and has not ended; `started` is monotonic seconds, `pid` that of a child process, else 0."""

    id: int
    name: str
    kind: str
    started: float
    pid: int = 0

    @property
    def age(self) -> float:
        """Seconds since it was accepted."""
        return max(0.0, time.monotonic() - self.started)


# The head: fixed offsets, eight bytes each, aligned, so that one store is one store.
_PHASE, _ORDER, _READY, _REPLACE = 0, 8, 16, 24
_HEARTBEAT = 32
_BEGUN, _ANSWERED = 40, 48  # of the requests that found no slot
_ACCEPTED, _OUTCOMES = 56, 64  # of the jobs that found no slot; five outcomes follow: 64 … 96
_PHASE_SINCE = 104
_FAILURE_SIZE, _REPORT_SIZE = 112, 120
_LEAVING = 128
_REQUEST_SLOTS, _JOB_SLOTS = 136, 144  # how many there are now
_STANDS_SIZE = 152
_STANDS, _STANDS_ROOM = 160, 512
_FAILURE, _FAILURE_ROOM = _STANDS + _STANDS_ROOM, 1024
#: The most that a report may have, in bytes.
REPORT_ROOM = 2 << 20
_REPORT = _FAILURE + _FAILURE_ROOM
_SLOTS = _REPORT + REPORT_ROOM

_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
# State (the lowest byte: taken; the rest: how many have had the slot), started, method, length of the path, path.
_REQUEST = struct.Struct("<qd8sH102s")
_BEGIN = struct.Struct("<qd").pack_into  # the first two of them
_NAME = struct.Struct("<8sH102s")  # the last three
_REQUEST_SIZE, _PATH_ROOM = 128, 102
# State (odd: taken), started, id, pid, how many of its jobs ended in each way, kind, length of the name, name.
_JOB = struct.Struct("=qdqq32x12sH82s")
_JOB_NAME = struct.Struct("=12sH82s")  # the last three of them
_JOB_ID, _JOB_PID, _JOB_OUTCOMES, _JOB_NAME_AT = 2, 3, 4, 8  # in words
_JOB_SIZE, _NAME_ROOM = 160, 82


class Parts(NamedTuple):
    """See `Page.parts`."""

    pop: Callable[[], int]
    append: Callable[[int], None]
    entries: dict[int, list[Any]]
    name: Callable[[int, str, str], None]
    write: Callable[..., None]
    memory: mmap.mmap


class Page:
    """The scoreboard of one worker.

    `requests` and `jobs` are the numbers of named slots (1 or more) that it begins with, `most_requests` and `most_jobs`
    those that it may come to have; without them it keeps to what it begins with.
    """

    def __init__(
        self, requests: int = 256, jobs: int = 512, *, most_requests: int | None = None, most_jobs: int | None = None
    ) -> None:
        self._steps = requests, jobs
        self._most = most_requests or requests, most_jobs or jobs
        self._jobs_at = _SLOTS + self._most[0] * _REQUEST_SIZE
        size = self._jobs_at + self._most[1] * _JOB_SIZE
        self._map = mmap.mmap(-1, size)
        # Two views of the same memory, for stores of eight bytes that cost no call.
        self._view = memoryview(self._map)
        self._words = self._view.cast("q")
        self._times = self._view.cast("d")
        # What each slot is named after now, since the same request again need not be written again; and its next state.
        self._entries: dict[int, list[Any]] = {}
        self._jobs_named: dict[int, tuple[str, str]] = {}
        # Append and pop are atomic: slots are taken by threads, without a lock.
        self._free_requests: list[int] = []
        self._free_jobs: list[int] = []
        # What is read, modified and written has a lock: the counters of those without a slot, and the numbers of slots. It
        # lives in the worker alone.
        self._lock = threading.Lock()
        self._more_requests()
        self._more_jobs()

    @property
    def _states(self) -> range:
        """Where the requests' slots begin."""
        return range(_SLOTS, _SLOTS + self._get(_REQUEST_SLOTS) * _REQUEST_SIZE, _REQUEST_SIZE)

    @property
    def _job_states(self) -> range:
        """Where the jobs' slots begin, in words."""
        return range(self._jobs_at // 8, (self._jobs_at + self._get(_JOB_SLOTS) * _JOB_SIZE) // 8, _JOB_SIZE // 8)

    def _more_requests(self) -> bool:
        """Make more slots, and give whether there are any; the master knows of them before they are used."""
        before = len(self._states)
        self._set(_REQUEST_SLOTS, min(before + self._steps[0], self._most[0]))
        added = self._states[before:]
        self._entries.update((slot, ["", "", 257]) for slot in added)
        self._free_requests[:0] = added[::-1]
        return bool(added)

    def _more_jobs(self) -> bool:
        before = len(self._job_states)
        self._set(_JOB_SLOTS, min(before + self._steps[1], self._most[1]))
        added = self._job_states[before:]
        self._jobs_named.update(dict.fromkeys(added, ("", "")))
        self._free_jobs[:0] = added[::-1]
        return bool(added)

    def _one_of(self, free: list[int], more: Callable[[], bool]) -> int:
        """A slot of `free`, where that was empty: of those that `more` makes, -1 when it makes none."""
        with self._lock:
            while free or more():
                try:
                    return free.pop()
                except IndexError:
                    continue  # others were quicker, who need no lock
        return -1

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self._map)

    def close(self) -> None:
        """Give the memory back; the page cannot be read any more."""
        for view in (self._words, self._times, self._view):
            view.release()
        self._map.close()

    # -- the head ------------------------------------------------------------------------------------------------
    def _get(self, at: int) -> int:
        return int(_I64.unpack_from(self._map, at)[0])

    def _set(self, at: int, value: int) -> None:
        _I64.pack_into(self._map, at, value)

    @property
    def phase(self) -> Phase:
        """Where the worker is."""
        return Phase(self._get(_PHASE))

    @phase.setter
    def phase(self, phase: Phase) -> None:
        _F64.pack_into(self._map, _PHASE_SINCE, time.monotonic())
        self._set(_PHASE, phase)
        if phase >= Phase.SERVING:
            self._set(_READY, 1)

    @property
    def phase_since(self) -> float:
        """When the worker entered its phase, in monotonic seconds; 0.0 before the first change."""
        return float(_F64.unpack_from(self._map, _PHASE_SINCE)[0])

    @property
    def ready(self) -> bool:
        """Whether the worker has ever been ready to serve."""
        return bool(self._get(_READY))

    @property
    def order(self) -> Order:
        """What the master wants of the worker."""
        return Order(self._get(_ORDER))

    @order.setter
    def order(self, order: Order) -> None:
        self._set(_ORDER, order)

    @property
    def leaving(self) -> bool:
        """Whether the worker knows that it must leave: from here on it bounds itself."""
        return bool(self._get(_LEAVING))

    @leaving.setter
    def leaving(self, value: bool) -> None:
        self._set(_LEAVING, int(value))

    @property
    def wants_replacement(self) -> bool:
        """Whether the worker has reached `max_requests` and waits for its replacement."""
        return bool(self._get(_REPLACE))

    @wants_replacement.setter
    def wants_replacement(self, value: bool) -> None:
        self._set(_REPLACE, int(value))

    @property
    def heartbeat(self) -> float:
        """When the worker last said that it turns, in monotonic seconds."""
        return float(_F64.unpack_from(self._map, _HEARTBEAT)[0])

    @heartbeat.setter
    def heartbeat(self, at: float) -> None:
        _F64.pack_into(self._map, _HEARTBEAT, at)

    def _get_text(self, at: int, size_at: int) -> str:
        size = self._get(size_at)
        return self._map[at : at + size].decode("utf-8", "replace")

    def _set_text(self, at: int, room: int, size_at: int, text: str) -> None:
        raw = text.encode("utf-8", "replace")[:room]
        self._set(size_at, 0)
        self._map[at : at + len(raw)] = raw
        self._set(size_at, len(raw))

    @property
    def failure(self) -> str:
        """Why the worker could not become ready; empty while it can."""
        return self._get_text(_FAILURE, _FAILURE_SIZE)

    @failure.setter
    def failure(self, text: str) -> None:
        self._set_text(_FAILURE, _FAILURE_ROOM, _FAILURE_SIZE, text)

    @property
    def stands(self) -> str:
        """Where the boot stands, when it takes its time; innermost first."""
        return self._get_text(_STANDS, _STANDS_SIZE)

    @stands.setter
    def stands(self, text: str) -> None:
        self._set_text(_STANDS, _STANDS_ROOM, _STANDS_SIZE, text)

    @property
    def report(self) -> str:
        """The JSON that the worker wrote at a forced end, with stacks; empty where it had no turn to write."""
        return self._get_text(_REPORT, _REPORT_SIZE)

    @report.setter
    def report(self, text: str) -> None:
        if len(text.encode()) > REPORT_ROOM:
            return  # half a JSON text is worth nothing; the slots still name what was lost
        self._set_text(_REPORT, REPORT_ROOM, _REPORT_SIZE, text)

    # -- requests ------------------------------------------------------------------------------------------------
    def begin(self, method: str, path: str) -> int:
        """A request begins; gives its slot, or -1 when none can be had (it is counted all the same)."""
        try:
            slot = self._free_requests.pop()
        except IndexError:
            slot = self._one_of(self._free_requests, self._more_requests)
            if slot < 0:
                self._count_one(_BEGUN)
                return slot
        entry = self._entries[slot]
        if entry[0] != path or entry[1] != method:
            self._name(slot, method, path)
        state = entry[2]
        entry[2] = state + 256
        _BEGIN(self._map, slot, state, monotonic())
        return slot

    def end(self, slot: int) -> None:
        """The request of `slot` has ended; called once."""
        if slot >= 0:
            self._map[slot] = 0
            self._free_requests.append(slot)
        else:
            self._count_one(_ANSWERED)

    def parts(self) -> Parts:
        """What `begin` and `end` are made of, for a request path of one thread on which two calls are much.

        Begin: `slot = pop()`, which raises IndexError when none is free, then it is `begin`'s turn; `entry =
        entries[slot]`; `name(slot, method, path)` unless `entry[:2] == [path, method]`; `state = entry[2]; entry[2] = state +
        256`; `write(memory, slot, state, monotonic())`. End: `memory[slot] = 0; append(slot)`.
        """
        return Parts(self._free_requests.pop, self._free_requests.append, self._entries, self._name, _BEGIN, self._map)

    def _name(self, slot: int, method: str, path: str) -> None:
        raw = path.partition("?")[0].encode("utf-8", "replace")[:_PATH_ROOM]
        _NAME.pack_into(self._map, slot + 16, method.encode("ascii", "replace")[:8], len(raw), raw)
        self._entries[slot][:2] = path, method

    def _count_one(self, at: int) -> None:
        with self._lock:
            _I64.pack_into(self._map, at, _I64.unpack_from(self._map, at)[0] + 1)

    def _each_state(self) -> list[int]:
        states = self._states
        return self._words[states.start // 8 : states.stop // 8 : _REQUEST_SIZE // 8].tolist()

    @property
    def begun(self) -> int:
        """How many requests have begun."""
        return sum(state >> 8 for state in self._each_state()) + self._get(_BEGUN)

    @property
    def answered(self) -> int:
        """How many requests have ended."""
        return sum((state >> 8) - (state & 1) for state in self._each_state()) + self._get(_ANSWERED)

    @property
    def in_flight(self) -> int:
        """How many requests have begun and not ended; exact also where slots ran out."""
        taken = sum(state & 1 for state in self._each_state())
        return taken + max(0, self._get(_BEGUN) - self._get(_ANSWERED))

    def slots(self) -> dict[int, RequestInFlight]:
        """The requests in flight that have a slot, by their slots."""
        found = {}
        for slot in self._states:
            if self._map[slot]:
                request = self._request(slot)
                if request is not None:
                    found[slot] = request
        return found

    def _request(self, slot: int) -> RequestInFlight | None:
        state, started, method, size, raw = _REQUEST.unpack_from(self._map, slot)
        if not state & 1:
            return None
        path = raw[:size].decode("utf-8", "replace")
        return RequestInFlight(method.rstrip(b"\0").decode("ascii", "replace"), path, started)

    def requests(self, most: int | None = None) -> list[RequestInFlight]:
        """The same, oldest first; at `most` so many."""
        taken = [slot for slot in self._states if self._map[slot]]
        if most is not None and len(taken) > most:
            taken = heapq.nsmallest(most, taken, key=lambda slot: self._times[slot // 8 + 1])
        found = filter(None, map(self._request, taken))
        return sorted(found, key=lambda each: each.started)

    # -- jobs ----------------------------------------------------------------------------------------------------
    def job_begin(self, id: int, kind: str, name: str) -> int:
        """A job was accepted; gives its slot, or -1 when none can be had (it is counted all the same)."""
        try:
            slot = self._free_jobs.pop()
        except IndexError:
            slot = self._one_of(self._free_jobs, self._more_jobs)
            if slot < 0:
                self._count_one(_ACCEPTED)
                return slot
        self.publish_job(slot, id, kind, name, monotonic())
        return slot

    @property
    def take_job_slot(self) -> Callable[[], int]:
        """For a tracker: takes a free slot, for `publish_job`; raises IndexError when none is free, see `job_begin`.

        What has a slot is at work: it gives the slot back with `job_end` when all is written.
        """
        return self._free_jobs.pop

    def publish_job(self, slot: int, id: int, kind: str, name: str, started: float) -> None:
        """A job was accepted at `started`, and has `slot`."""
        named = self._jobs_named[slot]
        if named[1] != name or named[0] != kind:
            self._name_job(slot, kind, name)
        words = self._words
        words[slot + _JOB_ID] = id
        words[slot + _JOB_PID] = 0
        self._times[slot + 1] = started
        words[slot] += 1

    def withdraw_job(self, slot: int) -> None:
        """Undo `publish_job`, and keep the slot: the job was refused after all."""
        self._words[slot] -= 1

    def take_every_job_slot(self) -> bool:
        """Take all slots, when none is in use, so that no job can have one; gives whether it did."""
        free, taken = self._free_jobs, []
        if len(free) == len(self._job_states):
            try:
                while True:
                    taken.append(free.pop())
            except IndexError:
                pass
            if len(taken) < len(self._job_states):
                free.extend(reversed(taken))
                return False
            return True
        return False

    def _name_job(self, slot: int, kind: str, name: str) -> None:
        raw = name.encode("utf-8", "replace")[:_NAME_ROOM]
        at = (slot + _JOB_NAME_AT) * 8
        _JOB_NAME.pack_into(self._map, at, kind.encode("ascii", "replace")[:12], len(raw), raw)
        self._jobs_named[slot] = (kind, name)

    def job_pid(self, slot: int, pid: int) -> None:
        """The job of `slot` is the child process `pid`: whoever cleans up after this worker has to know."""
        if slot >= 0:
            self._words[slot + _JOB_PID] = pid

    def job_end(self, slot: int, outcome: Outcome) -> None:
        """The job of `slot` has ended so; for a job that was accepted."""
        words = self._words
        if slot >= 0:
            words[slot] += 1
            words[slot + _JOB_OUTCOMES + outcome] += 1
            self._free_jobs.append(slot)
        else:
            self._count_one(_OUTCOMES + 8 * outcome)

    def job_rejected(self) -> None:
        """A job was refused; it never counted as accepted."""
        self._count_one(_OUTCOMES + 8 * Outcome.REJECTED)

    def _each_job_word(self, offset: int) -> list[int]:
        states = self._job_states
        return self._words[states.start + offset : states.stop : states.step].tolist()

    def count(self, outcome: Outcome) -> int:
        """How many jobs ended so."""
        slots = 0 if outcome is Outcome.REJECTED else sum(self._each_job_word(_JOB_OUTCOMES + outcome))
        return slots + self._get(_OUTCOMES + 8 * outcome)

    @property
    def jobs_accepted(self) -> int:
        """How many jobs were accepted."""
        return sum((state + 1) >> 1 for state in self._each_job_word(0)) + self._get(_ACCEPTED)

    @property
    def jobs_in_flight(self) -> int:
        """How many accepted jobs have not ended; exact also where slots ran out."""
        ended = sum(self.count(outcome) for outcome in Outcome if outcome is not Outcome.REJECTED)
        return max(0, self.jobs_accepted - ended)

    def counts(self) -> dict[str, int]:
        """The jobs in numbers: accepted, and one number for each outcome."""
        return {"accepted": self.jobs_accepted, **{each.name.lower(): self.count(each) for each in Outcome}}

    def jobs(self, most: int | None = None) -> list[JobInFlight]:
        """The jobs in flight that have a slot, oldest first; at `most` so many."""
        words = self._words
        taken = [slot for slot in self._job_states if words[slot] & 1]
        if most is not None and len(taken) > most:
            taken = heapq.nsmallest(most, taken, key=lambda slot: self._times[slot + 1])
        found = filter(None, map(self._job, taken))
        return sorted(found, key=lambda each: each.started)

    def _job(self, slot: int) -> JobInFlight | None:
        state, started, id, pid, kind, size, raw = _JOB.unpack_from(self._map, slot * 8)
        if not state & 1:
            return None
        name = raw[:size].decode("utf-8", "replace")
        return JobInFlight(id, name, kind.rstrip(b"\0").decode("ascii", "replace"), started, pid)
