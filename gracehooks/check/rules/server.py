"""Traps in gunicorn's configuration and in gracehooks' settings."""

from __future__ import annotations

import os
from collections.abc import Iterator

from gracehooks.check.facts import Facts
from gracehooks.check.rules import Seen, rule, seen

TIMEOUTS = "docs/how-to/timeouts.md"


@rule(
    "config-unreadable",
    finds="a configuration that cannot be loaded, a worker class that cannot be imported, a setting out of range",
    happens="the server does not start, and an upgrade or a reload to this configuration is rolled back",
    moment="at the start, before the first worker",
    cure="mend what the message names",
    source="loaded here as gunicorn loads it (gunicorn/app/base.py)",
)
def config_unreadable(facts: Facts) -> Iterator[Seen]:
    if facts.failure:
        config = facts.server.config if facts.server is not None else None
        yield seen(config or "configuration", facts.failure)


@rule(
    "boot-failed",
    finds="an application that does not become ready",
    happens="the first start fails; an upgrade or a reload to it is rolled back and the old code serves on",
    moment="after {seconds} s of booting",
    cure="mend the application{hint}",
    source="booted here, in a child process",
)
def boot_failed(facts: Facts) -> Iterator[Seen]:
    boot = facts.boot
    if boot is not None and boot.failure:
        where = f"; it stood at {boot.where}" if boot.where else ""
        slow = boot.failure.startswith("was not ready within")
        yield seen(
            (facts.server.app if facts.server else None) or "application",
            boot.failure + where,
            seconds=f"{boot.seconds:.1f}",
            hint=", or raise ready_timeout where the boot rightly takes that long" if slow else "",
        )


@rule(
    "not-attached",
    finds="neither a worker class of gracehooks nor its `on_starting`",
    happens="gracehooks is not in this server: USR2 and HUP are gunicorn's own, unverified; a stop ends after "
    "graceful_timeout ({graceful} s) with SIGKILL and says nothing of what it lost",
    moment="at every upgrade, reload and stop",
    cure='worker_class = "gracehooks.Worker" (or SyncWorker, GeventWorker, ASGIWorker, UvicornWorker); to keep the class: '
    "on_starting = gracehooks.on_starting",
    source="gunicorn/arbiter.py, stop() and reexec()",
)
def not_attached(facts: Facts) -> Iterator[Seen]:
    server = facts.server
    if server is not None and not server.attached and not _replaced(facts):
        yield seen("worker_class", server.worker_class, graceful=server.graceful_timeout)


@rule(
    "stock-worker",
    finds="`on_starting = gracehooks.on_starting` with a worker class that is not one of gracehooks'",
    happens="work that requests started (threads, tasks, processes) is neither waited for nor reported, and the report does "
    "not name requests in flight",
    moment="when a worker leaves: stop, upgrade, reload, max_requests",
    cure='worker_class = "{ours}"',
    source="gracehooks/gunicorn/master.py says it at the start, too",
)
def stock_worker(facts: Facts) -> Iterator[Seen]:
    server = facts.server
    if server is not None and server.attached and not server.ours and not _replaced(facts):
        classes = {"sync": "SyncWorker", "gevent": "GeventWorker", "asgi": "ASGIWorker", "uvicorn": "UvicornWorker"}
        yield seen("worker_class", server.worker_class, ours="gracehooks." + classes.get(server.kind, "Worker"))


def _replaced(facts: Facts) -> bool:
    server = facts.server
    if server is None or server.ours or server.threads < 2 or not server.worker_class.endswith("SyncWorker"):
        return False
    return not server.worker_class.startswith("gunicorn.")


@rule(
    "sync-threads",
    finds="a worker class whose name ends in SyncWorker, with threads above 1, and no `gracehooks.configure(…)`",
    happens="gunicorn puts its own gthread worker in the place of {written}, and gracehooks is not in the server that way",
    moment="at the start",
    cure='threads = 1, or worker_class = "gracehooks.Worker", which has threads',
    source="gunicorn/config.py, Config.worker_class",
)
def sync_threads(facts: Facts) -> Iterator[Seen]:
    server = facts.server
    if server is not None and _replaced(facts):
        yield seen("threads", str(server.threads), written=server.worker_class)


