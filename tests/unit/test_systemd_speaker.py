"""The speaker and the datagrams, against a socket of our own in systemd's place; the clock is ours too."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator

import pytest

from gracehooks import events
from gracehooks.notify import KEPT, Notifier
from gracehooks.systemd.driver import BARRIER_WITHIN, NAMED_WITHIN, Speaker
from gracehooks.systemd.machine import Situation

ID = {"pid": 1, "generation": 1}
UPGRADE = {**ID, "id": "x", "kind": "upgrade"}


class Manager:
    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + path[1:] if path.startswith("@") else path)
        self.socket.setblocking(False)
        self.held: list[int] = []

    def heard(self) -> list[dict[str, str]]:
        """What came since the last call; descriptors are held, as by a manager that is busy."""
        found = []
        while True:
            try:
                data, rights, _, _ = self.socket.recvmsg(65536, 256)
            except BlockingIOError:
                return found
            for _, _, payload in rights:
                self.held += array.array("i", payload)
            found.append(dict(line.split("=", 1) for line in data.decode().split("\n")))

    def process(self) -> None:
        while self.held:
            os.close(self.held.pop())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def manager(tmp_path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.process()
    manager.socket.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def speaker(manager: Manager, clock: Clock, watchdog: float = 0, **options) -> Speaker:
    environ = {"NOTIFY_SOCKET": manager.path}
    if watchdog:
        environ.update(WATCHDOG_USEC=str(int(watchdog * 1e6)), WATCHDOG_PID=str(os.getpid()))
    made = Speaker(environ, clock=clock, **options)
    assert not environ, "workers must not find a way to speak"
    return made


def serving(manager: Manager, clock: Clock, **options) -> Speaker:
    made = speaker(manager, clock, **options)
    made.hear(events.ServingStarted(**ID, workers=2, seconds=1.0))
    made.tick(lambda: Situation(ready=2))
    manager.heard()
    return made


def tick(speaker: Speaker, manager: Manager) -> list[dict[str, str]]:
    speaker.tick(lambda: Situation(ready=2))
    return manager.heard()


def test_ready_comes_with_a_status_when_the_workers_are(manager, clock):
    made = speaker(manager, clock)
    assert all("READY" not in each for each in tick(made, manager))
    made.hear(events.ServingStarted(**ID, workers=2, seconds=1.0))
    assert tick(made, manager) == [{"READY": "1", "STATUS": "Generation 1 serves with 2 workers"}]


def test_the_successor_is_named_in_one_datagram_and_the_barrier_is_waited_for(manager, clock):
    made = serving(manager, clock)
    made.hear(events.UpgradeStarted(**UPGRADE, successor=4711))
    first, *_ = manager.heard()
    assert first["RELOADING"] == "1"
    assert int(first["MONOTONIC_USEC"]) > 0
    made.hear(events.UpgradeCompleted(**UPGRADE, successor=4711, phases={}))
    made.hear(events.RetiringStarted(**ID, workers=2))
    named, barrier = manager.heard()
    assert (named["READY"], named["MAINPID"]) == ("1", "4711")
    assert barrier == {"BARRIER": "1"}
    made.tick(Situation)
    assert made.holds, "the manager has not closed the pipe"
    manager.process()
    made.tick(Situation)
    assert not made.holds
    made.hear(events.StopStarted(**ID, reason="SIGTERM", budget=1))
    assert tick(made, manager) == [], "a retiring master never says that the service stops"


def test_a_manager_that_never_answers_holds_nobody_for_long(manager, clock):
    made = serving(manager, clock)
    made.hear(events.RetiringStarted(**ID, workers=2))
    manager.heard()
    clock.now += BARRIER_WITHIN
    made.tick(Situation)
    assert not made.holds


def test_the_watchdog_is_fed_without_a_gap_across_masters(manager, clock):
    old = serving(manager, clock, watchdog=10)
    fed = []
    old.hear(events.UpgradeStarted(**UPGRADE, successor=os.getpid()))
    environ = old.environment()
    Speaker.adopt(environ)
    assert environ == {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}
    new = Speaker(environ, successor=True, clock=clock)
    manager.heard()
    for second in range(60):
        clock.now += 1
        if second == 30:
            old.hear(events.UpgradeCompleted(**UPGRADE, successor=os.getpid(), phases={}))
            old.hear(events.RetiringStarted(**ID, workers=2))
            new.hear(events.MasterPromoted(**ID, reason="commit"))
        if second == 33:
            manager.process()
        old.tick(lambda: Situation(ready=2))
        said = manager.heard()
        if second == 33:
            new.named()
        new.tick(lambda: Situation(ready=2))
        if second < 33:
            assert manager.heard() == [], "nobody follows the new one yet"
        else:
            assert not any("WATCHDOG" in each for each in said), "the old one is not followed any more"
        said += manager.heard()
        if any("WATCHDOG" in each for each in said):
            fed.append(second)
    assert max(b - a for a, b in zip([-1, *fed], [*fed, 60], strict=False)) <= 5
    assert new.pace <= 2.5


def test_a_watchdog_that_is_another_process_s_is_not_fed(manager, clock):
    environ = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    made = Speaker(dict(environ), clock=clock)
    assert not any("WATCHDOG" in each for each in tick(made, manager))
    assert "WATCHDOG_USEC" not in made.environment()
    anchored = Speaker(dict(environ), clock=clock, anchored=True)
    assert any("WATCHDOG" in each for each in tick(anchored, manager))


def test_under_the_anchor_no_main_pid_is_named(manager, clock):
    made = serving(manager, clock, anchored=True)
    made.hear(events.RetiringStarted(**ID, workers=2))
    made.hear(events.UpgradeResumed(**UPGRADE, reason="it died"))
    made.tick(Situation)
    assert not any("MAINPID" in each for each in manager.heard())


def test_a_rollback_ends_the_reload_and_stays_in_the_status(manager, clock):
    made = serving(manager, clock)
    made.hear(events.UpgradeStarted(**UPGRADE, successor=4711))
    made.hear(events.UpgradeRolledBack(**UPGRADE, reason="ImportError:\nno module", phases={}))
    said = tick(made, manager)[-1]
    assert said["READY"] == "1"
    assert said["STATUS"].endswith("the last upgrade was rolled back: ImportError: no module")
    clock.now += 60
    assert tick(made, manager) == [], "and nothing more is said of it"


def test_a_refusal_says_both_words_in_two_datagrams(manager, clock):
    made = serving(manager, clock)
    made.hear(events.UpgradeRefused(**UPGRADE, reason="too many"))
    first, second = tick(made, manager)
    assert "RELOADING" in first
    assert "READY" not in first
    assert second["READY"] == "1"
    assert "too many" in second["STATUS"]


def test_a_promoted_master_that_is_never_named_names_itself(manager, clock):
    made = speaker(manager, clock, successor=True)
    made.hear(events.MasterPromoted(**ID, reason="commit"))
    assert made.unnamed
    assert tick(made, manager) == []
    clock.now += NAMED_WITHIN
    said = tick(made, manager)[0]
    assert (said["MAINPID"], said["READY"]) == (str(os.getpid()), "1")
    assert not made.unnamed


def test_a_stop_is_stretched_while_it_lasts_and_summed_up(manager, clock):
    made = serving(manager, clock)
    made.hear(events.StopStarted(**ID, reason="SIGTERM", budget=65))
    said = tick(made, manager)[0]
    assert (said["STOPPING"], said["EXTEND_TIMEOUT_USEC"]) == ("1", "20000000")
    clock.now += 6
    assert any("EXTEND_TIMEOUT_USEC" in each for each in tick(made, manager))
    made.hear(events.Stopped(**ID, id="y", outcome="completed", seconds=6.0, answered=1))
    assert manager.heard() == [{"STATUS": "Stopped after 6.0 s, nothing was lost"}]


def test_without_a_socket_nothing_is_said_or_held():
    environ = {"PATH": "/bin"}
    made = Speaker(environ)
    made.hear(events.RetiringStarted(**ID, workers=2))
    made.tick(Situation)
    assert (made.on, made.holds, made.unnamed) == (False, False, False)
    assert environ == {"PATH": "/bin"}


def test_an_abstract_socket(clock):
    manager = Manager(f"@gracehooks-test-{os.getpid()}")
    Notifier(manager.path).send("READY=1")
    assert manager.heard() == [{"READY": "1"}]
    manager.socket.close()


@pytest.mark.parametrize("address", ["/nowhere/at/all", "/" + "x" * 200, "@"])
def test_a_notifier_without_a_manager_never_raises_and_gives_up(address):
    notifier = Notifier(address)
    notifier.send("READY=1")
    barrier = notifier.barrier()
    assert notifier.flush()
    assert barrier.passed


def test_a_full_queue_keeps_the_order_and_never_blocks(manager):
    manager.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    notifier = Notifier(manager.path)
    for number in range(40):
        notifier.send(f"N={number}")
    assert not notifier.flush(), "a queue this small cannot have taken all"
    barrier = notifier.barrier()
    assert not barrier.passed
    heard = []
    for _ in range(200):
        heard += manager.heard()
        if notifier.flush() and "BARRIER" in (heard or [{}])[-1]:
            break
    assert [each.get("N") for each in heard[:-1]] == [str(number) for number in range(40)]
    manager.process()
    assert barrier.passed
    for number in range(2 * KEPT):
        notifier.send(f"N={number}")
    assert len(notifier._kept) <= KEPT
