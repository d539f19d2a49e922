"""Flask: a view starts a plain thread and answers at once. Nothing of gracehooks is in it, and no deploy loses the mail.

    gunicorn -c gunicorn.conf.py jobs_flask:app
    curl -X POST localhost:8000/orders/7/mail && gracehooks stop --pidfile gunicorn.pid

The stop waits for the mail.
"""

import threading
import time

from flask import Flask

app = Flask(__name__)


@app.get("/")
def index() -> str:
    return "hello from Flask\n"


@app.get("/healthz")
def healthz() -> str:
    """Asked inside each new worker before it serves (`ready_path`)."""
    return "ok\n"


@app.post("/orders/<int:number>/mail")
def mail(number: int) -> tuple[str, int]:
    threading.Thread(target=send_mail, args=(number,), name=f"mail for order {number}").start()
    return "on its way\n", 202


def send_mail(number: int) -> None:
    """Talks to a slow mail server."""
    time.sleep(1)
    app.logger.warning("sent the mail for order %d", number)
