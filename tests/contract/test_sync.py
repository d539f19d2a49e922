"""What `gracehooks.SyncWorker` relies on in gunicorn's sync worker."""

from __future__ import annotations

import inspect
import os
import socket

import pytest
from gunicorn import util
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers.sync import SyncWorker

from gracehooks.gunicorn.workers import sync as ours


def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


class Listener:
    """What a connection needs of its listener."""

    def getsockname(self):
        return ("127.0.0.1", 2)


@pytest.fixture
def worker():
    made = SyncWorker(1, os.getppid(), [], None, 30, Config(), Logger(Config()))
    made.wsgi = app
    yield made
    made.tmp.close()


def test_handle_serves_one_connection_to_its_end(worker):
    server, client = socket.socketpair()
    with client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        worker.handle(Listener(), server, ("127.0.0.1", 1))
        answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Connection: close\r\n" in answer
    assert server.fileno() == -1
    assert worker.nr == 1


def test_a_connection_that_was_detached_is_closed_by_nobody(worker, monkeypatch):
    taken = []

    def handle_request(self, listener, req, client, addr):
        taken.append(client.detach())

    monkeypatch.setattr(SyncWorker, "handle_request", handle_request)
    server, client = socket.socketpair()
    with client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        worker.handle(Listener(), server, ("127.0.0.1", 1))
        os.write(taken[0], b"still open")
        assert client.recv(100) == b"still open"
    os.close(taken[0])


def test_the_loop_accepts_beats_and_waits_by_methods_of_its_own():
    one, many = (inspect.getsource(getattr(SyncWorker, name)) for name in ("run_for_one", "run_for_multiple"))
    for each in (one, many):
        assert "while self.alive:\n            self.notify()" in each
        assert "self.accept(listener)" in each
        assert "self.wait(timeout)" in each
    assert "self.handle(listener, client, addr)" in inspect.getsource(SyncWorker.accept)
    assert list(inspect.signature(SyncWorker.handle_request).parameters) == [
        "self",
        "listener",
        "req",
        "client",
        "addr",
    ]


def test_whether_a_connection_is_closed_in_two_steps_is_told_by_a_name():
    stock = inspect.getsource(SyncWorker.handle)
    assert ours.CLOSES_AT_ONCE is ("close_graceful" not in stock)
    assert hasattr(util, "close_graceful") is not ours.CLOSES_AT_ONCE
