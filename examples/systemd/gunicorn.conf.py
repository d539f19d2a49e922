# gunicorn.conf.py, in the release's directory. gunicorn.socket decides where to listen: `bind` is not needed.
import gracehooks

workers = 2
threads = 4
worker_class = "gracehooks.Worker"
pidfile = "/run/gunicorn/gunicorn.pid"
gracehooks.configure(drain_timeout=30, job_timeout=60)
