"""`gracehooks.SyncWorker`: gunicorn's sync worker that leaves without losing.

While it serves, gunicorn's loop runs: one connection after the other. What is ours: a client that connects and sends
nothing holds the worker for PATIENCE seconds, not until the master's time-out kills it; then it waits in the lobby, from
where its request is served when it comes.

It relies on `accept`, `wait`, `handle`, `handle_request`, `wait_fds` of gunicorn's `SyncWorker`
(tests/contract/test_sync.py). The application runs in the main thread: when it is stuck, the sentinel ends the worker.
"""

from __future__ import annotations

import _socket
import os
import select
import socket
import ssl
import threading
import time
from typing import Any, NamedTuple

from gunicorn import sock as stock_sock
from gunicorn import util
from gunicorn.workers import sync

from gracehooks.gunicorn.workers.drained import Drained
from gracehooks.gunicorn.workers.sockets import (
    AGAIN,
    NO_ROOM,
    Named,
    ended,
    readable,
    shake,
    unread,
    unread_body,
    wrap_once,
)

__all__ = ["SyncWorker"]

#: How long the worker waits for the first byte of a new connection before it looks at others, in seconds.
PATIENCE = 1.0
#: How long a connection may wait in the lobby while the worker serves, in seconds.
LOBBY = 30.0
#: The longest pause of the loop while it drains, in seconds.
PAUSE = 0.25
#: How long a connection with unread bytes waits for its client to close, in seconds.
CLOSING = 2.0
#: How many such connections there may be before they are looked at between two requests.
MANY = 64
#: Later gunicorns close in two steps, and wait for the client so long; 23 closes at once.
CLOSES_AT_ONCE = not hasattr(util, "close_graceful")
AT_ONCE = socket.MSG_PEEK | socket.MSG_DONTWAIT


class Waiting(NamedTuple):
    """A connection in the lobby, and when its time is over."""

    listener: Any
    client: Any
    address: Any
    until: float


