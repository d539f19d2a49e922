"""A consumer beside the web application: it takes messages from a Redis list and runs a script for each.

    redis-cli rpush messages one two three
    gunicorn -k gracehooks.Worker -c gunicorn.conf.py jobs_consumer:app

At a deploy it takes no further message, and the scripts that run are run to their end. What it has not taken stays in the
list, for the next generation.
"""

import os
import shlex
from collections.abc import Callable, Iterable

import redis

from gracehooks import jobs

SCRIPT = shlex.split(os.environ.get("SCRIPT", "sh -c 'sleep 3; echo $0 >> done.txt'"))


@jobs.service
def consume(token: jobs.Token) -> None:
    """Runs once in every worker, and again when it crashes; `token` is set before anything else at a stop."""
    client = redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://localhost"), decode_responses=True)
    while not token.is_set():
        message = client.blpop(["messages"], timeout=0.2)
        if message is not None:
            # Taken means done: a stop waits for the child, and tells it only when its time is nearly over.
            jobs.run([*SCRIPT, message[1]], check=True)


def app(environ: dict[str, object], start_response: Callable[..., object]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "3")])
    return [b"ok\n"]
