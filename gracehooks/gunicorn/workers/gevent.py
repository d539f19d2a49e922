"""`gracehooks.GeventWorker`: gunicorn's gevent worker that leaves without losing.

gunicorn's handling of a connection is kept; the loop that starts the servers and looks at the clock is ours, since
gunicorn's sleeps a second at a time. A connection knows whether a byte of its next request has been read: so a drain lets
idle ones linger, and a request that has begun to arrive is read to its end.

It relies on `handle`, `handle_request`, `handle_http2`, `timeout_ctx` and `patch` of gunicorn's `GeventWorker`, on
gevent's `StreamServer.do_read`, `do_handle` and `full`, and on `cancel_wait` (tests/contract/test_gevent.py).
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import gevent
from gevent import socket as gevent_socket
from gevent import ssl as gevent_ssl
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.sock import ssl_context
from gunicorn.workers import ggevent
from gunicorn.workers.base import Worker as StockWorker

from gracehooks.drain import report
from gracehooks.gunicorn.workers.drained import Drained, announce
from gracehooks.gunicorn.workers.http2 import end_well
from gracehooks.gunicorn.workers.sockets import (
    AGAIN,
    NO_ROOM,
    Named,
    close_in_steps,
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


class Socket(gevent_socket.socket):
    """A client's connection that knows whether it was read from since `fed` was last cleared."""

    fed = False

    def recv(self, *args: Any) -> bytes:
        """The same as ever."""
        data: bytes = super().recv(*args)
        self.fed = True
        return data


class TLSSocket(gevent_ssl.SSLSocket):
    """The same for TLS."""

    fed = False

    def recv(self, *args: Any) -> bytes:
        """The same as ever."""
        data: bytes = super().recv(*args)
        self.fed = True
        return data


class Server(StreamServer):
    """gevent's own, with connections of ours."""

    handle: Any

    def do_read(self) -> Any:
        """Accept one connection; None when there is none."""
        listener = self.socket
        try:
            descriptor, address = listener._accept()
        except BlockingIOError:
            return None
        return Socket(listener.family, listener.type, listener.proto, fileno=descriptor), address

    def close(self) -> None:
        """Close the listener, and serve those all the same whose TLS handshake is under way: gevent's forgets how."""
        handle = self.handle
        super().close()
        self.handle = handle


class Connection:
    """A connection: whether it is at a request (`busy`), has carried one (`used`), or waits for one (`reading`)."""

    __slots__ = ("busy", "http2", "reading", "sock", "used")

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.busy = False
        self.used = False
        self.http2 = False
        self.reading: Reading | None = None

    def has_begun(self) -> bool:
        """Whether a byte of the next request is here."""
        return bool(getattr(self.sock, "fed", False) or unread(self.sock))


