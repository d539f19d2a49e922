"""What a gunicorn would do with a configuration, read and tried in a child process.

A configuration file is code, and so is an application: both run in a child with a process group of its own, a bound in
time and nothing of ours to break, and the whole group is killed afterwards. The parent imports no server; the child is
the one place where `gracehooks check` meets gunicorn (tests/contract/test_reading.py names what is relied upon).
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gracehooks import settings
from gracehooks.deadline import Deadline
from gracehooks.errors import ConfigError
from gracehooks.settings import Settings

__all__ = ["Boot", "Reading", "Request", "Server", "read"]

#: What belongs to a server that runs, not to the one that is asked about.
_NOT_INHERITED = ("GUNICORN_PID", "GUNICORN_FD", "GRACEHOOKS_HANDOVER", "NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS")
#: How long the group may take to be gone once it was killed.
_REAP = 5.0


@dataclass(frozen=True)
class Server:
    """gunicorn's configuration, as it would go by it; times are seconds."""

    version: str = ""
    #: As it is written, and the class that gunicorn takes for it.
    worker_class: str = "gracehooks.Worker"
    worker: str = "gracehooks.gunicorn.workers.thread.Worker"
    #: One of "sync", "thread", "gevent", "asgi", "uvicorn", "tornado", "other".
    kind: str = "thread"
    #: Whether the class is one of ours, and whether gracehooks is in this server at all.
    ours: bool = True
    attached: bool = True
    app: str | None = None
    config: str | None = None
    cwd: str = "/"
    chdir: str = "/"
    bind: tuple[str, ...] = ("127.0.0.1:8000",)
    workers: int = 1
    threads: int = 1
    timeout: int = 30
    graceful_timeout: int = 30
    keepalive: int = 2
    max_requests: int = 0
    max_requests_jitter: int = 0
    preload_app: bool = False
    reload: bool = False
    reuse_port: bool = False
    daemon: bool = False
    pidfile: str | None = None
    worker_tmp_dir: str | None = None
    user: int = 0
    group: int = 0


@dataclass(frozen=True)
class Boot:
    """What became of the application in the child; `failure` is empty where it would become ready."""

    failure: str = ""
    seconds: float = 0.0
    #: Where it stood when its time was up.
    where: str = ""
    #: For each path that a probe asks: what is wrong with the answer, empty where nothing is.
    probes: Mapping[str, str] = field(default_factory=dict)
    #: For each such path: whether it says no while the worker is a lame duck; absent where that is not known.
    says_no: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What to read: gunicorn's arguments, where and with what it would be started."""

    args: tuple[str, ...] = ()
    cwd: str = "."
    #: Variables of the deployment; None takes this process's own environment as it is.
    environ: Mapping[str, str] | None = None
    #: The user that the deployment starts it as; only root can try that.
    user: str | None = None
    boot: bool = True
    probes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What came out: `failure` says why there is no `server` (or no `settings`); `output` is what the child wrote."""

    server: Server | None = None
    settings: Settings | None = None
    failure: str = ""
    boot: Boot | None = None
    output: str = ""


# -- the parent ----------------------------------------------------------------------------------------------------
def read(request: Request, *, timeout: float, boot_timeout: float | None = None) -> Reading:
    """Read the configuration within `timeout` seconds and, where asked, boot the application.

    The boot gets `boot_timeout` seconds, or the `ready_timeout` that was read. Never raises for what the child does.
    """
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "gracehooks.gunicorn.reading", str(write_end), json.dumps(asdict(request))],
            cwd=request.cwd,
            env=_environment(request),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(write_end,),
            start_new_session=True,
        )
        os.close(write_end)
        try:
            lines = _Lines(read_end)
            first = lines.next(Deadline.after(timeout))
            if first is None:
                return _unread(child, output, timeout)
            server, found, failure = _facts(first)
            boot = None
            if request.boot and found is not None:
                limit = found.ready_timeout if boot_timeout is None else boot_timeout
                boot = _boot(child, lines, output, limit)
            return Reading(server, found, failure, boot, _text(output))
        finally:
            os.close(read_end)
            _end(child)


def _environment(request: Request) -> dict[str, str]:
    environ = dict(os.environ)
    if request.environ is not None:
        for name in list(environ):
            if name.startswith(("GRACEHOOKS_", "GUNICORN_")) or name in ("PORT", "WEB_CONCURRENCY"):
                del environ[name]
        environ.update(request.environ)
    for name in _NOT_INHERITED:
        environ.pop(name, None)
    # The child must find this package also where it is not installed for the interpreter, only importable by us.
    ours = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = [each for each in environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    if ours not in path and not any(ours == os.path.abspath(each) for each in sys.path if "site-packages" in each):
        environ["PYTHONPATH"] = os.pathsep.join([*path, ours])
    environ["PYTHONDONTWRITEBYTECODE"] = "1"  # it may run as root, and must leave nothing behind
    return environ


class _Lines:
    """Lines of a pipe, each with a deadline."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""

    def quiet(self, seconds: float) -> bool:
        """Wait so long, or until the child says something or ends; whether it did neither."""
        return not select.select([self._fd], [], [], seconds)[0]

    def next(self, deadline: Deadline) -> dict[str, Any] | None:
        """The next line; None at the end of the pipe or at the deadline."""
        while b"\n" not in self._rest:
            if not select.select([self._fd], [], [], deadline.left())[0]:
                return None
            part = os.read(self._fd, 65536)
            if not part:
                return None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


