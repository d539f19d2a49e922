"""What `gracehooks.Worker` relies on in gunicorn's gthread worker."""

from __future__ import annotations

import inspect
import os
import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future

import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers import gthread
from gunicorn.workers.sync import SyncWorker

from gracehooks.gunicorn.workers import thread as ours
from gracehooks.gunicorn.workers.attached import attached
from gracehooks.gunicorn.workers.patience import Patient, needs_patience

ThreadWorker = gthread.ThreadWorker
GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"


def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


class Pool:
    """Runs at once, in the caller's thread."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def worker():
    made = ThreadWorker(1, os.getppid(), [], None, 30, Config(), Logger(Config()))
    made.wsgi, made.tpool, made.poller, made.alive = app, Pool(), selectors.DefaultSelector(), True
    if ours.QUEUED:
        made.method_queue.init()
    else:
        made._lock = __import__("threading").RLock()
    yield made
    made.poller.close()
    made.tmp.close()


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    for each in ends:
        each.close()


def connection(worker, end):
    return gthread.TConn(worker.cfg, end, ("127.0.0.1", 1), ("127.0.0.1", 2))


def test_a_connection_has_what_ours_keeps_on_it(worker, pair):
    conn = connection(worker, pair[0])
    assert (conn.sock, conn.parser, conn.timeout, conn.initialized) == (pair[0], None, None, False)
    assert conn.sock.getblocking() is False
    conn.init()
    assert conn.parser.unreader.buf.getvalue() == b""
    assert conn.sock.getblocking() is True
    conn.close()
    assert conn.sock.fileno() == -1


def test_a_kept_connection_times_out_by_the_clock_that_we_take(worker, pair):
    conn = connection(worker, pair[0])
    conn.set_timeout()
    assert abs(conn.timeout - worker.cfg.keepalive - ours.clock()) < 5.0
    assert ours.QUEUED is (abs(conn.timeout - time.monotonic()) < 1000)


def test_handle_serves_one_request_and_says_whether_the_connection_stays(worker, pair):
    ends = pair
    conn = connection(worker, ends[0])
    if hasattr(conn, "data_ready"):
        conn.data_ready = True  # or it would wait for data in a thread
    conn.init()
    ends[1].sendall(GET)
    result = worker.handle(conn)
    assert (result[0] if isinstance(result, tuple) else result) is True
    assert ends[1].recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")


def test_what_is_enqueued_is_handled_and_then_finished(worker, pair, monkeypatch):
    finished = []
    monkeypatch.setattr(worker, "handle", lambda conn: "handled")
    monkeypatch.setattr(worker, "finish_request", lambda *args: finished.append(args))
    conn = connection(worker, pair[0])
    worker.enqueue_req(conn)
    if ours.QUEUED:
        worker.method_queue.run_callbacks(None)
    ((*before, future),) = finished
    assert before == ([conn] if ours.QUEUED else [])
    assert future.result() == "handled"
    assert ours.QUEUED or future.conn is conn


def test_the_worker_keeps_its_connections_where_ours_looks(worker):
    assert isinstance(worker.keepalived_conns if ours.QUEUED else worker._keep, deque)
    assert worker.nr_conns == 0
    assert {"accept", "murder_keepalived", "on_client_socket_readable", "get_thread_pool", "handle_request"} <= set(
        vars(ThreadWorker)
    )
    assert hasattr(gthread, "DEFAULT_WORKER_DATA_TIMEOUT") is hasattr(ThreadWorker, "murder_pending")


def test_the_loop_beats_at_each_turn_and_gives_each_event_to_its_callback():
    source = inspect.getsource(ThreadWorker.run)
    assert source.index("while self.alive:") < source.index("self.notify()")
    turn = getattr(ThreadWorker, "wait_for_and_dispatch_events", ThreadWorker.run)
    assert "callback = key.data" in inspect.getsource(turn)
    assert "callback(key.fileobj)" in inspect.getsource(turn)
    # `accept` is called with the listener last: with its name before it in gunicorn 23.
    assert list(inspect.signature(ThreadWorker.accept).parameters)[-1] == "listener"


def test_gunicorn_23_closes_its_poller_as_soon_as_it_is_told_and_goes_on_with_patience():
    assert needs_patience(ThreadWorker) is not ours.QUEUED
    assert not needs_patience(SyncWorker)
    assert (Patient in attached(ThreadWorker).__mro__) is not ours.QUEUED
    if not ours.QUEUED:
        source = inspect.getsource(ThreadWorker.run)
        assert "while self.alive:" in source
        assert source.index("self.murder_keepalived()") < source.index("self.poller.close()")
        assert "if keepalive and self.alive:" in inspect.getsource(ThreadWorker.finish_request)
        assert "if not self.alive or not self.cfg.keepalive:" in inspect.getsource(ThreadWorker.handle_request)


def test_a_connection_whose_answer_did_not_announce_its_close_is_kept_when_the_worker_is_told_meanwhile(pair):
    if ours.QUEUED:
        source = inspect.getsource(ThreadWorker.finish_request)
        assert "elif result:" in source
        assert source.index("elif result:") < source.index("keepalived_conns.append(conn)")
        return
    made = attached(ThreadWorker)(1, os.getppid(), [], None, 30, Config(), Logger(Config()))
    made.wsgi, made.tpool, made.poller, made._lock = app, Pool(), selectors.DefaultSelector(), threading.RLock()
    try:
        server, client = pair
        client.settimeout(10)
        conn = gthread.TConn(made.cfg, server, ("", 1), ("", 2))
        made.nr_conns = 1
        conn.init()
        for last in (False, True):
            client.sendall(GET)
            future = Future()
            future.conn = conn
            future.set_result(made.handle(conn))
            assert (b"Connection: close" in client.recv(1000)) is last
            made.alive = False
            made.finish_request(future)
            assert (conn in made._keep) is not last
            if not last:
                made.poller.unregister(server)
                made._keep.clear()
                server.setblocking(True)
        assert client.recv(1000) == b""
        assert made.nr_conns == 0
    finally:
        made.poller.close()
        made.tmp.close()


def test_the_pool_is_not_waited_for_and_requests_are_counted():
    assert "max_workers=self.cfg.threads" in inspect.getsource(ThreadWorker.get_thread_pool)
    assert "self.nr += 1" in inspect.getsource(ThreadWorker.handle_request)
    assert "self.max_requests" in inspect.getsource(ThreadWorker.handle_request)