class Reading:
    """gunicorn's `timeout_ctx`: the time for one request's head.

    It is `keepalive`, as gunicorn has it, until the first byte; a head that has begun to arrive has HEAD seconds at least.
    When the worker leaves it is the linger, and what has begun to arrive has all the time there is.
    """

    __slots__ = ("_conn", "_greenlet", "_since", "_timer", "_worker")

    def __init__(self, worker: GeventWorker, conn: Connection) -> None:
        self._worker = worker
        self._conn = conn
        self._greenlet = gevent.getcurrent()
        self._timer: Any = None

    def __enter__(self) -> None:
        self._since = time.monotonic()
        self._conn.reading = self
        if self._worker.drain.leaving:
            self.linger(self._since)
        elif self._worker.cfg.keepalive:
            self._set(self._worker.cfg.keepalive)

    def __exit__(self, kind: Any = None, value: Any = None, trace: Any = None) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._conn.reading = None

    def linger(self, since: float) -> None:
        """Wait as long as a connection without a request may, from `since` on, once the worker leaves."""
        used, keepalive = self._conn.used, self._worker.cfg.keepalive
        until = since + self._worker.drain.linger(used=used)
        if used and keepalive:
            until = min(until, self._since + keepalive)
        self._set(until - time.monotonic())

    def _set(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.close()
        self._timer = gevent.get_hub().loop.timer(max(0.0, seconds))
        self._timer.start(self._expired)

    def _expired(self) -> None:
        """In the hub: has nothing come in time?"""
        conn, drain = self._conn, self._worker.drain
        if conn.has_begun():
            longest = max(self._worker.cfg.keepalive, HEAD)
            left = drain.deadline.left() if drain.leaving else self._since + longest - time.monotonic()
            if left > 0:
                self._set(left)
                return
            if drain.leaving:
                self._worker.given_up += 1
        self._greenlet.throw(StopIteration())  # gunicorn closes the connection on it, quietly


class Stock(ggevent.GeventWorker):
    """gunicorn's own, whose heartbeat does not end the process at once when the master is gone; ours drains then."""

    def notify(self) -> None:
        """The heartbeat alone."""
        StockWorker.notify(self)


class GeventWorker(Drained, Stock):
    """The `worker_class` of `gracehooks.GeventWorker`: greenlets, keep-alive, and a drain in phases."""

    takes_over = False
    loop_kind = "gevent"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: The connections of this worker, by the greenlets that serve them.
        self.connections: dict[Any, Connection] = {}
        #: Requests that had begun to arrive, and had not arrived when the drain's time was over.
        self.given_up = 0
        self._servers: list[Any] = []
        self._boots: Any = None
        self._awake: Any = None
        self._alarm: Any = None

    def load_wsgi(self) -> None:
        """Load the application, in a greenlet that waits where the application does."""
        self._boots = gevent.getcurrent()
        super().load_wsgi()

    def stands(self) -> str:
        """Where the boot stands: its greenlet, or the thread when that one runs."""
        return report.in_short(threading.main_thread().ident or 0, [self._boots])

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
        announce(self.drain)
        arguments = {}
        if self.cfg.is_ssl:
            context = arguments["ssl_context"] = ssl_context(self.cfg)
            if context.sslsocket_class is gevent_ssl.SSLSocket:
                context.sslsocket_class = TLSSocket
        for listener in self.sockets:
            listener.setblocking(1)
            pool = Pool(self.worker_connections)
            server = Server(listener, handle=partial(self.handle, Named(listener)), spawn=pool, **arguments)
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

    def wake(self) -> None:
        """Wake the main greenlet; from any thread and from signal handlers."""
        if self._alarm is not None:
            self._alarm.send()

    # -- connections -------------------------------------------------------------------------------------------------
    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """One connection, from accepted to closed."""
        greenlet = gevent.getcurrent()
        conn = self.connections[greenlet] = Connection(client)
        try:
            if not self.cfg.keepalive:
                Reading(self, conn).__enter__()  # gunicorn sets no bound then; a worker that leaves does
            super().handle(listener, client, addr)
        finally:
            if conn.reading is not None:
                conn.reading.__exit__()
            self._answered()
            del self.connections[greenlet]

    def timeout_ctx(self) -> Any:
        """What gunicorn puts round the reading of each request's head."""
        return Reading(self, self.connections[gevent.getcurrent()])

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        """One request, from parsed to answered."""
        greenlet = gevent.getcurrent()
        conn = self.connections[greenlet]
        if conn.reading is not None:
            conn.reading.__exit__()
        conn.busy = True
        slot = self.drain.begin(req.method, req.path, greenlet)
        try:
            keep = super().handle_request(listener_name, req, sock, addr)
        except StopIteration:
            self.drain.end(slot)
            if unread_body(req) or unread(sock):
                close_in_steps(sock, CLOSING)
            raise
        except BaseException:
            self.drain.fail(slot, greenlet)
            raise
        else:
            self.drain.end(slot)
            return keep
        finally:
            conn.busy, conn.used = greenlet in self.drain.failed, True
            # What was read beyond this request belongs to the next one.
            conn.sock.fed = bool(req.unreader.buf.getvalue())
            if self.nr >= self._recycle_at:
                self.ask_for_replacement()

    def handle_http2_request(self, listener_name: Any, req: Any, sock: Any, addr: Any, h2_conn: Any) -> Any:
        """One stream of an HTTP/2 connection, from parsed to answered."""
        greenlet = gevent.getcurrent()
        conn = self.connections[greenlet]
        conn.busy = True
        slot = self.drain.begin(req.method, req.path, greenlet)
        try:
            super().handle_http2_request(listener_name, req, sock, addr, h2_conn)
        except BaseException:
            self.drain.fail(slot, greenlet)
            raise
        else:
            self.drain.end(slot)
        finally:
            conn.busy, conn.used = greenlet in self.drain.failed, True
            if self.nr >= self._recycle_at:
                self.ask_for_replacement()

    def handle_http2(self, *args: Any, **kwargs: Any) -> Any:
        """An HTTP/2 connection: it waits in a read of its own."""
        end_well(self.has_left, self._answered)
        self.connections[gevent.getcurrent()].http2 = True
        return super().handle_http2(*args, **kwargs)

    def _answered(self) -> None:
        """This greenlet has nothing more to answer, nor an application's mistake."""
        greenlet = gevent.getcurrent()
        self.drain.end_failed(greenlet)
        self.connections[greenlet].busy = False

    def unread(self) -> int:
        """Connections that have begun to send a request that has not been read to its end."""
        begun = (each for each in list(self.connections.values()) if not (each.busy or each.http2) and each.has_begun())
        return self.given_up + sum(1 for _ in begun)

    # -- signals -----------------------------------------------------------------------------------------------------
    def take_hammer(self, reason: str, hook: Any) -> None:
        """The handler runs in whichever greenlet is at work and may not wait; one of its own does the rest."""
        self._brace(reason, hook)
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
            if conn.reading is not None:
                conn.reading.linger(started)
            elif conn.http2 and not conn.busy:
                _goaway(conn)
        until = started + drain.linger(used=False)
        while not deadline.passed:
            self.notify()
            if waiting:
                self._accept_waiting(waiting)
            if not waiting:
                self.close_listeners(self._servers)
                busy = [server for server in self._servers if len(server.pool)]
                if not busy:
                    break
                if time.monotonic() >= until:
                    self._end_handshakes(busy)
                busy[0].pool.join(timeout=min(PAUSE, deadline.left()))
            else:
                self._turn(0.005)
        self.close_listeners(self._servers)

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
        """A connection that has not come to a request when the linger is over (in its TLS handshake, say) never will."""
        for server in servers:
            for greenlet in list(server.pool):
                conn = self.connections.get(greenlet)
                if conn is None or not (conn.busy or conn.used or conn.http2 or conn.reading or conn.has_begun()):
                    greenlet.kill(block=False)


def _goaway(conn: Connection) -> None:
    """Let an idle HTTP/2 connection find that its time is over: gunicorn answers that with GOAWAY."""
    try:
        gevent_socket.cancel_wait(conn.sock._read_event, TimeoutError("the worker leaves"))
    except AttributeError:
        pass  # it ends at its own time-out
