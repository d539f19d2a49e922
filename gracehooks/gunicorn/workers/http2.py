"""HTTP/2 on gunicorn's WSGI workers (from 24 on): the GOAWAY that a worker says when it leaves.

gunicorn asks its connection for what is queued with `receive_data(b"")`, which 27.0 takes for the end of the connection: the
queued requests are dropped, and GOAWAY is not sent. Without it a client does not know which of its requests were served.
It relies on `HTTP2ServerConnection.receive_data`, `pending_requests`, `_deferred_events`, `idle_timeout` and `close`
(tests/contract/test_http2.py).
"""

from __future__ import annotations

import select
from collections.abc import Callable
from functools import partial
from typing import Any

from gracehooks.gunicorn.workers.sockets import readable

__all__ = ["goaway_at_the_end", "wait_in_the_open"]


def goaway_at_the_end() -> None:
    """Mend the class, once, in this process."""
    from gunicorn.http2.connection import HTTP2ServerConnection

    stock = HTTP2ServerConnection.receive_data
    if hasattr(stock, "gracehooks"):
        return

    def receive_data(connection: Any, data: bytes | None = None) -> Any:
        if data == b"":
            if not connection.pending_requests:
                return []
            data = None
        return stock(connection, data)

    receive_data.gracehooks = True  # type: ignore[attr-defined]
    HTTP2ServerConnection.receive_data = receive_data


def wait_in_the_open(connection: Any, left: int) -> None:
    """Have the connection wait for its next frame here, where the descriptor `left` wakes it when the worker leaves."""
    connection.receive_data = partial(_receive, connection, connection.receive_data, left)


def _receive(connection: Any, stock: Callable[..., Any], left: int, data: bytes | None = None) -> Any:
    if data is not None or connection.pending_requests or connection._deferred_events or readable(connection.sock):
        return stock(data)
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    poll.register(left, select.POLLIN)
    idle = connection.idle_timeout
    ready = {descriptor for descriptor, _ in poll.poll(idle * 1000 if idle else None)}
    if connection.sock.fileno() in ready:
        return stock(None)
    if not ready and not connection.streams:
        connection.close()
    return []