@rule(
    "reuse-port",
    finds="`reuse_port`",
    happens="an upgrade is refused: each worker has a listener of its own, which no successor can be given; connections "
    "that wait in a leaving worker's listener are reset by the kernel",
    moment="at the first upgrade, and whenever a worker leaves",
    cure="remove reuse_port",
    source="socket(7), SO_REUSEPORT; gunicorn/arbiter.py creates the listeners in the worker",
)
def reuse_port(facts: Facts) -> Iterator[Seen]:
    if facts.server is not None and facts.server.reuse_port:
        yield seen("reuse_port", "True")


@rule(
    "daemon",
    finds="`daemon` where a supervisor follows the process",
    happens="the process that {host} started forks and exits at once: {host} takes the server for ended",
    moment="at the start",
    cure="remove daemon; {host} runs it in the background already",
    source="gunicorn/util.py, daemonize(); gunicorn/app/base.py warns under systemd",
)
def daemon(facts: Facts) -> Iterator[Seen]:
    if facts.server is None or not facts.server.daemon:
        return
    hosts = {
        "systemd": facts.unit,
        "supervisord": facts.program,
        "the kubelet": facts.workload,
        "Docker": facts.service or facts.image,
    }
    for host, part in hosts.items():
        if part is not None and not (facts.unit is not None and facts.unit.type == "forking"):
            yield seen("daemon", "True", host=host)


@rule(
    "reload-on",
    finds="`reload`, the restart of workers when a file changes",
    happens="workers restart on code that is half copied, one by one and unverified",
    moment="while a release is being copied",
    cure="remove reload; `gracehooks upgrade` or `gracehooks reload` starts new code when it is complete",
    source="gunicorn/workers/base.py, init_process(): «Use in development only!»",
)
def reload_on(facts: Facts) -> Iterator[Seen]:
    if facts.server is not None and facts.server.reload:
        yield seen("reload", "True")


@rule(
    "timeout-zero",
    finds="`timeout = 0`",
    happens="a worker that hangs is never replaced, and the connections it accepted wait without an end",
    moment="from the moment that a worker hangs",
    cure="timeout = 30, or what the longest pause of a worker's loop takes",
    source="gunicorn/arbiter.py, murder_workers(): `if not self.timeout: return`",
    page=f"{TIMEOUTS}#the-servers-own-timeouts",
)
def timeout_zero(facts: Facts) -> Iterator[Seen]:
    if facts.server is not None and facts.server.timeout == 0:
        yield seen("timeout", "0")


@rule(
    "timeout-cuts-requests",
    finds="a sync worker whose `timeout` is shorter than `drain_timeout`",
    happens="a sync worker has no heartbeat while it answers: a request that takes longer than {timeout} s is ended with its "
    "worker; only one that a drain meets gets the {drain} s",
    moment="{timeout} s after such a request began, at any time but in a drain",
    cure='timeout = {needed} or more, or worker_class = "gracehooks.Worker", whose heartbeat does not depend on requests',
    source="measured; gunicorn's settings, timeout",
    page=f"{TIMEOUTS}#the-servers-own-timeouts",
)
def timeout_cuts_requests(facts: Facts) -> Iterator[Seen]:
    server, settings = facts.server, facts.settings
    if server is None or settings is None or server.kind != "sync" or not server.attached:
        return
    if 0 < server.timeout < settings.drain_timeout:
        drain = f"{settings.drain_timeout:g}"
        yield seen("timeout", f"{server.timeout} s", timeout=server.timeout, drain=drain, needed=drain)


@rule(
    "graceful-timeout-ignored",
    finds="a `graceful_timeout` of one's own that is shorter than what gracehooks gives a worker",
    happens="gracehooks raises it to {leave} s, so a stop may last longer than the {given} s that were asked for",
    moment="at a stop with long requests or jobs",
    cure="remove graceful_timeout and set drain_timeout, job_timeout and cleanup_timeout, whose sum is the bound",
    source="the server's own log line at its start",
    page=f"{TIMEOUTS}#the-servers-own-timeouts",
)
def graceful_timeout_ignored(facts: Facts) -> Iterator[Seen]:
    server, settings = facts.server, facts.settings
    if server is None or settings is None or not server.attached:
        return
    if server.graceful_timeout != 30 and server.graceful_timeout < settings.leave_budget:
        given = server.graceful_timeout
        yield seen("graceful_timeout", f"{given} s", leave=f"{settings.leave_budget:g}", given=given)


