"""Performs what the machine decides, on a host that it knows only as a `Host`; never blocks.

`tick` is called by the host's loop, often while something is under way. Each state has one bound, and each ends as its
row in the machine's table says.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from gracehooks import events
from gracehooks.deadline import Deadline
from gracehooks.errors import PreflightError
from gracehooks.settings import Settings
from gracehooks.upgrade.machine import Action, Fact, Happened, State, step

__all__ = ["Driver", "Host"]

#: Between TERM and KILL for a successor that has never served: it holds no request.
TERM_TO_KILL = 3.0


class Host(Protocol):
    """What a server does for an upgrade; no method blocks."""

    kind: str

    def preflight(self) -> None:
        """Raise PreflightError where an upgrade cannot work; nothing was changed then."""

    def launch(self, id: str) -> int:
        """Start the successor; its pid. Raise PreflightError where that fails."""

    def facts(self) -> Iterable[Fact]:
        """What has happened to the successor since the last call."""

    def numbers(self) -> tuple[int, int]:
        """How many new workers are ready, and how many there will be."""

    def stands(self) -> str:
        """Where one of the new workers stands that are not ready, in a few words; empty where nobody knows."""

    def commit(self) -> None:
        """Tell the successor to take over."""

    def retire(self) -> None:
        """Tell the old workers to drain."""

    def roll_back(self, force: bool) -> None:
        """Tell the successor's whole tree to go (TERM), or kill it."""

    def clear_away(self) -> None:
        """The successor's master is gone: whatever it left behind goes too, what serves in good order."""

    def force_own(self) -> None:
        """Kill what is left of the old workers."""

    def resume(self) -> None:
        """Serve again."""

    def detach(self) -> None:
        """Watch the successor no more."""

    def leave(self) -> None:
        """The old generation has nothing left to do."""


