"""Applications for the random walk: each request writes its name down when it begins, and is answered with it.

The paths are those of named_clients.py; the last line of each answer is the request's name and the worker's pid.
`begun.txt` has one line for each request that an application call has begun (`begun /fast/1-7 4711`), for each job that was
started (`job …`) and for each that ended (`done …`). A file `broken` breaks the release: it says how.
"""

__all__ = ["ASGI", "WSGI"]

_COMMON = """
import os
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qsl

HERE = Path(__file__).resolve().parent
if (HERE / "broken").exists():
    how = (HERE / "broken").read_text()
    if how == "raises":
        raise RuntimeError("a broken release")
    if how == "exits":
        sys.exit(7)
    if how == "dies":
        os._exit(9)
    if how == "hangs":
        while (HERE / "broken").exists():
            time.sleep(0.05)
BOOK = os.open(HERE / "begun.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(what, name):
    os.write(BOOK, f"{what} {name} {os.getpid()}\\n".encode())


def answer(name):
    return f"{name} {os.getpid()}".encode()


"""

WSGI = (
    _COMMON
    + """
real_sleep = time.sleep
if "gevent" in sys.modules:
    from gevent import monkey

    real_sleep = monkey.get_original("time", "sleep")


def work(name, seconds):
    time.sleep(seconds)
    note("done", name)


def stream(name, seconds):
    for number in range(5):
        yield b"part %d\\n" % number
        time.sleep(seconds)
    yield answer(name)


def app(environ, start_response):
    name = environ["PATH_INFO"]
    if name == "/":
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]
    note("begun", name)
    query = dict(parse_qsl(environ.get("QUERY_STRING", "")))
    seconds = float(query.get("s", 0))
    kind = name.split("/")[1]
    if kind == "stuck":
        (real_sleep if query.get("mode") == "block" else time.sleep)(3600)
    elif kind == "stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return stream(name, seconds)
    elif kind == "job":
        threading.Thread(target=work, args=(name, seconds), name=name).start()
        note("job", name)
    elif kind == "upload":
        length = int(environ["CONTENT_LENGTH"])
        if len(environ["wsgi.input"].read(length)) != length:
            raise OSError("the body ended early")
    elif seconds:
        time.sleep(seconds)
    body = answer(name)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
"""
)

ASGI = (
    _COMMON
    + """
import asyncio

TASKS = set()


async def work(name, seconds):
    await asyncio.sleep(seconds)
    note("done", name)


async def lifespan(receive, send):
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def websocket(receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while (await receive())["type"] != "websocket.disconnect":
        await send({"type": "websocket.send", "text": str(os.getpid())})


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    name = scope["path"]
    if name != "/":
        note("begun", name)
    if scope["type"] == "websocket":
        return await websocket(receive, send)
    query = dict(parse_qsl(scope["query_string"].decode()))
    seconds = float(query.get("s", 0))
    kind = name.split("/")[1]
    if kind == "stuck":
        if query.get("mode") == "block":
            time.sleep(3600)
        await asyncio.sleep(3600)
    elif kind == "stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(5):
            await send({"type": "http.response.body", "body": b"part %d\\n" % number, "more_body": True})
            await asyncio.sleep(seconds)
        return await send({"type": "http.response.body", "body": answer(name), "more_body": False})
    elif kind == "job":
        task = asyncio.get_running_loop().create_task(work(name, seconds), name=name)
        TASKS.add(task)
        task.add_done_callback(TASKS.discard)
        note("job", name)
    elif kind == "upload":
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise OSError("the body ended early")
            more = message.get("more_body", False)
    elif seconds:
        await asyncio.sleep(seconds)
    body = answer(name)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""
)