@rule(
    "drain-zero",
    finds="`drain_timeout = 0`",
    happens="every request in flight is cut off",
    moment="the moment that a stop or the retirement after an upgrade begins",
    cure="drain_timeout = the longest that a request may take",
    source="gracehooks' settings",
    page=f"{TIMEOUTS}#the-stop-budget",
)
def drain_zero(facts: Facts) -> Iterator[Seen]:
    if _attached(facts) and facts.settings is not None and facts.settings.drain_timeout == 0:
        yield seen("drain_timeout", "0")


@rule(
    "job-grace-whole",
    finds="`job_grace` as long as `job_timeout`",
    happens="jobs are told to stop and abandoned in the same moment: none can save what it has",
    moment="{timeout} s after the last request ended",
    cure="job_grace = {half}, or none, which is half of job_timeout",
    source="gracehooks' settings",
    page=f"{TIMEOUTS}#the-stop-budget",
)
def job_grace_whole(facts: Facts) -> Iterator[Seen]:
    settings = facts.settings
    if settings is None or settings.job_grace is None or not _attached(facts):
        return
    if settings.job_grace >= settings.job_timeout > 0:
        timeout = f"{settings.job_timeout:g}"
        yield seen("job_grace", f"{settings.job_grace:g} s", timeout=timeout, half=f"{settings.job_timeout / 2:g}")


def _attached(facts: Facts) -> bool:
    return facts.server is not None and facts.server.attached


def _read_only(facts: Facts, path: str) -> bool:
    """Whether the unit's own sandbox speaks for the directory, so that its permissions here do not."""
    from gracehooks.check.units import managed_directories

    return facts.unit is not None and any(
        path == each or path.startswith(each + "/") for each in managed_directories(facts.unit)
    )


def _pidfile_directory(facts: Facts) -> str | None:
    server = facts.server
    if server is None or not server.pidfile:
        return None
    return os.path.dirname(os.path.join(server.chdir, server.pidfile))


@rule(
    "pidfile-missing-directory",
    finds="a pidfile in a directory that is not there",
    happens="the server does not start: «{directory} doesn't exist. Can't create pidfile.»",
    moment="at the start; under /run, at the first start after a reboot",
    cure="make the directory{hint}",
    source="gunicorn/pidfile.py",
)
def pidfile_missing_directory(facts: Facts) -> Iterator[Seen]:
    path = _pidfile_directory(facts)
    found = facts.host.directory(path) if facts.host is not None else None
    if path is not None and found is not None and not found.exists and not _read_only(facts, path):
        name = path.removeprefix("/run/")
        hint = f"; in the unit: RuntimeDirectory={name}" if facts.unit and path.startswith("/run/") else ""
        yield seen("pidfile", str(facts.server and facts.server.pidfile), directory=path, hint=hint)


@rule(
    "pidfile-unwritable",
    finds="a pidfile in a directory that the server's user cannot write",
    happens="the server does not start; and the handover, which replaces the file, and the state directory beside it need "
    "the same right",
    moment="at the start",
    cure="let {user} write {directory}, or move the pidfile{hint}",
    source="gunicorn/pidfile.py makes a temporary file beside it and renames it",
)
def pidfile_unwritable(facts: Facts) -> Iterator[Seen]:
    path = _pidfile_directory(facts)
    found = facts.host.directory(path) if facts.host is not None else None
    if path is None or found is None or not found.exists or _read_only(facts, path):
        return
    if found.writable is False and facts.host is not None:
        hint = " below a RuntimeDirectory= of the unit" if facts.unit is not None else ""
        yield seen(
            "pidfile", str(facts.server and facts.server.pidfile), user=facts.host.user, directory=path, hint=hint
        )


