"""One request at a time, on a connection of its own, whose fate can be asked for later."""

from __future__ import annotations

import http.client
import threading
from concurrent.futures import Future

from tests.kit.server import Server

__all__ = ["ask"]


def ask(server: Server, path: str) -> Future[int]:
    """Ask for `/path` and do not wait; its status, or 0 when the connection ended without a whole answer."""
    connection = server.address.connect()
    connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
    answered: Future[int] = Future()

    def read() -> None:
        answer = http.client.HTTPResponse(connection)
        try:
            answer.begin()
            answer.read()
            answered.set_result(answer.status)
        except (OSError, http.client.HTTPException):
            answered.set_result(0)
        finally:
            answer.close()
            connection.close()

    threading.Thread(target=read, name=f"client of /{path}", daemon=True).start()
    return answered
