"""What is started in a request and is no job: the pools, monitors and reporters of libraries.

They are told by the module of what they run. Such a thread lives as long as its process; waiting for it would make
every stop last until its deadline. A library that is not listed is taken for the application: start it at import, or
in an empty context (`contextvars.Context().run(start)`), which belongs to no request.
"""

from __future__ import annotations

from types import CodeType
from typing import Any

__all__ = ["PACKAGES", "is_infrastructure", "is_server_task"]

#: Packages whose own threads and processes are infrastructure.
PACKAGES = frozenset(
    {
        # pools and loops: the work in them is what may be a job
        "anyio", "apscheduler", "asgiref", "asyncio", "concurrent", "gracehooks", "gunicorn", "multiprocessing",
        "trio", "uvicorn", "uvloop", "watchfiles",
        # errors, metrics, traces
        "airbrake", "analytics", "beeline", "bugsnag", "datadog", "ddtrace", "elasticapm", "honeybadger", "instana",
        "libhoney", "logfire", "logging", "logtail", "loguru", "newrelic", "opentelemetry", "posthog", "prometheus_client",
        "pyroscope", "raven", "rollbar", "rudderstack", "scout_apm", "segment", "sentry_sdk", "statsd", "structlog",
        # flags and configuration
        "flagsmith", "ldclient", "launchdarkly", "statsig", "UnleashClient", "configcat", "configcatclient",
        # clients with a thread or a task of their own
        "aio_pika", "aiokafka", "aiormq", "asyncpg", "boto3", "botocore", "cassandra", "confluent_kafka", "elastic_transport",
        "firebase_admin", "google", "grpc", "h2", "hazelcast", "httpcore", "kafka", "kazoo", "kombu", "motor", "nats",
        "neo4j", "paho", "pika", "psycopg_pool", "pulsar", "pymongo", "redis", "s3transfer", "sqlalchemy", "stomp", "urllib3",
        "websockets",
    }
)  # fmt: skip

_modules: dict[str | None, bool] = {None: False}
_ASYNCIO_THREADS = ("_do_waitpid", "run_forever")
#: By the identity of the code, with the code, which keeps the identity its own: hashing code is slow.
_tasks: dict[int, tuple[bool, CodeType]] = {}
#: asyncio's own errands: the pipes of a child process, the attempts to connect.
_ERRANDS = frozenset({f"asyncio.{each}" for each in ("base_events", "base_subprocess", "selector_events", "staggered")})


def is_infrastructure(thing: Any) -> bool:
    """Whether the thing, a class or a function, is defined in one of the packages."""
    module = getattr(thing, "__module__", None)
    known = _modules.get(module)
    if known is None:
        known = isinstance(module, str) and module.partition(".")[0] in PACKAGES
        if isinstance(module, str):
            _modules[module] = known
    # `asyncio.run` in a thread runs the application's; a loop that runs for ever is a loop.
    return known and (not str(module).startswith("asyncio.") or getattr(thing, "__name__", "") in _ASYNCIO_THREADS)


def is_server_task(coroutine: Any) -> bool:
    """Whether a coroutine, not started yet, is infrastructure: a server's own task, a client's keep-alive.

    Most of asyncio's and anyio's are not: what they wrap is the application's.
    """
    code = getattr(coroutine, "cr_code", None)
    if code is None:
        return False
    known = _tasks.get(id(code))
    if known is None:
        frame = coroutine.cr_frame
        module = frame.f_globals.get("__name__", "") if frame is not None else ""
        package = module.partition(".")[0]
        wraps = package in ("asyncio", "anyio", "asgiref", "gracehooks")
        answer = module in _ERRANDS or (package in PACKAGES and not wraps)
        known = _tasks[id(code)] = (answer, code)
    return known[0]
