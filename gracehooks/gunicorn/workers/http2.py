"""HTTP/2 on gunicorn's WSGI workers (from 24 on): what a worker that leaves still serves, and the GOAWAY that it says then.

What must hold: every stream that has reached the worker when it is told to leave is served, though they are served one
after the other; then comes a GOAWAY that names the last of them, so a client knows which of its requests it may ask again.
gunicorn by itself reads no more once it leaves; before 27 it says no GOAWAY at all on some paths, and 27 names none.

It relies on `HTTP2ServerConnection.receive_data`, `close`, `cleanup_stream`, `is_closed`, `streams`, `sock`, `h2_conn`, and
where there are `pending_requests`, `_deferred_events`, `idle_timeout` (tests/contract/test_http2.py).
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from gunicorn.http.errors import NoMoreData

from gracehooks.gunicorn.workers.sockets import readable

__all__ = ["end_well", "wait_in_the_open"]

#: How many further streams of one connection are served once the worker leaves: as many as a client may have had under way
#: (SETTINGS_MAX_CONCURRENT_STREAMS). One that goes on asking is told GOAWAY then.
MOST = 100


def end_well(leaving: Callable[[], bool], answered: Callable[[], None]) -> None:
    """Mend gunicorn's connection, once, in this process.

    `leaving` says whether the worker leaves; `answered` is called when a stream is over, in the thread that served it.
    """
    from gunicorn.http2.connection import HTTP2ServerConnection

    stock = HTTP2ServerConnection.receive_data
    if hasattr(stock, "gracehooks"):
        return

    def receive_data(connection: Any, data: bytes | None = None) -> Iterable[Any]:
        if data == b"":  # 27 asks so for what is queued, and takes it for the end of the connection
            return stock(connection, None) if _queued(connection) else []
        try:
            found = stock(connection, data)
        except Exception as error:
            if not leaving() or not isinstance(error.__context__ or error, TimeoutError):
                raise
            connection.close()  # it was idle, and its wait was ended for that
            return []
        return _and_what_follows(connection, found, stock, leaving)

    stock_close = HTTP2ServerConnection.close

    def close(connection: Any, error_code: int = 0, last_stream_id: int | None = None) -> None:
        last = connection.h2_conn.highest_inbound_stream_id if last_stream_id is None else last_stream_id
        stock_close(connection, error_code, last)

    stock_cleanup = HTTP2ServerConnection.cleanup_stream

    def cleanup_stream(connection: Any, stream_id: int) -> None:
        answered()
        stock_cleanup(connection, stream_id)

    receive_data.gracehooks = True  # type: ignore[attr-defined]
    HTTP2ServerConnection.receive_data, HTTP2ServerConnection.close = receive_data, close
    HTTP2ServerConnection.cleanup_stream = cleanup_stream


def _and_what_follows(
    connection: Any, found: Iterable[Any], stock: Callable[..., Any], leaving: Callable[[], bool]
) -> Iterator[Any]:
    yield from found
    served = 0
    while leaving() and not connection.is_closed:
        if served >= MOST or not (_queued(connection) or connection.streams or readable(connection.sock)):
            connection.close()
            return
        try:
            for request in stock(connection, None):
                served += 1
                yield request
        except NoMoreData:
            return  # the next read meets it again, where gunicorn expects it


def _queued(connection: Any) -> bool:
    return bool(getattr(connection, "pending_requests", ()) or getattr(connection, "_deferred_events", ()))


def wait_in_the_open(connection: Any, left: int) -> None:
    """Have the connection wait for its next frame here, where the descriptor `left` wakes it when the worker leaves."""
    connection.receive_data = partial(_receive, connection, connection.receive_data, left)


def _receive(connection: Any, stock: Callable[..., Any], left: int, data: bytes | None = None) -> Any:
    if data is not None or _queued(connection) or readable(connection.sock):
        return stock(data)
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    poll.register(left, select.POLLIN)
    idle = getattr(connection, "idle_timeout", None)
    ready = {descriptor for descriptor, _ in poll.poll(idle * 1000 if idle else None)}
    if connection.sock.fileno() in ready:
        return stock(None)
    if not connection.streams:
        connection.close()
    elif ready:
        return stock(None)  # an upload is under way: it comes to its end
    return []
