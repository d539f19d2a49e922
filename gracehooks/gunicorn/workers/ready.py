"""Asking an application `ready_path` inside a worker, without a socket, before the worker counts as ready."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

__all__ = ["ask_asgi", "ask_wsgi", "verdict"]

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def verdict(path: str, status: int) -> str:
    """Empty where `status` lets the worker serve, else why it does not."""
    if status == 400:  # what Django says to a host that it was not told of
        return f"answered 400 on {path} (it is asked with Host: localhost; is that host allowed?)"
    return f"answered {status} on {path}" if status >= 400 else ""


def ask_wsgi(application: Application, path: str) -> str:
    """Ask the application once, as `GET path` from 127.0.0.1 with `Host: localhost` (PEP 3333).

    Returns why it is not ready, or an empty text. What the application raises is a reason, not an error.
    """
    path, _, query = path.partition("?")
    status: list[str] = []

    def start_response(line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        del headers, exc_info
        status[:] = [line]
        return bytes.__len__  # write(): the body is not looked at

    environ = {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "RAW_URI": path,
        "QUERY_STRING": query,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_SOFTWARE": "gracehooks",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "localhost",
        "HTTP_USER_AGENT": "gracehooks-ready",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
    }
    try:
        answer = application(environ, start_response)
        try:
            for _ in answer:
                pass
        finally:
            close = getattr(answer, "close", None)
            if close is not None:
                close()
    except Exception as error:  # noqa: BLE001 - whatever it raises, it is the reason
        return f"raised {type(error).__name__}: {error} on {path}"
    if not status:
        return f"gave no status on {path}"
    return verdict(path, int(status[0].split()[0]))


async def ask_asgi(application: Callable[..., Awaitable[Any]], path: str, state: dict[str, Any] | None = None) -> str:
    """The same of an ASGI application, after its lifespan startup, whose `state` the scope carries.

    It is not bounded here: the master gives the whole boot `ready_timeout`.
    """
    path, _, query = path.partition("?")
    status: list[int] = []
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()  # this client does not go away
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            status.append(int(message["status"]))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"user-agent", b"gracehooks-ready")],
        "client": ("127.0.0.1", 0),
        "server": ("localhost", 80),
        "state": dict(state or {}),
    }
    try:
        await application(scope, receive, send)
    except Exception as error:  # noqa: BLE001 - whatever it raises, it is the reason
        return f"raised {type(error).__name__}: {error} on {path}"
    if not status:
        return f"gave no status on {path}"
    return verdict(path, status[0])
