"""What `gracehooks.GeventWorker` relies on in gunicorn's gevent worker and in gevent.

The worker patches the standard library when it runs, not when it is imported: nothing here patches this process.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("gevent")
import gevent
from gevent import socket as gevent_socket
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.workers import base_async, ggevent

GeventWorker = ggevent.GeventWorker


def served(server_class=StreamServer, **more):
    """A server that answers with what it was asked, and a client of it."""
    listener = gevent_socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(5)

    def handle(client, address):
        client.sendall(client.recv(100))

    server = server_class(listener, handle=handle, spawn=Pool(10), **more)
    return server, listener.getsockname()


def test_a_connection_is_accepted_and_handled_by_hand_once_the_server_accepts_no_more():
    server, address = served()
    server.start()
    gevent.sleep(0.01)  # the pool's first word makes it accept again
    server.stop_accepting()
    assert server.do_read() is None
    client = gevent_socket.create_connection(address)
    gevent.sleep(0.05)
    assert not len(server.pool)
    accepted = server.do_read()
    assert not server.full()
    server.do_handle(*accepted)
    client.sendall(b"hello")
    assert client.recv(100) == b"hello"
    server.close()
    client.close()


def test_a_closed_server_forgets_how_to_serve_and_ours_does_not():
    from gracehooks.gunicorn.workers.gevent import Server

    stock, _ = served()
    mine, _ = served(Server)
    for each in (stock, mine):
        each.start()
        each.close()
    assert not hasattr(stock, "handle")
    assert callable(mine.handle)
    assert "self.handle(ssl_socket, address)" in inspect.getsource(StreamServer.wrap_socket_and_handle)


def test_a_wait_for_bytes_can_be_ended_from_outside():
    one, other = gevent_socket.socketpair()
    waiting = gevent.spawn(one.recv, 1)
    gevent.sleep(0.05)
    gevent_socket.cancel_wait(one._read_event, TimeoutError("enough"))
    waiting.join(5)
    assert isinstance(waiting.exception, TimeoutError)
    one.close()
    other.close()


def test_the_worker_reads_each_head_within_its_timeout_context():
    source = inspect.getsource(base_async.AsyncWorker.handle)
    assert "with self.timeout_ctx():\n                            req = next(parser)" in source
    assert "listener_name = listener.getsockname()" in source
    # A connection is closed quietly on it.
    assert "except StopIteration as e:\n                self.log.debug" in source
    assert "req.unreader" not in source


def test_the_worker_patches_when_it_runs_and_detaches_the_listeners():
    source = inspect.getsource(GeventWorker.patch)
    assert "monkey.patch_all()" in source
    assert "fileno=s.sock." in source
    assert "self.patch()" in inspect.getsource(GeventWorker.init_process)
    run = inspect.getsource(GeventWorker.run)
    for part in ("StreamServer(s, handle=hfun, spawn=pool, **ssl_args)", "server.max_accept = 1", "ssl_context"):
        assert part in run


def test_a_request_is_handled_with_these():
    assert list(inspect.signature(GeventWorker.handle_request).parameters)[1:] == [
        "listener_name",
        "req",
        "sock",
        "addr",
    ]


def test_the_heartbeat_is_the_base_classes_without_the_exit_when_the_master_is_gone():
    from gunicorn.workers import ggevent

    from gracehooks.gunicorn.workers.gevent import GeventWorker, Stock

    stock = inspect.getsource(ggevent.GeventWorker.notify)
    assert "super().notify()" in stock
    assert "sys.exit(0)" in stock  # what the master's death would do in the middle of requests
    order = GeventWorker.__mro__
    assert order.index(Stock) + 1 == order.index(ggevent.GeventWorker)
    beats: list[str] = []
    Stock.notify(SimpleNamespace(tmp=SimpleNamespace(notify=lambda: beats.append("beat")), ppid=-1))
    assert beats == ["beat"]
