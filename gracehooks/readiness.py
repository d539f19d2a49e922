"""Is this worker ready for more? 200 while it serves, 503 from the lame duck on.

A load balancer that asks `/-/ready` takes the worker out before it stops accepting. Knows no server: a worker class says
once which page is this process's (`watch`); without one, in a shell or a test, the state is "serving".
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from gracehooks.scoreboard import Order, Page, Phase

__all__ = ["readiness", "state", "watch"]

_page: Page | None = None


def watch(page: Page | None) -> None:
    """Make `page` the one that this process goes by."""
    global _page
    _page = page


def state() -> str:
    """What this worker does now: "serving", "lame_duck" (it serves, and will leave soon) or "draining"."""
    if _page is None:
        return "serving"
    phase = _page.phase
    if phase >= Phase.ACCEPTING_ENDS or _page.order >= Order.RETIRE:
        return "draining"
    return "lame_duck" if phase is Phase.LAME_DUCK or _page.order is Order.LAME_DUCK else "serving"


def _answer() -> tuple[int, bytes]:
    word = state()
    return (200 if word == "serving" else 503), word.encode() + b"\n"


def readiness(app: Callable[..., Any], path: str = "/-/ready") -> Callable[..., Any]:
    """Answer `path` (GET or HEAD) for the WSGI or ASGI application `app`; everything else is the application's.

    The answer is 200 and "serving", or 503 and "lame_duck" or "draining". Which of the two interfaces it is, is seen from
    the application: a coroutine function, an object with an async `__call__`, or a function of (scope, receive, send) is
    ASGI.
    """
    return ASGI(app, path) if is_asgi(app) else WSGI(app, path)


def is_asgi(app: Callable[..., Any]) -> bool:
    """Whether the application speaks ASGI."""
    calls = (app, *(vars(base).get("__call__") for base in type(app).__mro__))
    if any(inspect.iscoroutinefunction(each) for each in calls):
        return True
    try:
        wanted = [
            each.name
            for each in inspect.signature(app).parameters.values()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) and each.default is each.empty
        ]
    except (TypeError, ValueError):
        return False
    return wanted == ["scope", "receive", "send"]


class WSGI:
    """The middleware for WSGI (PEP 3333)."""

    def __init__(self, app: Callable[..., Any], path: str) -> None:
        self.app = app
        self.path = path

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer the path, or hand the request on."""
        if environ.get("PATH_INFO") != self.path or environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            answer: Iterable[bytes] = self.app(environ, start_response)
            return answer
        status, body = _answer()
        start_response(
            "200 OK" if status == 200 else "503 Service Unavailable",
            [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")],
        )
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


class ASGI:
    """The middleware for ASGI 3."""

    def __init__(self, app: Callable[..., Awaitable[None]], path: str) -> None:
        self.app = app
        self.path = path

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Answer the path, or hand the request on."""
        if scope["type"] != "http" or scope["path"] != self.path or scope["method"] not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        status, body = _answer()
        headers = [
            (b"content-type", b"text/plain"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


class _Module(types.ModuleType):
    """`gracehooks.readiness` is this function to everybody, and once imported also this module: it answers as both."""

    def __call__(self, app: Callable[..., Any], path: str = "/-/ready") -> Callable[..., Any]:
        return readiness(app, path)


sys.modules[__name__].__class__ = _Module
