"""A Django project in one file, with a health check that looks at its database."""

import threading
import time

from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.core.wsgi import get_wsgi_application
from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.urls import path

if not settings.configured:
    settings.configure(
        SECRET_KEY="only-for-the-example",
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["localhost", "127.0.0.1"],  # ready_path is asked with Host: localhost
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    )


def index(request: HttpRequest) -> HttpResponse:
    return HttpResponse("hello from Django\n", content_type="text/plain")


def healthz(request: HttpRequest) -> HttpResponse:
    """A release with wrong database settings answers 500 here, and is rolled back before it serves anybody."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return HttpResponse("ok\n", content_type="text/plain")


def mails(request: HttpRequest) -> HttpResponse:
    """A thread that a request starts is known by itself: a deploy waits for it."""
    threading.Thread(target=send_mail, name="send_mail").start()
    return HttpResponse("on its way\n", status=202, content_type="text/plain")


def send_mail() -> None:
    try:
        time.sleep(1)
    finally:
        connection.close()  # as in any thread that has used the database


urlpatterns = [path("", index), path("healthz", healthz), path("mails", mails)]

application: WSGIHandler = get_wsgi_application()
