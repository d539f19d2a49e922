"""The mooring, both sides in one process: what is handed over is held, once, by whom it belongs to, and given back whole."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gracehooks.anchor import family, mooring, renewal
from gracehooks.anchor.harbour import Harbour
from gracehooks.anchor.lines import ADDRESS, KEPT
from gracehooks.anchor.machine import Fact, Machine, Moored, Phase, Serving
from gracehooks.gunicorn.keepsake import Keepsake, take_keepsake

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="abstract sockets and /proc are Linux's")


@pytest.fixture
def harbour(monkeypatch: pytest.MonkeyPatch) -> Iterator[Harbour]:
    """An open harbour that this process's `mooring` speaks to."""
    found = Harbour.opened()
    assert found.address is not None
    assert found.door is not None
    monkeypatch.setenv(ADDRESS, found.address)
    monkeypatch.setattr(mooring, "_line", None)
    yield found
    for each in found.berths:
        each.line.close()
    found.door.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def heard(harbour: Harbour) -> list[Fact]:
    """Everything that was said until now."""
    facts = [fact for _, fact in harbour.arrivals(lambda _: None)]
    for berth in list(harbour.berths):
        facts += harbour.hear(berth, lambda _: None)
    return facts


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def test_sockets_are_held_and_the_last_offer_counts(harbour: Harbour, listener: socket.socket) -> None:
    me = os.getpid()
    mooring.offer([listener])
    assert heard(harbour) == [Moored(me)]
    assert harbour.hold(me)
    assert not harbour.hold(me), "nothing new"
    assert [inode(fd) for fd in harbour.holding] == [inode(listener.fileno())]
    assert harbour.names == [f"127.0.0.1:{listener.getsockname()[1]}"]
    assert not os.get_inheritable(harbour.holding[0])
    before = list(harbour.holding)
    mooring.offer([(listener.fileno(), "front"), listener])
    heard(harbour)
    assert harbour.hold(me)
    assert harbour.names[0] == "front"
    assert len(harbour.holding) == 2
    with pytest.raises(OSError):
        os.fstat(before[0])


def test_what_a_dead_master_handed_over_is_held_until_the_next_has_its_own(
    harbour: Harbour, listener: socket.socket
) -> None:
    mooring.offer([listener])
    heard(harbour)
    harbour.hold(os.getpid())
    held = list(harbour.holding)
    assert mooring._line is not None
    mooring._line.close()
    heard(harbour)
    assert not harbour.berths
    assert inode(held[0]) == inode(listener.fileno())
    mooring._line = None
    mooring.serving()
    heard(harbour)
    assert not harbour.hold(os.getpid()), "it serves, and has not handed over"
    mooring.offer([])
    heard(harbour)
    assert harbour.hold(os.getpid())
    assert harbour.holding == []


def test_what_a_master_says_of_itself_is_kept_beyond_its_end(harbour: Harbour) -> None:
    me = os.getpid()
    left = Keepsake(generation=8, workers=3, configured=2, state_dir="/run/a b")
    mooring.keep("older")
    mooring.keep(left.text())
    heard(harbour)
    harbour.hold(me + 1)
    assert harbour.keepsake == "", "another one serves"
    harbour.hold(me)
    _, again, _ = renewal.restore(renewal.carry(Machine(), harbour, "/"), rehearsal=True)
    assert again.keepsake == harbour.keepsake
    assert mooring._line is not None
    mooring._line.close()
    heard(harbour)
    os.environ[KEPT] = harbour.keepsake
    assert take_keepsake() == left
    assert KEPT not in os.environ
    os.environ[KEPT] = "{}"
    assert take_keepsake() is None


def test_sockets_of_one_that_never_serves_are_let_go(harbour: Harbour, listener: socket.socket) -> None:
    mooring.offer([listener])
    heard(harbour)
    fds = list(harbour.berths[0].fds or ())
    harbour.leave(harbour.berths[0])
    with pytest.raises(OSError):
        os.fstat(fds[0])


