"""A Flask application. What its requests start and do not wait for is a job: a deploy waits for it."""

import threading
import time

from flask import Flask, Response

import gracehooks
from gracehooks import jobs

app = Flask(__name__)


@app.get("/")
def index() -> str:
    return "hello from Flask\n"


@app.get("/healthz")
def healthz() -> str:
    return "ok\n"


@app.post("/mails")
def mails() -> tuple[str, int]:
    """A thread that a request starts is known by itself."""
    threading.Thread(target=send_mail, name="send_mail").start()
    return "on its way\n", 202


def send_mail() -> None:
    time.sleep(1)


@app.post("/reports")
def reports() -> tuple[str, int]:
    """A job by name can be told to stop."""
    jobs.submit(make_report, 100)
    return "begun\n", 202


def make_report(pages: int) -> None:
    token = jobs.current()
    for _ in range(pages):
        if token.wait(0.01):  # the worker must go: leave in order
            return


@gracehooks.on_shutdown
def close_pools() -> None:
    """Runs in each worker, after its last request and its last job."""


@app.errorhandler(gracehooks.JobRejected)
def job_rejected(_: gracehooks.JobRejected) -> Response:
    """This worker is at its end; the client may try again and gets another one."""
    return Response("try again\n", 503, {"Retry-After": "1"})
