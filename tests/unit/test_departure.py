"""How the connections of an event loop leave, replayed on connections that are only states."""

from __future__ import annotations

import asyncio
import socket

import pytest

from gracehooks.deadline import Deadline
from gracehooks.gunicorn.workers import departure
from gracehooks.gunicorn.workers.departure import State, depart, spread
from gracehooks.gunicorn.workers.farewell import Farewell, PoliteTransport, unread


@pytest.mark.parametrize("count", [1, 3, 20, 200])
def test_websockets_are_spread_evenly_with_jitter(count):
    moments = spread(count, 10.0)
    width = min(10.0, count * departure.SPREAD)
    assert len(moments) == count
    assert moments == sorted(moments)
    assert all(0 <= each <= width for each in moments)
    step = width / count
    assert all(number * step <= each <= (number + 1) * step for number, each in enumerate(moments))


def test_nothing_is_spread_over_no_time():
    assert spread(0, 10.0) == []
    assert spread(2, -1.0) == [0.0, 0.0]


class Connection:
    def __init__(self, state):
        self.state = state


class Transport:
    """No socket: nothing is unread."""

    def get_extra_info(self, name):
        return None


class Side:
    """A server whose connections do what the test says."""

    def __init__(self, *states):
        self.open = [Connection(each) for each in states]
        self.closed: list[State] = []
        self.restarted = 0
        self.told_at: float | None = None
        self.calls = 0
        self.handshakes = 0
        self.loop = asyncio.get_running_loop()

    def connections(self):
        return list(self.open)

    def beginning(self):
        return self.handshakes

    def ending(self):
        return 0

    def calls_in_flight(self):
        return self.calls

    def state(self, connection):
        return connection.state

    def transport(self, connection):
        return Transport()

    def close(self, connection, patience):
        self.closed.append(connection.state)
        self.open.remove(connection)

    def restart(self, connection):
        self.restarted += 1
        self.open.remove(connection)

    def tell(self):
        if self.told_at is None:
            self.told_at = self.loop.time()

    def settle(self):
        pass

    def unsent(self):
        return []


def leave(bound, scenario, linger=lambda used: 0.05 if used else 0.1):
    """Run one departure; gives how long it took and its side."""

    async def run():
        side = scenario()
        began = side.loop.time()
        await depart(side, Deadline.after(bound), bound, linger, asyncio.sleep)
        return side.loop.time() - began, side

    return asyncio.run(run())


def test_without_connections_it_is_over_at_once():
    took, _ = leave(10, Side)
    assert took < 0.5


def test_idle_connections_are_closed_after_their_linger_and_announced_ones_at_once():
    took, side = leave(10, lambda: Side(State.NEW, State.IDLE, State.DONE))
    assert side.closed == [State.DONE, State.IDLE, State.NEW]
    assert 0.1 <= took < 1


@pytest.mark.parametrize("state", [State.BUSY, State.READING, State.OPENING])
def test_what_is_under_way_is_waited_for_until_the_deadline(state):
    took, side = leave(0.3, lambda: Side(state))
    assert 0.3 <= took < 1
    assert side.closed == []
    assert side.told_at is not None


def test_calls_without_a_connection_are_waited_for():
    def scenario():
        side = Side()
        side.calls = 1
        side.loop.call_later(0.1, setattr, side, "calls", 0)
        return side

    took, _ = leave(10, scenario)
    assert 0.1 <= took < 1


def test_a_handshake_is_waited_for_as_long_as_a_silent_connection():
    def scenario():
        side = Side()
        side.handshakes = 1  # it has failed, and nobody has collected what it was made of
        return side

    took, _ = leave(10, scenario)
    assert 0.1 <= took < 1


def test_websockets_are_restarted_before_streams_are_told():
    took, side = leave(1.0, lambda: Side(*[State.WEBSOCKET] * 4))
    assert side.restarted == 4
    assert took < 1.0


# -- closing -------------------------------------------------------------------------------------------------------
class Server(asyncio.Protocol):
    """Notes what it is told of one connection."""

    def __init__(self):
        self.lost = asyncio.Event()
        self.transport = None

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, exc):
        self.lost.set()


def with_connection(scenario):
    """Run `scenario(protocol, client)` on a connection of a real loop; the client is a plain socket."""

    async def run():
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        _, protocol = await loop.create_connection(Server, sock=ours)
        try:
            return await asyncio.wait_for(scenario(protocol, theirs), 30)
        finally:
            theirs.close()
            protocol.transport.abort()

    return asyncio.run(run())


def test_a_farewell_sends_what_was_written_reads_what_still_comes_and_ends_with_the_client():
    ended = []

    async def scenario(protocol, client):
        loop = asyncio.get_running_loop()
        protocol.transport.write(b"answer")
        Farewell(protocol.transport, protocol, loop, 20, ended.append).begin()
        assert await loop.sock_recv(client, 100) == b"answer"
        await loop.sock_sendall(client, b"more of an upload")
        assert await loop.sock_recv(client, 100) == b""
        assert not protocol.lost.is_set()
        client.shutdown(socket.SHUT_WR)
        await protocol.lost.wait()

    with_connection(scenario)
    assert len(ended) == 1


def test_a_farewell_does_not_wait_for_a_client_that_stays():
    async def scenario(protocol, client):
        Farewell(protocol.transport, protocol, asyncio.get_running_loop(), 0.05, lambda _: None).begin()
        await protocol.lost.wait()

    with_connection(scenario)


def test_a_polite_transport_is_closed_once_and_writes_nothing_after():
    async def scenario(protocol, client):
        farewells = []
        polite = PoliteTransport(protocol.transport, protocol, lambda *args: farewells.append(args))
        polite.write(b"a")
        polite.writelines([b"b", b"c"])
        assert not polite.is_closing()
        polite.close()
        polite.close()
        polite.write(b"d")
        assert polite.is_closing()
        assert [each[:2] for each in farewells] == [(protocol.transport, protocol)]
        assert polite.get_extra_info("socket") is not None
        await asyncio.sleep(0)
        assert await asyncio.get_running_loop().sock_recv(client, 100) == b"abc"

    with_connection(scenario)


def test_unread_bytes_are_seen():
    async def scenario(protocol, client):
        protocol.transport.pause_reading()
        assert unread(protocol.transport) == 0
        client.send(b"GET /")
        assert unread(protocol.transport) == 5

    with_connection(scenario)
    assert unread(Transport()) == 0