def test_a_socket_that_the_anchor_was_started_with_is_not_held_twice(harbour: Harbour, listener: socket.socket) -> None:
    harbour.own.add(inode(listener.fileno()))
    mooring.offer([listener])
    heard(harbour)
    harbour.hold(os.getpid())
    assert harbour.holding == []


def test_a_master_says_that_it_serves_and_what_a_stop_may_take(harbour: Harbour) -> None:
    mooring.serving()
    mooring.serving(61.5)
    me = os.getpid()
    assert heard(harbour) == [Moored(me), Serving(me), Serving(me, 61.5)]


def test_nonsense_is_not_taken_for_a_word(harbour: Harbour, listener: socket.socket) -> None:
    mooring._say("serving for-ever", ())
    mooring._say("hello", [listener.fileno()])
    with open(os.devnull) as file:
        mooring.offer([file])
    mooring._say("serving -1", ())
    me = os.getpid()
    assert heard(harbour) == [Moored(me), Serving(me), Serving(me)]
    assert harbour.berths[0].fds == []


def test_what_a_master_forks_does_not_speak_for_it(harbour: Harbour) -> None:
    mooring.serving()
    heard(harbour)
    child = os.fork()
    if child == 0:
        mooring.serving(5.0)
        os._exit(mooring.anchored())
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert heard(harbour) == []
    mooring.serving(6.0)
    assert heard(harbour) == [Serving(os.getpid(), 6.0)]


def test_adrift_when_the_anchor_is_gone(harbour: Harbour) -> None:
    assert not mooring.adrift(), "never moored"
    mooring.serving()
    heard(harbour)
    assert not mooring.adrift()
    for each in harbour.berths:
        each.line.close()
    assert mooring.adrift()


def test_without_an_anchor_nothing_happens(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    monkeypatch.setattr(mooring, "_line", None)
    monkeypatch.delenv(ADDRESS, raising=False)
    mooring.offer([listener])
    mooring.serving(1.0)
    assert not mooring.adrift()
    assert not mooring.anchored()
    monkeypatch.setenv(ADDRESS, "gracehooks-nobody-is-here")
    closed = socket.socket()
    closed.close()
    mooring.offer([listener, closed, 99999])
    assert not mooring.adrift()


def test_a_stranger_is_not_heard(harbour: Harbour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "descends", lambda pid: False)
    mooring.serving()
    assert heard(harbour) == []
    assert harbour.berths == []


def test_a_unix_socket_without_its_path_is_not_inherited(harbour: Harbour, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        mooring.offer([listener])
        heard(harbour)
        harbour.hold(os.getpid())
        assert len(harbour.fit_to_inherit()) == 1
        (tmp_path / "s").unlink()
        assert harbour.fit_to_inherit() == []


def test_the_state_survives_a_renewal(harbour: Harbour, listener: socket.socket) -> None:
    mooring.offer([listener])
    mooring.serving(9.0)
    machine = Machine()
    for fact in heard(harbour):
        machine.handle(fact, 1.0)
    harbour.hold(os.getpid())
    machine.retired.add(7)
    machine.phase = Phase.WAITING
    text = renewal.carry(machine, harbour, "/srv")
    rehearsed, nothing, _ = renewal.restore(text, rehearsal=True)
    assert nothing.door is None
    fds = sorted(os.listdir("/dev/fd"))
    found, again, directory = renewal.restore(text)
    try:
        assert vars(found) == vars(machine) == vars(rehearsed)
        assert directory == "/srv"
        assert again.address == harbour.address
        assert again.holding is again.berths[0].fds, "held once: a later offer closes it"
        assert sorted(os.listdir("/dev/fd")) == fds
    finally:
        for line in [again.door, *(each.line for each in again.berths)]:
            assert line is not None
            line.detach()


@pytest.mark.parametrize("text", ["", "{}", '{"format": 0}', '{"format": 1, "machine": {}}'])
def test_a_state_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        renewal.restore(text, rehearsal=True)
