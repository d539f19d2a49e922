"""`gracehooks.GeventWorker`: gunicorn's gevent worker that leaves without losing.

gunicorn's handling of a connection is kept; the loop that starts the servers and looks at the clock is ours, since
gunicorn's sleeps a second at a time. A connection waits for the first byte of a request here, outside of the parser: so a
drain knows which connections are idle and lets them linger, and a request that has begun to arrive is read to its end.

It relies on `handle`, `handle_request`, `handle_http2`, `timeout_ctx` and `patch` of gunicorn's `GeventWorker`, on
gevent's `StreamServer.do_read`, `do_handle` and `full`, and on `cancel_wait` (tests/contract/test_gevent.py).
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from typing import Any

import gevent
from gevent import socket as gevent_socket
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.sock import ssl_context
from gunicorn.workers import ggevent

from gracehooks.gunicorn.workers.drained import Drained
from gracehooks.gunicorn.workers.sockets import (
    AGAIN,
    NO_ROOM,
    Announced,
    Named,
    close_in_steps,
    readable,
    unread,
    unread_body,
)

__all__ = ["GeventWorker"]

#: How long a request's head may take to arrive once it has begun, in seconds; gunicorn's own bound is `keepalive` alone.
HEAD = 10.0
#: How long a connection with unread bytes waits for its client to close, in seconds.
CLOSING = 2.0
#: The longest pause of the main greenlet, in seconds.
TURN = 1.0
PAUSE = 0.25
#: How many connections may be served at once, at most, while the backlog is accepted before the others get their turn.
AHEAD = 64


class Connection:
    """A connection and the greenlet that serves it: whether it waits for a request, and until when."""

    __slots__ = ("busy", "event", "greenlet", "http2", "sock", "unreader", "until", "used", "waited", "watcher")

    def __init__(self, sock: Any, greenlet: Any) -> None:
        self.sock = sock
        self.greenlet = greenlet
        self.event: Any = None
        self.watcher: Any = None
        self.unreader: Any = None
        self.until = 0.0  #: only while it waits; 0.0 while it does not
        self.waited = False  #: the first request has begun to arrive; gunicorn's own loop need not wait for it again
        self.used = False
        self.busy = False
        self.http2 = False

    def has_more(self) -> bool:
        """Whether bytes are here that nobody has read: in the parser, in the TLS layer or in the kernel; or the end."""
        if self.unreader is not None and self.unreader.buf.getvalue():
            return True
        return readable(self.sock)

    def wait(self, seconds: float) -> None:
        """Wait for a byte, the end or `wake`, at most so long."""
        if self.event is None:
            self.event = Event()
            self.watcher = gevent.get_hub().loop.io(self.sock.fileno(), 1)
        self.event.clear()
        self.watcher.start(self.event.set)
        try:
            self.event.wait(seconds)
        finally:
            self.watcher.stop()

    def wake(self) -> None:
        """Let `wait` return."""
        if self.event is not None:
            self.event.set()

    def forget(self) -> None:
        """The connection is over."""
        if self.watcher is not None:
            self.watcher.close()
            self.watcher = self.event = None


class Reading:
    """gunicorn's `timeout_ctx`: the time of one request's head, from before its first byte."""

    __slots__ = ("_timeout", "_worker")

    def __init__(self, worker: GeventWorker) -> None:
        self._worker = worker

    def __enter__(self) -> None:
        worker = self._worker
        conn = worker.connections.get(gevent.getcurrent())
        if conn is not None and not worker.wait_for_request(conn):
            raise StopIteration  # gunicorn closes the connection on it, quietly
        self._timeout = gevent.Timeout.start_new(max(worker.cfg.keepalive, HEAD), False)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> bool:
        self._timeout.close()
        return value is self._timeout


class GeventWorker(Drained, ggevent.GeventWorker):
    """The `worker_class` of `gracehooks.GeventWorker`: greenlets, keep-alive, and a drain in phases."""

    takes_over = False
    loop_kind = "gevent"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: The connections of this worker, by the greenlets that serve them.
        self.connections: dict[Any, Connection] = {}
        self._servers: list[Any] = []
        self._awake: Any = None
        self._alarm: Any = None

    # -- serving -----------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Make what wakes the main greenlet, also from signal handlers and other threads; then serve."""
        self.drain.runner = gevent.getcurrent()
        self._awake = Event()
        self._alarm = gevent.get_hub().loop.async_()
        self._alarm.start(self._awake.set)
        super().run()

    def serve(self) -> None:
        """Start a server for each listener and look at the clock; `notify` ends it."""
        arguments = {"ssl_context": ssl_context(self.cfg)} if self.cfg.is_ssl else {}
        for listener in self.sockets:
            listener.setblocking(1)
            pool = Pool(self.worker_connections)
            server = StreamServer(listener, handle=partial(self.handle, Named(listener)), spawn=pool, **arguments)
            if self.cfg.workers > 1:
                server.max_accept = 1
            server.start()
            self._servers.append(server)
        while True:
            self.notify()
            self._turn(TURN)

    def _turn(self, seconds: float) -> None:
        self._awake.wait(seconds)
        self._awake.clear()

    def at_loop(self) -> bool:
        """The main greenlet is the loop; requests have greenlets of their own."""
        return gevent.getcurrent() is gevent.get_hub().parent

    def notify(self) -> None:
        """The heartbeat. gunicorn's would end the process at once when the master is gone; ours drains."""
        known, self.ppid = self.ppid, os.getppid()
        try:
            super().notify()
        finally:
            self.ppid = known

    def wake(self) -> None:
        """Wake the main greenlet; from any thread and from signal handlers."""
        if self._alarm is not None:
            self._alarm.send()

    # -- connections -------------------------------------------------------------------------------------------------
    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """One connection, from accepted to closed."""
        greenlet = gevent.getcurrent()
        conn = self.connections[greenlet] = Connection(client, greenlet)
        try:
            if self.wait_for_request(conn):
                conn.waited = True
                super().handle(listener, client, addr)
            else:
                client.close()
        finally:
            del self.connections[greenlet]
            conn.forget()

    def timeout_ctx(self) -> Reading:
        """What gunicorn puts round the reading of each request's head."""
        return Reading(self)

    def wait_for_request(self, conn: Connection) -> bool:
        """Wait until the connection has something to read; False when its time is over.

        While the worker serves that time is gunicorn's `keepalive` (without end where that is 0); once it leaves it is
        the linger.
        """
        if conn.waited:
            conn.waited = False
            return True
        started = time.monotonic()
        conn.until = started + (self.cfg.keepalive or float("inf"))
        if self.drain.leaving:
            self._linger(conn, started)
        try:
            while not conn.has_more():
                left = conn.until - time.monotonic()
                if left <= 0:
                    return False
                conn.wait(min(left, 3600.0))
            return True
        finally:
            conn.until = 0.0

    def _linger(self, conn: Connection, since: float) -> None:
        conn.until = min(conn.until, since + self.drain.linger(used=conn.used))

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        """One request, from parsed to answered."""
        greenlet = gevent.getcurrent()
        conn = self.connections.get(greenlet)
        if conn is not None:
            conn.busy, conn.unreader = True, getattr(req, "unreader", None)
        number = self.drain.begin(req.method, req.path, greenlet)
        req.should_close = Announced(self.drain, req.should_close)
        try:
            return super().handle_request(listener_name, req, sock, addr)
        except StopIteration:
            if unread_body(req) or unread(sock):
                close_in_steps(sock, CLOSING)
            raise
        finally:
            del req.should_close  # it knows the request, which would know it
            self.drain.end(number)
            if conn is not None:
                conn.busy, conn.used = False, True
            if self.nr >= self._recycle_at:
                self.ask_for_replacement()

    def handle_http2_request(self, listener_name: Any, req: Any, sock: Any, addr: Any, h2_conn: Any) -> Any:
        """One stream of an HTTP/2 connection, from parsed to answered."""
        greenlet = gevent.getcurrent()
        conn = self.connections.get(greenlet)
        if conn is not None:
            conn.busy = True
        number = self.drain.begin(req.method, req.path, greenlet)
        try:
            return super().handle_http2_request(listener_name, req, sock, addr, h2_conn)
        finally:
            self.drain.end(number)
            if conn is not None:
                conn.busy, conn.used = False, True
            if self.nr >= self._recycle_at:
                self.ask_for_replacement()

    def handle_http2(self, *args: Any, **kwargs: Any) -> Any:
        """An HTTP/2 connection: it waits in a read of its own."""
        conn = self.connections.get(gevent.getcurrent())
        if conn is not None:
            conn.http2 = True
        return super().handle_http2(*args, **kwargs)

    def unread(self) -> int:
        """Connections that have begun to send a request, and whose request has not been read to its end."""
        return sum(1 for each in list(self.connections.values()) if not each.busy and not each.until)

    # -- signals -----------------------------------------------------------------------------------------------------
    def handle_quit(self, sig: int, frame: Any) -> None:
        """The hammer. The handler runs in whichever greenlet is at work and may not wait; one of its own does the rest."""
        del frame
        self._brace(signal.Signals(sig).name, self.cfg.worker_int)

    def handle_abort(self, sig: int, frame: Any) -> None:
        """The same with gunicorn's `worker_abort` hook."""
        del sig, frame
        self.drain.exit_code = 1
        self._brace("WORKER TIMEOUT", self.cfg.worker_abort)

    def _brace(self, reason: str, hook: Any) -> None:
        self.drain.brace(reason)
        self.hook_before_exit = hook
        gevent.spawn(self._end_now, reason, hook)

    # -- leaving -----------------------------------------------------------------------------------------------------
    def drain_requests(self) -> None:
        """Serve the backlog where it is ours, and whatever comes on the connections in time."""
        drain, deadline = self.drain, self.drain.deadline
        started = time.monotonic()
        for server in self._servers:
            server.stop_accepting()
        # With SO_REUSEPORT each process has a backlog of its own, which dies with its socket.
        waiting = list(self._servers) if drain.final or self.cfg.reuse_port else []
        for conn in list(self.connections.values()):
            if conn.until:
                self._linger(conn, started)
                conn.wake()
            elif conn.http2 and not conn.busy:
                _goaway(conn)
        handshakes_until = started + drain.linger(used=False)
        while not deadline.passed:
            self.notify()
            if waiting:
                self._accept_waiting(waiting)
            if not waiting:
                self._close_listeners()
                busy = [server for server in self._servers if len(server.pool)]
                if not busy:
                    break
                if time.monotonic() >= handshakes_until:
                    self._end_handshakes(busy)
                busy[0].pool.join(timeout=min(PAUSE, deadline.left()))
            else:
                self._turn(0.005)
        self._close_listeners()

    def _accept_waiting(self, waiting: list[Any]) -> None:
        """Accept until a listener has nothing more, and then leave it; not far ahead of what is being served."""
        if self.drain.orphan and self.drain.deadline.left() < self.settings.drain_timeout / 4:
            waiting.clear()  # nobody keeps new connections out: this would never end
        for server in list(waiting):
            while not server.full() and self.drain.in_flight < AHEAD:
                try:
                    accepted = server.do_read()
                except OSError as error:
                    if error.errno in AGAIN:
                        continue
                    if error.errno not in NO_ROOM:
                        waiting.remove(server)
                    break
                if not accepted:
                    waiting.remove(server)
                    break
                server.do_handle(*accepted)
                gevent.sleep(0)

    def _end_handshakes(self, servers: list[Any]) -> None:
        """A connection that is still in its TLS handshake when the linger is over has sent no request."""
        for server in servers:
            for greenlet in list(server.pool):
                if greenlet not in self.connections:
                    greenlet.kill(block=False)

    def _close_listeners(self) -> None:
        if self.sockets:
            for server in self._servers:
                server.close()
            self.sockets = []
            self.drain.accepting_ended()


def _goaway(conn: Connection) -> None:
    """Let an idle HTTP/2 connection find that its time is over: gunicorn answers that with GOAWAY."""
    try:
        gevent_socket.cancel_wait(conn.sock._read_event, TimeoutError("the worker leaves"))
    except AttributeError:
        pass  # it ends at its own time-out