def _text(output: Any) -> str:
    output.flush()
    size = os.fstat(output.fileno()).st_size
    return os.pread(output.fileno(), min(size, 65536), max(0, size - 65536)).decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else ""


def _ended(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(1.0)  # the pipe has ended or its time is up; a moment for the exit code
    except subprocess.TimeoutExpired:
        return None


def _unread(child: subprocess.Popen[bytes], output: Any, timeout: float) -> Reading:
    code = _ended(child)
    said = _text(output)
    if code is None:
        return Reading(failure=f"reading the configuration was not over after {timeout:g} s", output=said)
    why = _last_line(said) or (f"it ended by signal {-code}" if code < 0 else f"it ended with exit code {code}")
    return Reading(failure=why, output=said)


def _facts(line: Mapping[str, Any]) -> tuple[Server | None, Settings | None, str]:
    said: dict[str, Any] | None = line.get("server")
    server = None
    if said is not None:
        said.update({key: tuple(value) for key, value in said.items() if isinstance(value, list)})
        server = Server(**said)
    found = line.get("settings")
    return server, None if found is None else Settings(**found), str(line.get("failure", ""))


def _boot(child: subprocess.Popen[bytes], lines: _Lines, output: Any, limit: float) -> Boot:
    deadline = Deadline.after(limit)
    line = lines.next(deadline)
    if line is not None:
        return Boot(**line)
    if deadline.passed:
        # faulthandler answers this in the child also where Python code holds still.
        _signal(child, signal.SIGUSR1)
        answer = Deadline.after(1.0)
        while "(most recent call first):" not in _text(output) and lines.quiet(0.05) and not answer.passed:
            pass
        return Boot(f"was not ready within {limit:g} s", limit, _stack(_text(output)))
    code = _ended(child)
    said = _text(output)
    if code is None or code < 0:
        how = "left its pipe" if code is None else f"was ended by signal {-code}"
        return Boot(f"the process {how} while booting", deadline.left())
    why = _last_line(said)
    return Boot(f"exited with code {code} while booting" + (f": {why}" if why else ""))


def _stack(text: str) -> str:
    """The innermost frames of the last traceback that faulthandler wrote, those of the import system left out."""
    frames = [
        line.strip()
        for line in text.rpartition("(most recent call first):")[2].splitlines()
        if line.strip().startswith("File ") and "<frozen " not in line and "gracehooks/gunicorn/reading.py" not in line
    ]
    return "; ".join(frames[:3])


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.kill(child.pid, number)
    except ProcessLookupError:
        pass


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the whole group; the leader is ours to reap, so its pid cannot be anyone else's yet."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        _signal(child, signal.SIGKILL)
    try:
        child.wait(_REAP)
    except subprocess.TimeoutExpired:
        pass  # in the kernel's hands (a dead file server); nothing more can be done for it


# -- the child -----------------------------------------------------------------------------------------------------
def _child(fd: int, request: Mapping[str, Any]) -> None:
    """Read, say; boot, say; end without joining what the application started."""
    import faulthandler

    os.set_inheritable(fd, False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    _become(request["user"])
    application = _load(request["args"])
    line, worker_class = _described(application)
    _say(fd, line)
    if request["boot"] and "settings" in line:
        _say(fd, asdict(_try(application, worker_class, request["probes"])))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _say(fd: int, line: Mapping[str, Any]) -> None:
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def _become(user: str | None) -> None:
    """Become the user that the deployment names, as its supervisor would before the start; only root can."""
    import pwd

    if user is None or os.geteuid() != 0:
        return
    try:
        entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        return  # not a user of this machine; whoever reads the finding is told what was tried
    if not _may_import(entry.pw_uid, entry.pw_gid):
        return  # this interpreter is root's own; the one of the deployment will be another
    os.initgroups(entry.pw_name, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ.update(HOME=entry.pw_dir, USER=entry.pw_name, LOGNAME=entry.pw_name)


def _may_import(uid: int, gid: int) -> bool:
    """Whether the user can read this interpreter's library, gunicorn and us."""
    import gunicorn

    groups = os.getgroups()
    os.setgroups([])
    os.setegid(gid)
    os.seteuid(uid)
    try:
        return all(os.access(path, os.R_OK, effective_ids=True) for path in (os.__file__, gunicorn.__file__, __file__))
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def _load(args: Sequence[str]) -> Any:
    """gunicorn's own application object, its configuration loaded as its command line would; no app is no error."""
    from gunicorn.app.base import Application
    from gunicorn.app.wsgiapp import WSGIApplication

    class Reader(WSGIApplication):
        app_uri: Any

        def do_load_config(self) -> None:
            # gunicorn's own catches what this raises and prints it; the reason is what we are here for.
            self.load_default_config()
            self.load_config()
            validate = getattr(self.cfg, "validate", None)
            if validate is not None:
                validate()

        def load_config(self) -> None:
            Application.load_config(self)
            if self.app_uri is None:
                self.app_uri = self.cfg.wsgi_app

    sys.argv = ["gunicorn", *args]
    try:
        application = Reader("%(prog)s [OPTIONS] [APP_MODULE]", prog="gunicorn")
    except Exception as error:  # noqa: BLE001 - whatever it raises, it is the reason
        sys.exit(f"{type(error).__name__}: {error}")
    cfg = application.cfg
    if cfg.pythonpath:
        for each in cfg.pythonpath.split(","):
            path = os.path.abspath(each)
            if path not in sys.path:
                sys.path.insert(0, path)
    os.environ.update(cfg.env)
    return application


def _described(application: Any) -> tuple[dict[str, Any], type | None]:
    from gunicorn import __version__

    cfg = application.cfg
    if _starts_us(cfg.on_starting):
        from gracehooks.gunicorn import threaded

        threaded.install()
    try:
        worker_class: type = cfg.worker_class
    except BaseException as error:  # noqa: BLE001 - a class that cannot be loaded may raise anything, SystemExit too
        # gunicorn puts the whole traceback between brackets; its last line is the reason
        reason = str(error).rstrip("] \n").rpartition("\n")[2].strip() or type(error).__name__
        return {"failure": f"worker class {cfg.worker_class_str}: {reason}"}, None
    written = cfg.settings["worker_class"].get()
    modules = [base.__module__ for base in worker_class.__mro__]
    ours = any(module.startswith("gracehooks.") for module in modules)
    facts = asdict(
        Server(
            version=__version__,
            worker_class=written if isinstance(written, str) else f"{written.__module__}.{written.__qualname__}",
            worker=f"{worker_class.__module__}.{worker_class.__qualname__}",
            kind=_kind(modules),
            ours=ours,
            attached=ours or _starts_us(cfg.on_starting),
            app=application.app_uri,
            config=_config_file(application),
            cwd=os.getcwd(),
            chdir=cfg.chdir,
            bind=tuple(cfg.bind),
            **{
                name: getattr(cfg, name)
                for name in (
                    "workers",
                    "threads",
                    "timeout",
                    "graceful_timeout",
                    "keepalive",
                    "max_requests",
                    "max_requests_jitter",
                    "preload_app",
                    "reload",
                    "reuse_port",
                    "daemon",
                    "pidfile",
                    "worker_tmp_dir",
                    "user",
                    "group",
                )
            },
        )
    )
    try:
        found = asdict(settings.resolve())
    except ConfigError as error:
        return {"server": facts, "failure": str(error)}, worker_class
    found["on_event"] = None  # a callable does not cross to the parent, and no rule asks for it
    return {"server": facts, "settings": found}, worker_class


def _kind(modules: Sequence[str]) -> str:
    hosts = {
        "gunicorn.workers.gthread": "thread",
        "gunicorn.workers.ggevent": "gevent",
        "gunicorn.workers.gasgi": "asgi",
        "gunicorn.workers.gtornado": "tornado",
        "gunicorn.workers.sync": "sync",
        "uvicorn_worker": "uvicorn",
        "uvicorn.workers": "uvicorn",
    }
    for module in modules:
        for prefix, kind in hosts.items():
            if module.startswith(prefix):
                return kind
    return "other"


def _starts_us(hook: Any) -> bool:
    """Whether the `on_starting` hook is ours, or one of the user's that names it."""
    import gracehooks

    if hook is gracehooks.on_starting:
        return True
    code = getattr(hook, "__code__", None)
    if code is None or ("on_starting" not in code.co_names and "attach" not in code.co_names):
        return False
    names = getattr(hook, "__globals__", {})
    return any(
        getattr(names.get(name), "__name__", "").partition(".")[0] == "gracehooks"
        or getattr(names.get(name), "__module__", "").partition(".")[0] == "gracehooks"
        for name in code.co_names
    )


def _config_file(application: Any) -> str | None:
    from gunicorn.config import get_default_config_file

    cfg = application.cfg
    parser = cfg.parser()
    for args in (sys.argv[1:], cfg.get_cmd_args_from_env()):
        named = parser.parse_known_args(args)[0].config
        if named:
            return str(named)
    default: str | None = get_default_config_file()
    return default


def _try(application: Any, worker_class: type | None, probes: Sequence[str]) -> Boot:
    """Boot as a worker would: its user, its application, its lifespan, `ready_path`, then what the probes ask."""
    import time

    from gunicorn import util

    from gracehooks.gunicorn.workers.attached import is_asgi, reason_of
    from gracehooks.gunicorn.workers.ready import ask_wsgi

    cfg = application.cfg
    started = time.monotonic()
    try:
        if os.geteuid() == 0:
            util.set_owner_process(cfg.uid, cfg.gid, initgroups=cfg.initgroups)
        loaded = application.wsgi()
        if worker_class is not None and is_asgi(worker_class):
            return _Asynchronous(loaded, _lifespan_mode(cfg, worker_class)).try_out(probes, started)
        return _tried(lambda path: ask_wsgi(loaded, path), probes, started)
    except BaseException as error:  # noqa: BLE001 - as gunicorn's own boot does
        import traceback

        traceback.print_exc()
        return Boot(reason_of(error), time.monotonic() - started)


def _tried(ask: Callable[[str], str], probes: Sequence[str], started: float) -> Boot:
    """Ask `ready_path`, then each probe's path twice: as a worker that serves, and as a lame duck."""
    import time

    path = settings.current().ready_path
    failure = ask(path) if path else ""
    seconds = time.monotonic() - started
    if failure:
        return Boot(failure, seconds)
    answers = {each: ask(each) for each in probes}
    return Boot("", seconds, probes=answers, says_no=_as_lame_duck(ask, [each for each in probes if not answers[each]]))


def _as_lame_duck(ask: Callable[[str], str], probes: Sequence[str]) -> dict[str, bool]:
    """Whether the paths say no in a lame duck; this process ends next, so the module's own state may be replaced."""
    if not probes:
        return {}
    vars(importlib.import_module("gracehooks.readiness"))["state"] = lambda: "lame_duck"
    return {each: bool(ask(each)) for each in probes}


def _lifespan_mode(cfg: Any, worker_class: type) -> str:
    """ "auto", "on" or "off", as the class goes by it."""
    options = getattr(worker_class, "CONFIG_KWARGS", None)
    if options is not None:  # uvicorn's
        return str(options.get("lifespan", "auto"))
    return str(cfg.asgi_lifespan) if "asgi_lifespan" in cfg.settings else "auto"


class _Asynchronous:
    """An ASGI application, with its lifespan, asked without a socket (the ASGI specification, HTTP and lifespan)."""

    def __init__(self, loaded: Any, lifespan: str) -> None:
        import asyncio

        self._loaded = loaded
        self._lifespan = lifespan
        self._loop = asyncio.new_event_loop()
        self._state: dict[str, Any] = {}

    def try_out(self, probes: Sequence[str], started: float) -> Boot:
        """Start the lifespan, ask, end the lifespan; what the end does is nobody's readiness."""
        import asyncio
        import time

        run = self._loop.run_until_complete
        asyncio.set_event_loop(self._loop)
        if self._lifespan == "off":
            return _tried(lambda path: run(self._ask(path)), probes, started)
        to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        from_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self._state}

        async def live() -> None:
            await self._loaded(scope, to_app.get, from_app.put)

        task = self._loop.create_task(live())
        to_app.put_nowait({"type": "lifespan.startup"})
        failure = run(self._started(task, from_app))
        if failure:
            return Boot(failure, time.monotonic() - started)
        boot = _tried(lambda path: run(self._ask(path)), probes, started)
        to_app.put_nowait({"type": "lifespan.shutdown"})
        run(asyncio.wait([task], timeout=2.0))
        return boot

    async def _started(self, task: Any, from_app: Any) -> str:
        import asyncio

        first = asyncio.ensure_future(from_app.get())
        await asyncio.wait([task, first], return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            message = first.result()
            if message["type"] == "lifespan.startup.complete":
                return ""
            return f"lifespan startup failed: {message.get('message') or 'the application gave no reason'}"
        first.cancel()
        error = task.exception()
        if error is None or self._lifespan == "auto":
            return ""  # it has no lifespan, which is its right
        return f"lifespan startup raised {type(error).__name__}: {error}"

    async def _ask(self, path: str) -> str:
        from gracehooks.gunicorn.workers.ready import ask_asgi

        return await ask_asgi(self._loaded, path, self._state)


if __name__ == "__main__":
    _child(int(sys.argv[1]), json.loads(sys.argv[2]))
