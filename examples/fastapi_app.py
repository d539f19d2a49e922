"""A FastAPI application, for `gracehooks.UvicornWorker` or `gracehooks.ASGIWorker`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from gracehooks import jobs


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Begins before the worker counts as ready; ends after the last request and the last job."""
    app.state.pool = object()
    yield
    del app.state.pool


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def index() -> str:
    return "hello from FastAPI"


@app.get("/healthz")
async def healthz() -> str:
    return "ok"


@app.post("/mails", status_code=202)
async def mails() -> str:
    """A task by name; one made with `asyncio.create_task` in a request is known as well."""
    jobs.create_task(send_mail(), name="send_mail")
    return "on its way"


async def send_mail() -> None:
    await asyncio.sleep(1)
