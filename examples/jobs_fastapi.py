"""FastAPI: three ways to go on after the answer; a deploy waits for each. For UvicornWorker or ASGIWorker.

    gunicorn -k gracehooks.UvicornWorker -c gunicorn.conf.py jobs_fastapi:app
    curl -X POST localhost:8000/mails && gracehooks stop --pidfile gunicorn.pid

The stop waits for the mail.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import BackgroundTasks, FastAPI

from gracehooks import jobs


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Ends after the last job: what jobs use is still there."""
    app.state.sent = []
    yield
    app.state.sent.clear()


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def index() -> str:
    return "hello from FastAPI"


@app.get("/healthz")
async def healthz() -> str:
    """Asked inside each new worker before it serves (`ready_path`)."""
    return "ok"


@app.post("/mails", status_code=202)
async def mails() -> str:
    """A task by name. It is held by a strong reference, and its exception is logged."""
    jobs.create_task(send("a mail"), name="mail")
    return "on its way"


@app.post("/pings", status_code=202)
async def pings() -> str:
    """A plain task that is born in a request is known as well."""
    asyncio.create_task(send("a ping"))  # noqa: RUF006 - jobs hold it
    return "on its way"


@app.post("/reports", status_code=202)
async def reports(background: BackgroundTasks) -> str:
    """Starlette's own: it belongs to its request, which ends when it has ended."""
    background.add_task(send, "a report")
    return "on its way"


async def send(what: str) -> None:
    async with jobs.shield():  # not cancelled half-way, whatever the deploy says
        await asyncio.sleep(0.5)
        app.state.sent.append(what)
