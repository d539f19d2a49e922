"""Django: a view hands work to `jobs.submit`, which can be told to stop and may use the database.

    gunicorn -c gunicorn.conf.py jobs_django:application
    curl localhost:8000/exports && gracehooks stop --pidfile gunicorn.pid

The stop waits for the export.
"""

import time

from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections, connection
from django.http import HttpRequest, HttpResponse
from django.urls import path

from gracehooks import jobs

if not settings.configured:
    settings.configure(
        SECRET_KEY="only-for-the-example",
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["localhost", "127.0.0.1"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    )


def index(request: HttpRequest) -> HttpResponse:
    return HttpResponse("hello from Django\n", content_type="text/plain")


def export(request: HttpRequest) -> HttpResponse:
    try:
        job = jobs.submit(write_export, pages=100)
    except jobs.JobRejected:  # this worker is at its end: the client may try again, and gets another one
        return HttpResponse("try again\n", status=503, headers={"Retry-After": "1"}, content_type="text/plain")
    return HttpResponse(f"export {job.id} has begun\n", status=202, content_type="text/plain")


@jobs.job(timeout=600, on_abandon=lambda lost: print(f"export {lost.id} was given up after {lost.age:.0f} s"))
def write_export(pages: int) -> None:
    """One page after another; told to stop it leaves between two pages, never inside one."""
    token = jobs.current()
    close_old_connections()
    try:
        for _ in range(pages):
            with jobs.shield(), connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            if token.wait(0.01):
                return
    finally:
        connection.close()  # a thread's connection is its own; Django closes those of requests only


def healthz(request: HttpRequest) -> HttpResponse:
    return HttpResponse(time.strftime("ok, %H:%M:%S\n"), content_type="text/plain")


urlpatterns = [path("", index), path("exports", export), path("healthz", healthz)]

application: WSGIHandler = get_wsgi_application()