class Driver:
    """One upgrade at a time; `identity` gives pid and generation for events, `record` takes history records."""

    def __init__(
        self,
        identity: Callable[[], dict[str, Any]],
        record: Callable[[dict[str, Any]], object],
    ) -> None:
        self._identity = identity
        self._record = record
        self.state = State.SERVING
        self.last: dict[str, Any] = {}  #: the status file's "upgrade"
        self._host: Host | None = None
        self._bound: Deadline | None = None
        self._since = 0.0
        self._reason = ""
        self._successor = 0
        self._settings = Settings()

    @property
    def under_way(self) -> bool:
        """Whether an upgrade has begun and has no verdict yet."""
        return self.state in (State.BOOTING, State.PROBATION, State.COMMITTING, State.ROLLING_BACK)

    @property
    def id(self) -> str:
        """The id of the last upgrade that began, or an empty text."""
        return str(self.last.get("id", ""))

    def begin(self, host: Host, settings: Settings, refusal: str = "") -> bool:
        """Begin an upgrade on `host`, or refuse it with a reason; whether it began."""
        id = uuid.uuid4().hex[:12]
        try:
            if self.under_way or self.state is State.RETIRING:
                kind = "a reload" if self.last.get("kind") == "reload" else "an upgrade"
                raise PreflightError(f"{kind} is under way ({self.state.value})")
            if refusal:
                raise PreflightError(refusal)
            host.preflight()
            successor = host.launch(id)
        except PreflightError as error:
            self.refuse(id, host.kind, str(error))
            return False
        self._host, self._settings, self._reason, self._successor = host, settings, "", successor
        self._since = time.monotonic()
        self.last = {
            "id": id,
            "kind": host.kind,
            "state": State.BOOTING.value,
            "reason": "",
            "started_at": time.time(),
            "phases": {},
            "workers_ready": 0,
            "workers": 0,
        }
        self._enter(State.BOOTING, settings.ready_timeout)
        events.publish(events.UpgradeStarted(**self._identity(), id=id, kind=host.kind, successor=successor))
        return True

    def refuse(self, id: str, kind: str, reason: str) -> None:
        """Say that an upgrade was refused, and why."""
        events.publish(events.UpgradeRefused(**self._identity(), id=id, kind=kind, reason=reason))
        self._record({"id": id, "kind": kind, "outcome": "refused", "reason": reason, "phases": {}, "lost": {}})

    def stop_asked(self) -> None:
        """The operator wants the server to stop: an upgrade that is not committed is aborted."""
        self._take(Fact(Happened.STOP_ASKED, "stopped while the upgrade was under way"))

    def idle(self) -> None:
        """The host stays and serves: the next one may begin."""
        self.state, self._host, self._bound = State.SERVING, None, None

    def workers_gone(self) -> None:
        """The old generation's workers have left."""
        self._take(Fact(Happened.WORKERS_GONE))

    def tick(self) -> None:
        """Look what has happened and act; called by the host's loop."""
        if self._host is None or self.state in (State.SERVING, State.RETIRED):
            return
        ready, workers = self._host.numbers()
        self.last["workers_ready"], self.last["workers"] = ready, workers
        self._hear()
        if self._bound is not None and self._bound.passed:
            self._take(Fact(Happened.TIME_UP, self._late()))
            self._hear()

    def _hear(self) -> None:
        """Take what has happened, and what the host answers at once to what is done about it."""
        while self._host is not None and (facts := list(self._host.facts())):
            for fact in facts:
                self._take(fact)

    def _late(self) -> str:
        ready, workers = self._host.numbers() if self._host else (0, 0)
        if self.state is State.BOOTING:
            found = f"{ready} of {workers} workers were ready" if workers else "no worker was ready"
            at = self._host.stands() if self._host else ""
            return f"hung for {self._settings.ready_timeout:g} s while booting ({found}){at and f', at {at}'}"
        if self.state is State.COMMITTING:
            return f"did not take over within {self._settings.ready_timeout:g} s"
        return ""

    def _take(self, fact: Fact) -> None:
        before = self.state
        after, actions = step(before, fact)
        if fact.reason and after is State.ROLLING_BACK and before is not after:
            self._reason = fact.reason
        if after is not before:
            self.last["phases"][before.value] = round(time.monotonic() - self._since, 3)
            self._enter(after, None)
        for action in actions:
            self._perform(action, fact)

    def _enter(self, state: State, bound: float | None) -> None:
        self.state = state
        self._since = time.monotonic()
        self._bound = None if bound is None else Deadline.after(bound)
        if state not in (State.SERVING, State.RETIRING, State.RETIRED):
            self.last["state"] = state.value

    def _perform(self, action: Action, fact: Fact) -> None:
        host, identity = self._host, self._identity()
        assert host is not None
        names: dict[str, Any] = {"id": self.id, "kind": host.kind}
        if action is Action.BEGIN_PROBATION:
            self._bound = Deadline.after(self._settings.probation)
            events.publish(events.ProbationStarted(**identity, **names, seconds=self._settings.probation))
        elif action is Action.COMMIT:
            self._bound = Deadline.after(self._settings.ready_timeout)
            host.commit()
        elif action is Action.RETIRE:
            self.last["state"] = "completed"
            self._bound = Deadline.after(self._settings.leave_budget + 0.5)
            events.publish(
                events.UpgradeCompleted(
                    **identity, **names, successor=self._successor, phases=dict(self.last["phases"])
                )
            )
            host.retire()
        elif action is Action.ROLL_BACK:
            self.last["reason"] = self._reason
            if fact.happened is Happened.DIED:
                self._take(fact)  # nothing is left to be told to go
                return
            served = "probation" in self.last["phases"]
            self._bound = Deadline.after(self._settings.leave_budget + 1 if served else TERM_TO_KILL)
            host.roll_back(False)
        elif action is Action.FORCE:
            self._bound = Deadline.after(1.0)
            host.roll_back(True)
        elif action is Action.FORCE_OWN:
            self._bound = Deadline.after(1.0)
            host.force_own()
        elif action is Action.FINISH_ROLLBACK:
            host.clear_away()
            self.last["state"] = "rolled_back"
            host.resume()
            phases = dict(self.last["phases"])
            events.publish(events.UpgradeRolledBack(**identity, **names, reason=self._reason, phases=phases))
            self._record({**names, "outcome": "rolled_back", "reason": self._reason, "phases": phases, "lost": {}})
            self._host = None
        elif action is Action.RESUME:
            host.clear_away()
            self.last["state"], self.last["reason"] = "rolled_back", f"resumed: {fact.reason}"
            host.resume()
            events.publish(events.UpgradeResumed(**identity, **names, reason=fact.reason))
            self._record(
                {
                    **names,
                    "outcome": "rolled_back",
                    "reason": f"the new generation died while the old one was leaving ({fact.reason}); resumed",
                    "phases": dict(self.last["phases"]),
                    "lost": {},
                }
            )
            self._host = None
        elif action is Action.DETACH:
            host.detach()
        elif action is Action.LEAVE:
            host.leave()
