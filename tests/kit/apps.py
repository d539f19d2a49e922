"""Applications for tests, as sources: each is written into the server's directory as `app.py`.

The WSGI and the ASGI one answer the same paths: `/` and `/fast`; `/sleep?s=0.5` or `/sleep?max=1` (at random);
`/stream?n=10&s=0.02` (n parts, s seconds apart); `/upload` (the number of bytes read); `/pid`; `/version` (the text that
`version.txt` held when the application was imported); `/status?code=500`; `/job?s=1&kind=thread|process|task` (work that
outlives the request and then leaves the file `job-<n>.done`); `/exit?code=1` (the worker ends at once). `reading` makes an
ASGI one of few lines.
"""

import textwrap

from tests.kit.classes import LOOPS

__all__ = ["ASGI", "HOLD_THE_GIL", "LIFESPAN", "WSGI", "answering", "reading"]

#: A lifespan that has nothing to do, for an ASGI application of a test's own.
LIFESPAN = """

async def lifespan(receive, send):
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
"""

#: `hold_the_gil()`, for ever.
HOLD_THE_GIL = """
import ctypes

MUTEX = ctypes.create_string_buffer(64)


def hold_the_gil():
    library = ctypes.PyDLL(None)
    library.pthread_mutex_lock(MUTEX)
    library.pthread_mutex_lock(MUTEX)  # no signal ends that

"""

_COMMON = """
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qsl

HERE = Path(__file__).resolve().parent
VERSION = (HERE / "version.txt").read_text() if (HERE / "version.txt").exists() else "1"
NUMBERS = itertools.count(1)


def done_file():
    return HERE / f"job-{os.getpid()}-{next(NUMBERS)}.done"


def work(seconds, done):
    time.sleep(seconds)
    done.write_text("done")


def start_process(seconds):
    code = f"import time, pathlib; time.sleep({seconds}); pathlib.Path({str(done_file())!r}).write_text('done')"
    subprocess.Popen([sys.executable, "-S", "-c", code])


def pause(query):
    return random.uniform(0, float(query["max"])) if "max" in query else float(query.get("s", 0.1))

"""

WSGI = (
    _COMMON
    + """
def stream(parts, seconds):
    for number in range(parts):
        yield b"part %d\\n" % number
        time.sleep(seconds)


def app(environ, start_response):
    path = environ["PATH_INFO"]
    query = dict(parse_qsl(environ.get("QUERY_STRING", "")))
    status, body = "200 OK", b"ok"
    if path == "/sleep":
        time.sleep(pause(query))
    elif path == "/stream":
        start_response(status, [("Content-Type", "text/plain")])
        return stream(int(query.get("n", 10)), float(query.get("s", 0.02)))
    elif path == "/upload":
        length = int(environ.get("CONTENT_LENGTH") or 0)
        read = 0
        while read < length:
            part = environ["wsgi.input"].read(min(65536, length - read))
            if not part:
                break
            read += len(part)
        body = str(read).encode()
    elif path == "/pid":
        body = str(os.getpid()).encode()
    elif path == "/version":
        body = VERSION.encode()
    elif path == "/status":
        status = query.get("code", "500") + " Asked"
    elif path == "/job":
        if query.get("kind", "thread") == "process":
            start_process(float(query.get("s", 1)))
        else:
            threading.Thread(target=work, args=(float(query.get("s", 1)), done_file()), name="job").start()
    elif path == "/exit":
        os._exit(int(query.get("code", 1)))
    elif path not in ("/", "/fast"):
        status, body = "404 Not Found", b"no such path"
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
"""
)

ASGI = (
    _COMMON
    + LIFESPAN
    + """
import asyncio

TASKS = set()


async def work_task(seconds, done):
    await asyncio.sleep(seconds)
    done.write_text("done")


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    path = scope["path"]
    query = dict(parse_qsl(scope["query_string"].decode()))
    status, body = 200, b"ok"
    headers = [(b"content-type", b"text/plain")]
    if path == "/sleep":
        await asyncio.sleep(pause(query))
    elif path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(int(query.get("n", 10))):
            await send({"type": "http.response.body", "body": b"part %d\\n" % number, "more_body": True})
            await asyncio.sleep(float(query.get("s", 0.02)))
        return await send({"type": "http.response.body", "body": b"", "more_body": False})
    elif path == "/upload":
        read, more = 0, True
        while more:
            message = await receive()
            read += len(message.get("body", b""))
            more = message.get("more_body", False)
        body = str(read).encode()
    elif path == "/pid":
        body = str(os.getpid()).encode()
    elif path == "/version":
        body = VERSION.encode()
    elif path == "/status":
        status = int(query.get("code", "500"))
    elif path == "/job":
        kind = query.get("kind", "task")
        if kind == "process":
            start_process(float(query.get("s", 1)))
        elif kind == "thread":
            threading.Thread(target=work, args=(float(query.get("s", 1)), done_file()), name="job").start()
        else:
            task = asyncio.get_running_loop().create_task(work_task(float(query.get("s", 1)), done_file()))
            TASKS.add(task)
            task.add_done_callback(TASKS.discard)
    elif path == "/exit":
        os._exit(int(query.get("code", 1)))
    elif path not in ("/", "/fast"):
        status, body = 404, b"no such path"
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""
)


_ANSWERING_WSGI = """
def app(environ, start_response):
    body = answer(environ["PATH_INFO"][1:]).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
_ANSWERING_ASGI = (
    LIFESPAN
    + """

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    body = answer(scope["path"][1:]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""
)


def answering(worker: str) -> str:
    """The rest of a source that has `answer(path)`, which gives a text: the application for the class `worker`."""
    return _ANSWERING_ASGI if worker in LOOPS else _ANSWERING_WSGI


def reading(between: str = "") -> str:
    """An ASGI application that reads the body of its request, as frameworks do, and answers "ok" after the lines `between`."""
    return _READING.replace("    # between\n", textwrap.indent(textwrap.dedent(between).lstrip("\n"), "    "))


_READING = (
    LIFESPAN
    + """
import asyncio, os, signal, time

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    while (await receive())["more_body"]:
        pass
    # between
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""
)