class SyncWorker(Drained, sync.SyncWorker):
    """The `worker_class` of `gracehooks.SyncWorker`: one request at a time, and a drain in phases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: New connections that have sent nothing yet, by their descriptors, oldest first.
        self._lobby: dict[int, Waiting] = {}
        #: Connections that we have closed and the client has not, with the time when we stop waiting.
        self._closing: dict[int, tuple[Any, float]] = {}
        self._names: dict[Any, Named] = {}
        self._serving_one = False
        self._thread = 0

    def at_loop(self) -> bool:
        """An application, which runs in the same thread, may call `notify` too."""
        return not self._serving_one

    # -- serving -----------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """gunicorn's loop; connections know their listeners by name."""
        self._names = {listener: Named(listener) for listener in self.sockets}
        self._thread = threading.get_ident()
        wrap_once()
        super().run()

    def accept(self, listener: Any) -> None:
        """Accept one connection and serve it, or leave it in the lobby when it stays silent."""
        if self._lobby or len(self._closing) > MANY:
            self._poll(0.0, ())
        client, address = listener.accept()
        util.close_on_exec(client)
        if self.cfg.is_ssl and not self.cfg.do_handshake_on_connect:
            client = stock_sock.ssl_wrap_socket(client, self.cfg)
        if self._speaks(client):
            self._serve(self._names[listener], client, address)
            return
        wait = LOBBY if self.alive else self.drain.linger(used=False)
        self._lobby[client.fileno()] = Waiting(self._names[listener], client, address, time.monotonic() + wait)

    def _speaks(self, client: Any) -> bool:
        """Whether the client sends its first byte within PATIENCE; a worker that leaves has none."""
        if _has_spoken(client):
            return True
        poll = select.poll()
        poll.register(client, select.POLLIN)
        poll.register(self.PIPE[0], select.POLLIN)
        until = time.monotonic() + PATIENCE
        while not self.drain.leaving and (left := until - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in poll.poll(left * 1000)]
            if client.fileno() in ready and _has_spoken(client):
                return True
            self._empty_pipe()
        return False

    def _serve(self, listener: Any, client: Any, address: Any) -> None:
        self._serving_one = True
        client.setblocking(True)
        try:
            self.handle(listener, client, address)
        finally:
            self.drain.end_failed(self._thread)
            self._serving_one = False

    def _empty_pipe(self) -> None:
        try:
            while os.read(self.PIPE[0], 1024):
                pass
        except OSError:
            pass

    def wait(self, timeout: float) -> list[Any]:
        """Wait for a connection, for the lobby or for a signal; gives the listeners that have something."""
        if not self._lobby and not self._closing:
            ready: list[Any] = super().wait(timeout) or []
            return ready
        self.notify()
        descriptors = self._poll(timeout, self.sockets)
        return [listener for listener in self.sockets if listener.fileno() in descriptors]

    def _poll(self, timeout: float, listeners: Any) -> set[int]:
        """Wait once, serve what the lobby has; gives the descriptors that were ready."""
        now = time.monotonic()
        for descriptor in [each for each, (_, until) in self._closing.items() if until <= now]:
            self._closing.pop(descriptor)[0].close()
        for waiting in [each for each in self._lobby.values() if each.until <= now]:
            if not readable(waiting.client):
                del self._lobby[waiting.client.fileno()]
                waiting.client.close()
        poll = select.poll()
        for descriptor in (self.PIPE[0], *(each.fileno() for each in listeners), *self._lobby, *self._closing):
            poll.register(descriptor, select.POLLIN)
        ends = [*(each.until for each in self._lobby.values()), *(until for _, until in self._closing.values())]
        soonest = min(ends, default=now + timeout) - now
        found = {descriptor for descriptor, _ in poll.poll(max(0.0, min(timeout, soonest)) * 1000)}
        if self.PIPE[0] in found:
            self._empty_pipe()
        for descriptor in [each for each in self._closing if each in found]:
            if ended(self._closing[descriptor][0]):
                self._closing.pop(descriptor)[0].close()
        for descriptor in [each for each in self._lobby if each in found]:
            waiting = self._lobby[descriptor]
            if not _has_spoken(waiting.client):
                continue
            del self._lobby[descriptor]
            self._serve(waiting.listener, waiting.client, waiting.address)
        return found

    def handle_request(self, listener: Any, req: Any, client: Any, addr: Any) -> None:
        """One request, from parsed to answered; one that the hammer interrupts stays on the page, also if gunicorn says 500."""
        slot = self.drain.begin(req.method, req.path, self._thread)
        try:
            super().handle_request(listener, req, client, addr)
        except BaseException:
            if not self.drain.hammered:
                self.drain.fail(slot, self._thread)
            raise
        else:
            self.drain.end(slot)
        finally:
            if self.nr >= self._recycle_at:
                self.ask_for_replacement()
        if self.drain.leaving or (CLOSES_AT_ONCE and (unread_body(req) or unread(client))):
            self._close(client)

    def _close(self, client: Any) -> None:
        """Close our side, and take the rest out of gunicorn's hands: it would close at once, or wait for the client."""
        sock = _socket.socket(client.family, client.type, client.proto, client.detach())
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            sock.close()
            return
        sock.setblocking(False)
        if ended(sock):
            sock.close()
            return
        self._closing[sock.fileno()] = (sock, time.monotonic() + CLOSING)

    def unread(self) -> int:
        """Connections of the lobby that have sent something, and one whose request has not arrived to its end."""
        lobby = sum(1 for each in list(self._lobby.values()) if _has_spoken(each.client))
        return lobby + int(self._serving_one and not self.drain.in_flight)

    # -- leaving -------------------------------------------------------------------------------------------------------
    def drain_requests(self) -> None:
        """Serve the backlog where it is ours, and whoever of the lobby speaks in time."""
        drain, deadline = self.drain, self.drain.deadline
        # With SO_REUSEPORT each process has a backlog of its own, which dies with its socket.
        waiting = list(self.sockets) if drain.final or self.cfg.reuse_port else []
        until = time.monotonic() + drain.linger(used=False)
        self._lobby = {key: each._replace(until=min(each.until, until)) for key, each in self._lobby.items()}
        while True:
            self.notify()
            if waiting:
                self._accept_waiting(waiting)
            if not waiting:
                self.close_listeners(self.sockets)
            if deadline.passed or not (waiting or self._lobby or self._closing):
                break
            self._poll(0.0 if waiting else min(PAUSE, deadline.left()), ())
        self.close_listeners(self.sockets)

    def _accept_waiting(self, waiting: list[Any]) -> None:
        """One connection of each listener; the other workers of a stop accept from the same ones."""
        if self.drain.orphan and self.drain.deadline.left() < self.settings.drain_timeout / 4:
            waiting.clear()  # nobody keeps new connections out: this would never end
        for listener in list(waiting):
            try:
                self.accept(listener)
            except OSError as error:
                if error.errno in NO_ROOM:
                    self._poll(PAUSE, ())
                elif error.errno not in AGAIN:
                    waiting.remove(listener)
            if self.drain.deadline.passed:
                return


def _has_spoken(client: Any) -> bool:
    """Whether a request has begun to arrive, or there is something else to see: the end, or an error. Does not wait."""
    try:
        if isinstance(client, ssl.SSLSocket):
            return shake(client) and readable(client)
        client.recv(1, AT_ONCE)
    except BlockingIOError:
        return False
    except OSError:
        pass  # it is broken: whoever reads it will see
    return True