@rule(
    "pidfile-shared",
    finds="a pidfile in a directory where every user may create files, such as /tmp",
    happens="another user can make the file first, which stops the start, and the clean-up of old files in /tmp removes it, "
    "and with it the state beside it: `gracehooks upgrade --pidfile` finds no server then{private}",
    moment="at the start; and, where tmpfiles.d cleans up, some ten days later",
    cure="a directory of the server's own, such as /run/<name>",
    source="gunicorn/pidfile.py refuses a file that names a living process; systemd's tmpfiles.d/tmp.conf (/tmp 10d)",
)
def pidfile_shared(facts: Facts) -> Iterator[Seen]:
    path = _pidfile_directory(facts)
    found = facts.host.directory(path) if facts.host is not None else None
    if path is None or not (path in ("/tmp", "/var/tmp", "/dev/shm") or (found is not None and found.shared)):
        return
    if facts.workload is not None or facts.service is not None or facts.image is not None:
        return  # a container's own /tmp has no other users and no clean-up
    private = ""
    if facts.unit is not None and facts.unit.get("PrivateTmp").lower() in ("yes", "true", "on", "1"):
        private = "; with PrivateTmp= no command outside the unit sees the file at all"
    yield seen("pidfile", str(facts.server and facts.server.pidfile), private=private)


@rule(
    "state-dir-unwritable",
    finds="a `state_dir` that the server's user can neither write nor make",
    happens="no status.json and no history: `gracehooks status` and `gracehooks upgrade` know nothing of this server",
    moment="at the start",
    cure="let {user} write it, or choose another directory",
    source="gracehooks/upgrade/history.py",
)
def state_dir_unwritable(facts: Facts) -> Iterator[Seen]:
    path = facts.settings.state_dir if facts.settings is not None else None
    found = facts.host.directory(path) if facts.host is not None else None
    if path is not None and found is not None and found.writable is False and not _read_only(facts, path):
        yield seen("state_dir", path, user=facts.host.user if facts.host is not None else "")


@rule(
    "release-resolved",
    finds="a start directory, program or configuration inside one release instead of behind the symlink to it",
    happens="the upgrade runs the original command again, and that names this release: it starts the old code, and says "
    "that it completed",
    moment="at the first upgrade to the next release; when the release is cleaned away, every upgrade is refused",
    cure="name {instead}",
    source="gunicorn/arbiter.py, START_CTX: argv and the working directory are kept as they were given",
)
def release_resolved(facts: Facts) -> Iterator[Seen]:
    server, host = facts.server, facts.host
    releases = host.releases if host is not None else {}
    command = facts.command
    places = {
        "WorkingDirectory": facts.unit.get("WorkingDirectory") if facts.unit else "",
        "directory": facts.program.values.get("directory", "") if facts.program else "",
        "chdir": server.chdir if server is not None and server.chdir != server.cwd else "",
        "config": _named_config(facts),
        "ExecStart" if facts.unit else "command": command.program if command is not None else "",
    }
    told = set()
    for where, path in places.items():
        directory, link = releases.get(path) or _by_name(path)
        if directory and directory not in told:
            told.add(directory)
            rest = path.removeprefix(directory)
            yield seen(where, path, instead=f"{link}{rest}" if link else "it by the symlink, as in …/current" + rest)


def _named_config(facts: Facts) -> str:
    """The configuration file, unless it is simply the one of the start directory."""
    server = facts.server
    if server is None or not server.config or os.path.dirname(server.config) in ("", server.cwd):
        return ""
    return server.config


