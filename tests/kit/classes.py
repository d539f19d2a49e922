"""The worker classes that the installed gunicorn can have: its own event loop worker came with 25, ours needs 25.2."""

import gunicorn

__all__ = ["CLASSES", "LOOPS", "WSGI_CLASSES"]

WSGI_CLASSES = ["gracehooks.Worker", "gracehooks.SyncWorker", "gracehooks.GeventWorker"]
LOOPS = ["gracehooks.UvicornWorker"] + ["gracehooks.ASGIWorker"] * (gunicorn.version_info >= (25, 2))
CLASSES = WSGI_CLASSES + LOOPS
