"""What gracehooks relies on in gunicorn's HTTP/2 connection, and that it is mended: a real client's frames, no process."""

from __future__ import annotations

import inspect
import socket
import ssl

import pytest

pytest.importorskip("gunicorn.http2.connection", reason="this gunicorn speaks no HTTP/2")
pytest.importorskip("h2")
import h2.connection
import h2.events
from gunicorn.config import Config
from gunicorn.http2.connection import HTTP2ServerConnection
from gunicorn.workers import base_async, gthread

from gracehooks.gunicorn.workers import http2 as ours

HEAD = [(":method", "GET"), (":path", "/"), (":scheme", "https"), (":authority", "x")]


class Client:
    """The other end of a connection of gunicorn's; `leaving` is what the worker of it says."""

    def __init__(self, monkeypatch):
        self.leaving = False
        self.over = 0
        for name in ("receive_data", "close", "cleanup_stream"):
            monkeypatch.setattr(HTTP2ServerConnection, name, getattr(HTTP2ServerConnection, name))
        ours.end_well(lambda: self.leaving, self.one_is_over)
        server, self.socket = socket.socketpair()
        self.socket.settimeout(5)
        self.h2 = h2.connection.H2Connection()
        self.h2.initiate_connection()
        self.connection = HTTP2ServerConnection(Config(), server, ("127.0.0.1", 1))
        self.connection.initiate_connection()
        self.send()
        assert list(self.connection.receive_data()) == []
        self.read()

    def one_is_over(self):
        self.over += 1

    def send(self):
        self.socket.sendall(self.h2.data_to_send())

    def ask(self):
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, HEAD, end_stream=True)
        self.send()
        return stream

    def read(self):
        events = self.h2.receive_data(self.socket.recv(65536))
        self.send()
        return events

    def serve(self, requests):
        """Answer as a worker does; the streams in their order."""
        served = []
        for request in requests:
            served.append(request.stream.stream_id)
            self.connection.send_response(request.stream.stream_id, 200, [("content-length", "0")], b"")
            self.connection.cleanup_stream(request.stream.stream_id)
            if len(served) == 1 and self.late:
                self.ask()
        return served

    late = False

    def goodbye(self):
        """The last stream that a GOAWAY names."""
        for _ in range(10):
            for event in self.read():
                if isinstance(event, h2.events.ConnectionTerminated):
                    return event.last_stream_id
        raise AssertionError("no GOAWAY")


@pytest.fixture
def client(monkeypatch):
    made = Client(monkeypatch)
    yield made
    made.socket.close()
    made.connection.sock.close()


def test_it_has_what_ours_looks_at(client):
    connection = client.connection
    assert not connection.is_closed
    assert connection.streams == {}
    assert connection.h2_conn.highest_inbound_stream_id == 0
    assert hasattr(connection, "pending_requests") is hasattr(connection, "idle_timeout")


def test_while_the_worker_serves_a_connection_is_served_as_gunicorn_does(client):
    stream = client.ask()
    assert client.serve(client.connection.receive_data()) == [stream]
    assert not client.connection.is_closed
    assert client.over == 1


def test_gunicorn_says_of_each_stream_that_it_is_over_after_the_answer_to_a_mistake():
    for module in (gthread, base_async):
        source = inspect.getsource(module)
        mistake = source.index("h2_conn.send_error(req.stream.stream_id, 500")
        assert "finally" in source[mistake : source.index("h2_conn.cleanup_stream(req.stream.stream_id)", mistake)]


def test_what_has_arrived_when_the_worker_leaves_is_served_and_then_comes_a_goodbye(client):
    first, client.leaving, client.late = client.ask(), True, True
    assert client.serve(client.connection.receive_data()) == [first, first + 2]
    assert client.connection.is_closed
    assert client.goodbye() == first + 2


def test_a_connection_that_waits_is_told_goodbye_and_that_what_it_asked_was_served(client):
    stream = client.ask()
    assert client.serve(client.connection.receive_data()) == [stream]
    client.connection.close()
    assert client.goodbye() == stream


def test_a_client_that_never_stops_asking_is_told_goodbye_all_the_same(client, monkeypatch):
    monkeypatch.setattr(ours, "MOST", 3)
    client.leaving = True
    client.ask()
    served = []
    for request in client.connection.receive_data():
        served.append(request.stream.stream_id)
        client.connection.send_response(request.stream.stream_id, 200, [("content-length", "0")], b"")
        client.connection.cleanup_stream(request.stream.stream_id)
        client.ask()
    assert len(served) == 4
    assert client.connection.is_closed


def test_the_end_of_the_client_is_met_where_gunicorn_expects_it(client):
    client.ask()
    client.leaving = True
    found = client.connection.receive_data()
    client.socket.shutdown(socket.SHUT_WR)
    assert len(client.serve(found)) == 1
    assert client.connection.is_closed


def test_what_is_queued_is_asked_for_with_nothing_and_that_is_no_end(client):
    assert list(client.connection.receive_data(b"")) == []
    assert not client.connection.is_closed


def test_a_protocol_of_tls_says_whether_it_is_http2():
    from gunicorn import sock

    assert sock.is_http2_negotiated(socket.socket()) is False
    assert ssl.HAS_ALPN