@rule(
    "start-directory-resolved",
    finds="a start directory behind a symlink, of which gunicorn is only told the release that it names today",
    happens="a supervisor changes to the directory and does not say by which name; gunicorn asks the kernel, and that answers "
    "with the release: the upgrade starts the old code again, and says that it completed",
    moment="at the first upgrade to the next release",
    cure="{cure}",
    source="measured; gunicorn/util.py, getcwd(), keeps a symlink where PWD names it, and systemd sets no PWD",
)
def start_directory_resolved(facts: Facts) -> Iterator[Seen]:
    server, unit, program = facts.server, facts.unit, facts.program
    if unit is not None:
        where, path = "WorkingDirectory", unit.get("WorkingDirectory")
        variable = f"Environment=PWD={path}"
    elif program is not None:
        where, path = "directory", program.values.get("directory", "")
        variable = f'environment=PWD="{path}"'
    else:
        return
    plain = os.path.normpath(path) if path else ""
    symlinked = facts.host is not None and path in facts.host.symlinked
    if not symlinked and not set(plain.split("/")) & {"current", "live"}:
        return
    told = os.path.normpath(facts.environ.get("PWD", ".")) == plain
    chdir = server is not None and (os.path.normpath(server.chdir) == plain != server.cwd)
    if not told and not chdir:
        yield seen(where, path, cure=f"{variable}; or --chdir {path} and an absolute path after -c")


def _by_name(path: str) -> tuple[str, str]:
    parts = path.split("/")
    if "releases" in parts[:-1]:
        at = parts.index("releases")
        return "/".join(parts[: at + 2]), ""
    return "", ""


@rule(
    "max-requests-alone",
    finds="`max_requests` with one worker that is not gracehooks'",
    happens="the worker leaves before its replacement starts to boot: nobody answers until that is ready, and work that it "
    "started in the background is killed",
    moment="after each {requests} requests",
    cure='worker_class = "gracehooks.Worker", which boots the replacement first, or a second worker',
    source="gunicorn/arbiter.py: a slot is filled when its worker was reaped",
)
def max_requests_alone(facts: Facts) -> Iterator[Seen]:
    server = facts.server
    if server is not None and server.max_requests and not server.ours and server.workers == 1:
        yield seen("max_requests", str(server.max_requests), requests=server.max_requests)


@rule(
    "max-requests-together",
    finds="`max_requests` without jitter, with several workers that are not gracehooks'",
    happens="workers that share the load evenly reach the number together and leave together; while they boot, nobody "
    "answers",
    moment="after about {total} requests",
    cure="max_requests_jitter = {jitter}, or a worker class of gracehooks, which boots each replacement first",
    source="gunicorn's settings, max_requests_jitter",
    advice=True,
)
def max_requests_together(facts: Facts) -> Iterator[Seen]:
    server = facts.server
    if server is None or server.ours or server.workers < 2:
        return
    if server.max_requests and not server.max_requests_jitter:
        requests = server.max_requests
        yield seen(
            "max_requests", str(requests), total=requests * server.workers, jitter=max(1, requests // server.workers)
        )


@rule(
    "worker-tmp-missing",
    finds="a `worker_tmp_dir` that is not there",
    happens="no worker can be made: «{directory} doesn't exist. Can't create workertmp.»",
    moment="at the start",
    cure="make the directory, or remove worker_tmp_dir",
    source="gunicorn/workers/workertmp.py",
)
def worker_tmp_missing(facts: Facts) -> Iterator[Seen]:
    path = facts.server.worker_tmp_dir if facts.server is not None else None
    found = facts.host.directory(path) if facts.host is not None else None
    if path is not None and found is not None and not found.exists:
        yield seen("worker_tmp_dir", path, directory=path)


@rule(
    "ready-path-missing",
    finds="no `ready_path`",
    happens="a release that imports and then answers every request with 500 counts as ready and replaces the old one",
    moment="at an upgrade or a reload",
    cure='gracehooks.configure(ready_path="/healthz"), a path that uses what the application needs',
    source="gracehooks' settings",
    advice=True,
)
def ready_path_missing(facts: Facts) -> Iterator[Seen]:
    if _attached(facts) and facts.settings is not None and facts.settings.ready_path is None:
        yield seen("ready_path", "none")


@rule(
    "probation-zero",
    finds="`probation = 0`",
    happens="a new worker that dies at its first requests is noticed when the old generation is leaving already",
    moment="just after an upgrade or a reload",
    cure="probation = 2 or more",
    source="gracehooks' settings",
    advice=True,
)
def probation_zero(facts: Facts) -> Iterator[Seen]:
    if _attached(facts) and facts.settings is not None and facts.settings.probation == 0:
        yield seen("probation", "0")
