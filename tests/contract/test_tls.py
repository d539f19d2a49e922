"""What gracehooks relies on in gunicorn's TLS: where a connection is wrapped, and that its handshake is not done there."""

from __future__ import annotations

import inspect
import ssl
import types

import pytest
from gunicorn import sock
from gunicorn.config import Config
from gunicorn.workers import gthread, sync

from gracehooks.gunicorn.workers import sockets


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setattr(sock, "ssl_wrap_socket", sock.ssl_wrap_socket)


@pytest.mark.parametrize("place", [gthread.TConn.init, sync.SyncWorker.handle])
def test_a_connection_is_wrapped_by_what_the_module_has_under_that_name(place):
    assert "sock.ssl_wrap_socket(" in inspect.getsource(place)
    assert isinstance(sock, types.ModuleType)
    assert gthread.sock is sync.sock is sock


def test_the_handshake_is_done_at_the_first_read_unless_it_is_asked_for():
    assert Config().do_handshake_on_connect is False
    assert "do_handshake_on_connect=conf.do_handshake_on_connect" in inspect.getsource(sock.ssl_wrap_socket)


def test_what_speaks_tls_already_is_not_wrapped_again():
    wrapped = []
    sock.ssl_wrap_socket = lambda client, conf: wrapped.append(client)
    sockets.wrap_once()
    sockets.wrap_once()
    client = ssl.SSLSocket.__new__(ssl.SSLSocket)
    assert sock.ssl_wrap_socket(client, None) is client
    assert not wrapped
    sock.ssl_wrap_socket("plain", None)
    assert wrapped == ["plain"]
