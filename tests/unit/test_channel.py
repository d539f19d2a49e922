"""The channel: whole messages in order, the end of the stream as a fact, and never a wait."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from gracehooks.upgrade.channel import LONGEST_MESSAGE, Channel


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def test_messages_arrive_whole_and_in_order(pair):
    channel, other = pair
    other.sendall(b'{"say": "hello", "ready"')
    assert channel.receive() == []
    other.sendall(b': 1}\n{"say": "ready"}\n{"sa')
    assert channel.receive() == [{"say": "hello", "ready": 1}, {"say": "ready"}]
    other.sendall(b'y": "committed"}\n')
    assert channel.receive() == [{"say": "committed"}]
    assert not channel.closed


def test_a_report_of_some_megabytes_arrives_whole():
    left, right = map(Channel, socket.socketpair())
    lost = [{"method": "GET", "path": f"/{number:0100}", "age": 1.0} for number in range(40_000)]
    left.send(say="lost", lost=lost)
    heard = []
    while not heard:
        left.flush()
        heard = right.receive()
        assert not right.closed
    assert heard == [{"say": "lost", "lost": lost}]
    left.close()
    right.close()


def test_both_ends_talk():
    left, right = map(Channel, socket.socketpair())
    left.send(say="commit", phases={"booting": 0.5})
    right.send(say="failed", reason="ünïcode\n and a new line")
    assert right.receive() == [{"say": "commit", "phases": {"booting": 0.5}}]
    assert left.receive() == [{"say": "failed", "reason": "ünïcode\n and a new line"}]
    left.close()
    right.close()


def test_what_was_said_before_the_end_is_heard(pair):
    channel, other = pair
    other.sendall(b'{"say": "failed"}\n')
    other.close()
    channel.send(say="commit")  # to nobody: no error, and it does not hide what was said
    assert channel.receive() == [{"say": "failed"}]
    assert channel.closed
    assert channel.receive() == []


def test_the_end_of_the_stream_is_told(pair):
    channel, other = pair
    other.close()
    assert channel.receive() == []
    assert channel.closed


def test_what_is_no_message_is_passed_over(pair):
    channel, other = pair
    other.sendall(b'garbage\n[1]\n\xff\xfe\n{"say": "ready"}\n')
    assert channel.receive() == [{"say": "ready"}]


def test_a_line_without_end_closes_the_channel(pair):
    channel, other = pair
    other.setblocking(False)
    sent = 0
    while not channel.closed and sent < 4 * LONGEST_MESSAGE:
        try:
            sent += other.send(b"x" * 65536)
        except BlockingIOError:
            pass
        channel.receive()
    assert channel.closed
    assert sent < 2 * LONGEST_MESSAGE


def test_a_full_socket_never_blocks_and_the_rest_follows():
    left, right = map(Channel, socket.socketpair())
    for number in range(2000):
        left.send(number=number, text="x" * 500)  # far more than the socket takes
    got: list[int] = []
    for _ in range(10000):
        got += [each["number"] for each in right.receive()]
        left.flush()
        if len(got) == 2000:
            break
    assert got == list(range(2000))
    left.close()
    right.close()


def test_the_descriptor_is_not_inherited(pair):
    channel, _ = pair
    assert not os.get_inheritable(channel.fileno())
    channel.close()
    assert channel.fileno() == -1


def test_the_last_word_waits_for_room_and_not_for_ever():
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    channel.send(say="drained", text="x" * (LONGEST_MESSAGE // 2))
    started = time.monotonic()
    assert not channel.flush_within(0.1)  # nobody reads
    assert time.monotonic() - started >= 0.1
    reader = threading.Thread(target=lambda: list(iter(lambda: theirs.recv(65536), b"")), daemon=True)
    reader.start()
    assert channel.flush_within(60)
    channel.close()
    reader.join(10)
    assert not reader.is_alive()
    theirs.close()
