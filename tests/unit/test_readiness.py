"""Readiness: 200 while the worker serves, 503 from the lame duck on, through WSGI and ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import gracehooks
from gracehooks.readiness import ASGI, WSGI, watch
from gracehooks.scoreboard import Order, Page, Phase


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page(requests=1, jobs=1)
    page.phase = Phase.SERVING
    watch(page)
    yield page
    watch(None)
    page.close()


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"app"]


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"app"})


def ask_wsgi(app: Any, path: str, method: str = "GET") -> tuple[int, bytes]:
    said: list[str] = []
    body = b"".join(app({"PATH_INFO": path, "REQUEST_METHOD": method}, lambda status, headers: said.append(status)))
    return int(said[0].split()[0]), body


def ask_asgi(app: Any, path: str, method: str = "GET") -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app({"type": "http", "path": path, "method": method}, None, send))
    return sent[0]["status"], sent[1]["body"]


both = pytest.mark.parametrize(("app", "ask"), [(wsgi, ask_wsgi), (asgi, ask_asgi)], ids=["wsgi", "asgi"])


@both
def test_it_says_what_the_worker_does(page: Page, app: Any, ask: Any) -> None:
    ready = gracehooks.readiness(app)
    assert ask(ready, "/-/ready") == (200, b"serving\n")
    page.order = Order.LAME_DUCK
    assert ask(ready, "/-/ready") == (503, b"lame_duck\n")
    page.phase = Phase.REQUESTS
    assert ask(ready, "/-/ready") == (503, b"draining\n")
    assert ask(ready, "/-/ready", "HEAD") == (503, b"")


@both
def test_everything_else_is_the_applications(page: Page, app: Any, ask: Any) -> None:
    ready = gracehooks.readiness(app, path="/healthz")
    assert ask(ready, "/") == (200, b"app")
    assert ask(ready, "/-/ready") == (200, b"app")
    assert ask(ready, "/healthz", "POST") == (200, b"app")
    assert ask(ready, "/healthz")[1] == b"serving\n"


def test_state_without_a_worker_and_of_one_told_to_leave(page: Page) -> None:
    assert gracehooks.state() == "serving"
    page.order = Order.RETIRE
    assert gracehooks.state() == "draining"
    watch(None)
    assert gracehooks.state() == "serving"


class Starlette:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class Flask:
    def __call__(self, environ: Any, start_response: Any) -> Any: ...


def old_style(scope: Any, receive: Any, send: Any) -> Any: ...


@pytest.mark.parametrize(
    ("app", "kind"), [(Starlette(), ASGI), (Flask(), WSGI), (old_style, ASGI), (wsgi, WSGI), (asgi, ASGI)]
)
def test_the_interface_is_seen_from_the_application(app: Any, kind: type) -> None:
    assert type(gracehooks.readiness(app)) is kind


def test_the_name_is_the_function_also_after_the_module_was_imported() -> None:
    import gracehooks.readiness

    assert isinstance(gracehooks.readiness(wsgi), WSGI)
    assert callable(gracehooks.readiness.state)
