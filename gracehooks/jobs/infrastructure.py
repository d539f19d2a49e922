"""What is started in a request and is no job: the pools, monitors and reporters of libraries.

They are told by the module of what they run. Such a thread lives as long as its process; waiting for it would make
every stop last until its deadline. Of a package that is not listed it is told by three things together: the thread is a
daemon, its code is the package's, and the package started it itself, with nothing of the application in its hands. All
else is taken for the application's; start it at import, or in an empty context (`contextvars.Context().run(start)`),
which belongs to no request.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Iterable
from types import CodeType
from typing import Any

__all__ = ["PACKAGES", "application", "is_infrastructure", "is_server_task", "package_whose_own"]

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

#: The application's own top-level packages, which may be installed like any other.
application: set[str] = set()
_INSTALLED = ("/site-packages/", "/dist-packages/")
_STDLIB = os.path.dirname(os.__file__) + os.sep

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
    try:
        code = coroutine.cr_code
    except AttributeError:
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


def package_whose_own(thread: threading.Thread) -> str | None:
    """The installed package whose own this daemon thread is; None where it may be work of the application.

    Called by what starts the thread, in its context.
    """
    target = getattr(thread, "_target", None)
    code = _code(target if target is not None else type(thread).run)
    package = _package(code.co_filename) if code is not None else ""
    if not package or package in application:
        return None
    held = [*getattr(thread, "_args", ()), *getattr(thread, "_kwargs", {}).values()]
    if target is None:
        held += vars(thread).values()
    if any(_is_of_the_application(each) for each in (*held, *_inside(target))):
        return None
    frame = sys._getframe(1)
    while frame is not None:  # what instruments threads stands between
        starter = _package(frame.f_code.co_filename)
        if starter not in PACKAGES and frame.f_globals.get("__name__", "").partition(".")[0] not in _STARTERS:
            return package if starter == package else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


_STARTERS = frozenset({"gevent", "gracehooks", "threading"})


def _code(function: Any) -> CodeType | None:
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _package(file: str) -> str:
    """The top-level package that a file is installed with; empty where it is none's."""
    for each in _INSTALLED:
        _, found, rest = file.rpartition(each)
        if found:
            return rest.partition("/")[0].removesuffix(".py")
    return ""


def _inside(function: Any) -> Iterable[Any]:
    """What a function brings along: the arguments of a partial, the variables of a closure, what it wraps."""
    while isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        function = function.func
    function = getattr(function, "__func__", function)
    yield getattr(function, "__wrapped__", None)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:
            pass  # not filled yet


def _is_of_the_application(thing: Any) -> bool:
    """Whether it is a function of the application's, or an object of one of its classes."""
    code = _code(thing)
    module = sys.modules.get(type(thing).__module__)
    file = code.co_filename if code is not None else getattr(module, "__file__", None)
    if not file or file.startswith("<frozen"):
        return False
    package = _package(file)
    return package in application if package else not file.startswith(_STDLIB)
