"""`gracehooks.Worker`: gunicorn's gthread worker that leaves without losing.

While it serves, gunicorn's loop runs. Three things are ours all the time, since a drain must find them in order:
- a new connection waits for its first byte in the poller and takes no thread (gunicorn 23 does that too, later ones let
  it wait in a thread), so silent clients cannot keep a request from being answered;
- a connection whose answer said keep-alive is kept, whatever has happened since;
- a connection is closed in two steps: our side first, then, when the client has closed or some time has passed, the rest;
  bytes that were still on their way would otherwise make the kernel take back the answer (RFC 9112 section 9.6).

It relies on `TConn`, `enqueue_req`, `handle`, `finish_request`, `keepalived_conns` or `_keep`, `poller`, `tpool`,
`nr_conns`, `murder_keepalived` of gunicorn's `ThreadWorker` (tests/contract/test_gthread.py).
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import takewhile
from typing import Any

from gunicorn import sock as stock_sock
from gunicorn.workers import gthread

from gracehooks.gunicorn.workers.drained import Drained, announce
from gracehooks.gunicorn.workers.http2 import end_well, wait_in_the_open
from gracehooks.gunicorn.workers.sockets import (
    AGAIN,
    EMPTY,
    NO_ROOM,
    ended,
    readable,
    shake,
    unread,
    unread_body,
    wrap_once,
)

__all__ = ["Worker"]

#: gunicorn 24 and later finish requests in the main thread, through a queue; 23 does it in the pool's threads.
QUEUED = hasattr(gthread, "PollableMethodQueue")
#: How long a new connection may wait for its first byte while the worker serves; gunicorn 23 sets no bound.
UNGUARDED: AbstractContextManager[Any] = nullcontext()
FIRST_BYTE = getattr(gthread, "DEFAULT_WORKER_DATA_TIMEOUT", float("inf"))
#: How long a connection whose answer has been sent waits for the client to close, in seconds.
CLOSING = 2.0
#: How many requests wait for a thread, at most, for each thread, while the backlog is being accepted: the other workers
#: of a stop accept from the same one.
AHEAD = 4
#: What `handle` gives for a connection that has not sent anything yet.
SILENT = object()
#: The longest pause of the loop while it drains, in seconds; a heartbeat at least as often.
PAUSE = 0.25


class Pool(ThreadPoolExecutor):
    """The threads that serve requests: what is submitted to them is no job, and nobody need look whether it is one."""

    submit = ThreadPoolExecutor.submit


class Worker(Drained, gthread.ThreadWorker):
    """The `worker_class` of `gracehooks.Worker`: threads, keep-alive, and a drain in phases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Connections that a thread has, or that wait for one.
        self._busy: set[Any] = set()
        #: New connections that have sent nothing yet, oldest first; the same name and use as gunicorn's.
        self.pending_conns: deque[Any] = deque()
        #: Connections that we have closed and the client has not, with the time when we stop waiting.
        self._closing: dict[Any, float] = {}
        #: A pipe that becomes readable when the drain begins; idle HTTP/2 connections wait on it too.
        self._left: tuple[int, int] = (-1, -1)

    # -- serving -----------------------------------------------------------------------------------------------------
    def init_process(self) -> None:
        """Boot; the pipe is made in the worker's own process."""
        self._left = os.pipe()
        super().init_process()

    def get_thread_pool(self) -> ThreadPoolExecutor:
        """The pool of requests."""
        return Pool(max_workers=self.cfg.threads)

    @property
    def _guard(self) -> AbstractContextManager[Any]:
        # gunicorn 23 touches its poller and its connections from the pool's threads, under this lock.
        guard: AbstractContextManager[Any] = UNGUARDED if QUEUED else self._lock
        return guard

    def run(self) -> None:
        """gunicorn's loop, woken by signals at once instead of within a second."""
        announce(self.drain)
        wrap_once()
        self.poller.register(self.PIPE[0], selectors.EVENT_READ, self._woken)
        super().run()

    def _woken(self, _: Any) -> None:
        try:
            while os.read(self.PIPE[0], 1024):
                pass
        except OSError:
            pass

    def notify(self) -> None:
        """The heartbeat; at each turn, close what has waited long enough for its client to close."""
        if self._closing:
            self._sweep_closing(time.monotonic())
        super().notify()

    def accept(self, *args: Any) -> None:
        """Accept one connection of the listener (the last argument); it waits in the poller until it has sent something."""
        self._accept(args[-1])

    def _accept(self, listener: Any) -> bool:
        """Accept one; False when there is none."""
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno not in (*EMPTY, *AGAIN):
                raise
            return error.errno in AGAIN
        self.nr_conns += 1
        conn = gthread.TConn(self.cfg, client, address, listener.getsockname())
        conn.data_ready = True
        if readable(client):
            self.enqueue_req(conn)
            return True
        self._await_first_byte(conn)
        return True

    def _await_first_byte(self, conn: Any) -> None:
        wait = FIRST_BYTE + self.cfg.keepalive if self.alive else self.drain.linger(used=False)
        if conn.timeout is None:  # else its handshake came in pieces, and the time is that of the first one
            conn.timeout = time.monotonic() + wait
        conn.sock.setblocking(False)
        with self._guard:
            self.pending_conns.append(conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def on_pending_socket_readable(self, conn: Any, client: Any) -> None:
        """A new connection has sent something: give it to a thread."""
        with self._guard:
            self.poller.unregister(client)
            self.pending_conns.remove(conn)
        self.enqueue_req(conn)

    def enqueue_req(self, conn: Any) -> None:
        """Give the connection to the pool."""
        self._busy.add(conn)
        try:
            super().enqueue_req(conn)
        except OSError:  # gunicorn 23 begins TLS here; the client may be gone
            self._drop(conn)

    def handle(self, conn: Any) -> Any:
        """Serve the connection; over TLS only when it has sent more than its handshake, else no thread waits for it."""
        if self.cfg.is_ssl and not hasattr(conn, "shaken") and not self._shake(conn):
            return SILENT
        try:
            return super().handle(conn)
        finally:
            self._answered()

    def _shake(self, conn: Any) -> bool:
        """Go on with the handshake, as far as what has arrived takes it; whether the connection has sent more than that."""
        try:
            if not self.cfg.do_handshake_on_connect:
                conn.sock = stock_sock.ssl_wrap_socket(conn.sock, self.cfg)
                if not shake(conn.sock):
                    return False
            conn.init()
            if getattr(conn, "is_http2", False) or readable(conn.sock):
                conn.shaken = True
                return True
        except OSError:
            conn.shaken = True
            return True  # gunicorn's own code meets it again, and knows what to say
        conn.shaken = True
        conn.timeout = None
        return False

    def finish_request(self, *args: Any) -> None:
        """A thread is done with a connection: keep it for the next request, or close it.

        gunicorn 23 calls it in the pool's thread with the future, later ones in the main thread with both.
        """
        future = args[-1]
        conn = args[0] if len(args) > 1 else future.conn
        keep = False
        try:
            if not future.cancelled():
                result = future.result()
                keep = bool(result[0] if isinstance(result, tuple) else result)
                if result is SILENT:
                    self._await_first_byte(conn)
                    self._busy.discard(conn)
                    return
            if not keep:
                self._close(conn)
            elif pipelined(conn.parser):
                self.enqueue_req(conn)
                return
            else:
                self._keep_alive(conn)
        except Exception:  # noqa: BLE001 - the connection is what broke, and it goes
            self._drop(conn)
        self._busy.discard(conn)
        if not self.alive:
            self.wake()

    @property
    def _kept(self) -> deque[Any]:
        kept: deque[Any] = self.keepalived_conns if QUEUED else self._keep
        return kept

    def _keep_alive(self, conn: Any) -> None:
        conn.sock.setblocking(False)
        conn.set_timeout()
        if not self.alive:
            conn.timeout = min(conn.timeout, clock() + self.drain.linger(used=True))
        with self._guard:
            self._kept.append(conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_client_socket_readable, conn))

    def _drop(self, conn: Any) -> None:
        self._busy.discard(conn)
        self.nr_conns -= 1
        conn.close()

    def _close(self, conn: Any) -> None:
        """Close our side of it now, and the rest when the client has closed its own, or after CLOSING seconds.

        gunicorn 23 closes at once; there it is done in two steps only where bytes are on their way that nobody wants.
        """
        self.nr_conns -= 1
        sock = conn.sock
        if not QUEUED and not unread_body(getattr(conn.parser, "mesg", None)) and not unread(sock):
            conn.close()
            return
        try:
            sock.shutdown(socket.SHUT_WR)
            sock.setblocking(False)
            if not ended(sock):
                with self._guard:
                    self._closing[sock] = time.monotonic() + CLOSING
                    self.poller.register(sock, selectors.EVENT_READ, self._on_closing)
                return
        except (OSError, ValueError, KeyError):
            pass
        conn.close()

    def _on_closing(self, sock: Any) -> None:
        if ended(sock):
            self._forget(sock)

    def _forget(self, sock: Any) -> None:
        with self._guard:
            self._closing.pop(sock, None)
            try:
                self.poller.unregister(sock)
            except (KeyError, OSError, ValueError):
                pass
        sock.close()

    def _sweep_closing(self, now: float) -> None:
        for sock, until in list(self._closing.items()):
            if until <= now:
                self._forget(sock)

    def murder_keepalived(self, force: bool = False) -> None:
        """Close the kept connections whose time is over, unless their next request has just come."""
        del force
        self._expire(self._kept, clock())

    def murder_pending(self) -> None:
        """The same for those that have sent nothing yet."""
        self._expire(self.pending_conns, time.monotonic())

    def _expire(self, conns: deque[Any], now: float) -> None:
        with self._guard:
            for conn in list(takewhile(lambda each: each.timeout <= now, conns)):
                if readable(conn.sock):
                    continue  # its turn comes with the next events
                conns.remove(conn)
                try:
                    self.poller.unregister(conn.sock)
                except (OSError, KeyError, ValueError):
                    pass
                self.nr_conns -= 1
                conn.close()

    # -- requests ------------------------------------------------------------------------------------------------------
    def handle_request(self, req: Any, conn: Any) -> Any:
        """One request, from parsed to answered."""
        slot = self.drain.begin(req.method, req.path, threading.get_ident())
        try:
            keep = super().handle_request(req, conn)
        except BaseException:
            self.drain.fail(slot, threading.get_ident())
            raise
        else:
            self.drain.end(slot)
            return keep
        finally:
            if self.nr >= self._recycle_at:
                self.ask_for_replacement()

    def handle_http2_request(self, req: Any, conn: Any, h2_conn: Any) -> Any:
        """One stream of an HTTP/2 connection, from parsed to answered."""
        slot = self.drain.begin(req.method, req.path, threading.get_ident())
        try:
            super().handle_http2_request(req, conn, h2_conn)
        except BaseException:
            self.drain.fail(slot, threading.get_ident())
            raise
        else:
            self.drain.end(slot)
        finally:
            if self.nr >= self._recycle_at:
                self.ask_for_replacement()

    def _answered(self) -> None:
        """This thread has nothing more to answer, nor an application's mistake."""
        if self.drain.failed:
            self.drain.end_failed(threading.get_ident())

    def handle_http2(self, conn: Any) -> Any:
        """An HTTP/2 connection: one that is idle when the drain begins gets its GOAWAY then, not at its time-out."""
        end_well(self.has_left, self._answered)
        wait_in_the_open(conn.parser, self._left[0])
        return super().handle_http2(conn)

    def unread(self) -> int:
        """Connections that wait for a thread, or whose request has not arrived to its end."""
        return max(0, len(self._busy) - self.drain.in_flight)

    # -- leaving -------------------------------------------------------------------------------------------------------
    def drain_requests(self) -> None:
        """Accept what is ours, answer what comes on every connection that is left, close those that linger for nothing."""
        drain, deadline = self.drain, self.drain.deadline
        os.write(self._left[1], b"!")
        waiting = self._stop_listening()
        with self._guard:
            for conns, now, used in ((self._kept, clock(), True), (self.pending_conns, time.monotonic(), False)):
                until = now + drain.linger(used=used)
                for conn in conns:
                    conn.timeout = min(conn.timeout, until)
        while True:
            self.notify()
            if waiting:
                self._accept_waiting(waiting)
            if not waiting:
                self.close_listeners(self.sockets)
            self.murder_keepalived()
            self.murder_pending()
            if not (waiting or self._busy or self._kept or self.pending_conns or self._closing):
                break
            if deadline.passed:
                break
            self._turn(min(PAUSE, deadline.left()))
        self.close_listeners(self.sockets)
        self.tpool.shutdown(wait=False, cancel_futures=True)

    def _turn(self, pause: float) -> None:
        soonest = [conns[0].timeout - now for conns, now in self._waits() if conns]
        for key, _ in self.poller.select(max(0.0, min([pause, *soonest]))):
            key.data(key.fileobj)

    def _waits(self) -> list[tuple[deque[Any], float]]:
        return [(self._kept, clock()), (self.pending_conns, time.monotonic())]

    def _stop_listening(self) -> list[Any]:
        """Take the listeners out of the poller; gives those whose backlog is ours to serve."""
        for listener in self.sockets:
            try:
                self.poller.unregister(listener)
            except (KeyError, ValueError, OSError):
                pass  # gunicorn takes them out itself while it has all the connections it may have
        # With SO_REUSEPORT each process has a backlog of its own, which dies with its socket.
        return list(self.sockets) if self.drain.final or self.cfg.reuse_port else []

    def _accept_waiting(self, waiting: list[Any]) -> None:
        """Accept until a listener has nothing more, and then leave it; not far ahead of what the threads can take."""
        if self.drain.orphan and self.drain.deadline.left() < self.settings.drain_timeout / 4:
            waiting.clear()  # nobody keeps new connections out: this would never end
        for listener in list(waiting):
            while len(self._busy) < AHEAD * self.cfg.threads:
                try:
                    if not self._accept(listener):
                        waiting.remove(listener)
                        break
                except OSError as error:
                    if error.errno not in NO_ROOM:
                        waiting.remove(listener)
                    break


def clock() -> float:
    """The clock of a kept connection's timeout."""
    return time.monotonic() if QUEUED else time.time()


def pipelined(parser: Any) -> bool:
    """Whether the next request was read together with the last one: nothing more will make the socket readable.

    gunicorn 23 leaves a body that the application did not read where it is; what is buffered then is a part of that.
    """
    if not parser.unreader.buf.getvalue():
        return False
    return QUEUED or getattr(getattr(parser.mesg.body, "reader", None), "length", 1) == 0
