"""TLS and HTTP/2: what is on its way is answered, who is silent or in its handshake leaves in time, streams end.

TEST_FULL=1 puts every class under load; by default three, one for each way in which a server does TLS.
"""

from __future__ import annotations

import json
import os
import socket
import ssl

import gunicorn
import pytest

from gracehooks.demo.clients import TLS
from tests.kit import Server, eventually, load, serve, within
from tests.kit.classes import CLASSES, LOOPS

pytest.importorskip("h2")
import h2.config
import h2.connection
import h2.events

#: Those that speak HTTP/2, on the gunicorns that do.
SPEAKING = ["gracehooks.Worker", "gracehooks.GeventWorker", *LOOPS[1:]] * (gunicorn.version_info >= (25, 2))
NOTHING = {"requests": [], "jobs": []}


LOADED = CLASSES if os.environ.get("TEST_FULL") == "1" else ["gracehooks.Worker", "gracehooks.GeventWorker", LOOPS[0]]


@pytest.mark.parametrize("worker", LOADED)
def test_nothing_is_lost_over_tls(worker: str) -> None:
    kinds = ("keepalive", "new", "upload") if "Sync" not in worker else ("new",)
    with serve(worker=worker, tls=True) as server:
        with load(server, kinds=kinds, clients=4, think=0.005) as traffic:
            traffic.wait(60)
            assert server.upgrade()["event"] == "UpgradeCompleted"
            server.wait_for("GenerationRetired")
            traffic.wait(60)
            assert not traffic.lost, traffic.table()
            assert server.stop() == 0
        # Who comes after the end is refused: there is no server any more.
        assert {each["outcome"] for each in traffic.lost} <= {"refused"}, traffic.table()
        assert [each["lost"] for each in server.events() if each["event"] == "Stopped"] == [NOTHING]
        assert server.history()[-1]["outcome"] == "completed"


@pytest.mark.parametrize("worker", CLASSES)
def test_silent_connections_and_handshakes_leave_within_the_linger(worker: str) -> None:
    with serve(worker=worker, config="keepalive = 60\n", workers=1, tls=True) as server:
        plain = socket.create_connection((server.address.host, server.address.port))
        begun = socket.create_connection((server.address.host, server.address.port))
        begun.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        number = (
            1 if "Sync" in worker else 3
        )  # each silent one takes a second of a worker that can do one thing at a time
        silent = [server.address.connect() for _ in range(2 * number)]
        assert server.get("/").status == 200
        with within(2.0 + 1.0, slack=1.5):  # the linger, and what the closing takes
            server.signal("TERM")
            server.wait_for("AcceptingEnded")
            for one in silent[:number]:
                one.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            for one in silent[:number]:
                answer = b""
                while data := one.recv(1000):
                    answer += data
                assert answer.startswith(b"HTTP/1.1 200 "), answer
            for one in (plain, begun, *silent[number:]):
                try:
                    assert one.recv(1000) == b""
                except OSError:
                    pass  # cut short in its handshake
            server.wait_gone(server.process.pid)
        assert server.wait_for("Stopped")["lost"] == NOTHING


class HTTP2:
    """An HTTP/2 connection: asks, and reads to its end."""

    def __init__(self, server: Server) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = TLS.check_hostname, TLS.verify_mode
        context.set_alpn_protocols(["h2"])
        self.socket = context.wrap_socket(socket.create_connection((server.address.host, server.address.port), 60))
        assert self.socket.selected_alpn_protocol() == "h2"
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.socket.sendall(self.h2.data_to_send())
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        #: The last stream that each GOAWAY named.
        self.goodbyes: list[int] = []

    def ask(self, path: str) -> int:
        """A request on a stream of its own; its number."""
        stream = self.h2.get_next_available_stream_id()
        head = [(":method", "GET"), (":path", path), (":scheme", "https"), (":authority", "test")]
        self.h2.send_headers(stream, head, end_stream=True)
        self.socket.sendall(self.h2.data_to_send())
        self.bodies[stream] = b""
        return stream

    def read(self) -> bool:
        """Read once; False at the end of the connection."""
        data = self.socket.recv(65536)
        frame, left = data, data
        while len(left) >= 9:  # h2 takes no frame after a GOAWAY, which may be the first of two: these are taken out
            size = 9 + int.from_bytes(left[:3], "big")
            frame, left = left[:size], left[size:]
            if frame[3] == 7:
                self.goodbyes.append(int.from_bytes(frame[9:13], "big"))
                continue
            for event in self.h2.receive_data(frame):
                if isinstance(event, h2.events.DataReceived):
                    self.bodies[event.stream_id] += event.data
                    self.h2.acknowledge_received_data(len(event.data), event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    self.ended.add(event.stream_id)
        assert not left, "a frame came in two parts"
        if data:
            self.socket.sendall(self.h2.data_to_send())
        return bool(data)

    def until(self, streams: int) -> None:
        """Read until so many streams have ended."""
        while len(self.ended) < streams:
            assert self.read(), "the connection ended"

    def rest(self) -> None:
        """Read to the end of the connection."""
        while self.read():
            pass


@pytest.mark.parametrize("worker", SPEAKING)
def test_http2_streams_end_and_are_told_goodbye(worker: str) -> None:
    with serve(worker=worker, config="http_protocols = 'h2,h1'\nkeepalive = 60\n", workers=1, tls=True) as server:
        idle, fresh, busy = HTTP2(server), HTTP2(server), HTTP2(server)
        asked = idle.ask("/")
        idle.until(1)
        assert idle.bodies[asked] == b"ok"
        # Before 27 gunicorn's asgi worker never ends a stream whose last part is empty.
        ends = gunicorn.version_info >= (27, 0) or "ASGI" not in worker
        # It also serves one stream after the other: the second waits unread for longer than the first GOAWAY stands alone.
        stream = busy.ask("/stream?n=10&s=0.1" if ends else "/sleep?s=4")
        while ends and b"part 1" not in busy.bodies[stream]:
            assert busy.read()
        if not ends:
            eventually(lambda: '"/sleep"' in json.dumps(server.status()["workers"]), what="a stream in flight")
        slow = busy.ask("/sleep?s=0.5")
        with within(1.5 + 2.0 if ends else 4.5 + 2.0, slack=1.5):
            server.signal("TERM")
            server.wait_for("AcceptingEnded")
            for each in (busy, idle, fresh):
                each.rest()
            server.wait_gone(server.process.pid)
        assert busy.ended == {stream, slow}
        assert busy.bodies[stream].count(b"part ") == 10 or not ends
        assert busy.bodies[slow] == b"ok"
        for each in (busy, idle, fresh):
            assert each.goodbyes, each.bodies
            # A client may ask a stream again that is above the one that is named: none of those may be served.
            assert min(each.goodbyes) >= max(each.ended, default=0)
        stopped = server.wait_for("Stopped")
        assert stopped["lost"] == NOTHING
        assert stopped["answered"] >= 3
