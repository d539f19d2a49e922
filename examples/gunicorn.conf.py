"""gunicorn with gracehooks. All of it is optional: `--worker-class gracehooks.Worker` alone installs everything.

Beside this file:
    gunicorn flask_app:app
    gunicorn django_app:application
    gunicorn -k gracehooks.UvicornWorker fastapi_app:app
"""

import gracehooks

bind = "127.0.0.1:8000"
workers = 2
threads = 4
worker_class = "gracehooks.Worker"
pidfile = "gunicorn.pid"  # `gracehooks upgrade --pidfile gunicorn.pid`

gracehooks.configure(
    ready_path="/healthz",  # asked inside each new worker before it counts as ready
    drain_timeout=30,  # requests in flight
    job_timeout=60,  # what requests have started: threads, tasks, processes
)
