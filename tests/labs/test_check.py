"""`gracehooks check` against seeded traps: each is found, and nothing else; and nothing is found in the examples.

The seeds are real files in a directory of their own, read by the real command; the sound ones that they start from are
the examples of this repository wherever there is one.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from gracehooks import check
from gracehooks.check import deployments
from gracehooks.gunicorn import reading

ROOT = Path(__file__).resolve().parents[2]
APP = """
import gracehooks

def site(environ, start_response):
    known = environ["PATH_INFO"] in ("/", "/healthz")
    start_response("200 OK" if known else "404 Not Found", [("Content-Length", "0")])
    return []

app = gracehooks.readiness(site)
"""
CONF = """
import gracehooks
worker_class = "gracehooks.Worker"
pidfile = "gunicorn.pid"
gracehooks.configure(ready_path="/healthz")
"""
UNIT = {
    "Type": "notify",
    "NotifyAccess": "all",
    "KillMode": "mixed",
    "ExecStart": f"{sys.prefix}/bin/gunicorn app:app",
    "ExecReload": f"{sys.prefix}/bin/gracehooks upgrade --pid $MAINPID",
    "ExecStop": f"-{sys.prefix}/bin/gracehooks stop --pid $MAINPID",
    "Restart": "on-failure",
    "OOMPolicy": "continue",
}
PROGRAM = {
    "command": "gracehooks run -- gunicorn app:app",
    "stopwaitsecs": "70",
    "autorestart": "true",
}
COMPOSE = {
    "command": ["gracehooks", "run", "--", "gunicorn", "--bind=0.0.0.0:8000", "app:app"],
    "image": "app",
    "ports": ["80:8000"],
    "stop_grace_period": "1m10s",
}


def found(capsys, *words: str, boot: bool = False) -> list[str]:
    """The codes of the findings, advice included."""
    code = check.main([*words, *(() if boot else ("--no-boot",)), "--json", "--timeout", "60"])
    said = json.loads(capsys.readouterr().out)
    assert code == (0 if said["clean"] else 1)
    codes = [each["code"] for one in said["checked"] for kind in ("findings", "advice") for each in one[kind]]
    for one in said["checked"]:
        for each in one["findings"] + one["advice"]:
            assert all(each[key] for key in ("where", "says", "happens", "when", "cure", "page")), each
    return codes


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a sound application and configuration, and the writer of its files."""
    monkeypatch.chdir(tmp_path)
    for name in ("GRACEHOOKS_LAME_DUCK", "PORT", "WEB_CONCURRENCY", "GUNICORN_CMD_ARGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "gunicorn.conf.py").write_text(CONF)
    return tmp_path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Such a directory for many tests, and what was read in it so far."""
    directory = tmp_path_factory.mktemp("sound")
    (directory / "app.py").write_text(APP)
    (directory / "gunicorn.conf.py").write_text(CONF)
    return directory, {}


@pytest.fixture
def shelf(sound, monkeypatch):
    """The sound directory; only deployments differ in it, so equal requests are read once."""
    directory, readings = sound
    monkeypatch.chdir(directory)

    def read(request, **limits):
        key = json.dumps(asdict(request))
        if key not in readings:
            readings[key] = reading.read(request, **limits)
        return readings[key]

    monkeypatch.setattr(deployments, "read", read)
    return directory


# -- the server -----------------------------------------------------------------------------------------------------
SERVER = {
    "not-attached": ("worker_class = 'sync'", ["not-attached"]),
    "stock-worker": ("worker_class = 'gthread'; on_starting = gracehooks.on_starting", ["stock-worker"]),
    "stock-worker-own-hook": (
        "worker_class = 'gthread'\ndef on_starting(server):\n    gracehooks.on_starting(server)",
        ["stock-worker"],
    ),
    "sync-threads-own-class": ("worker_class = 'site.MySyncWorker'; threads = 4", ["sync-threads"]),
    "reuse-port": ("reuse_port = True", ["reuse-port"]),
    "reload": ("reload = True", ["reload-on"]),
    "timeout-zero": ("timeout = 0", ["timeout-zero"]),
    "timeout-sync": (
        "worker_class = 'gracehooks.SyncWorker'; gracehooks.configure(drain_timeout=90)",
        ["timeout-cuts-requests"],
    ),
    "graceful-timeout": ("graceful_timeout = 10", ["graceful-timeout-ignored"]),
    "drain-zero": ("gracehooks.configure(drain_timeout=0)", ["drain-zero"]),
    "job-grace": ("gracehooks.configure(job_timeout=20, job_grace=20)", ["job-grace-whole"]),
    "pidfile-missing": ("pidfile = '/run/no-such-place/app.pid'", ["pidfile-missing-directory"]),
    "pidfile-shared": ("pidfile = '/tmp/app.pid'", ["pidfile-shared"]),
    "state-dir": ("gracehooks.configure(state_dir='/etc/passwd/state')", ["state-dir-unwritable"]),
    "max-requests-alone": (
        "worker_class = 'gthread'; max_requests = 100",
        ["not-attached", "max-requests-alone"],
    ),
    "max-requests-together": (
        "worker_class = 'gthread'; max_requests = 100; workers = 4",
        ["not-attached", "max-requests-together"],
    ),
    "worker-tmp": ("worker_tmp_dir = '/no-such-place'", ["worker-tmp-missing"]),
    "no-ready-path": ("gracehooks.configure(ready_path=None)", ["ready-path-missing"]),
    "no-probation": ("gracehooks.configure(probation=0)", ["probation-zero"]),
    "setting-out-of-range": ("gracehooks.configure(drain_timeout=-1)", ["config-unreadable"]),
    "syntax": ("this is no python", ["config-unreadable"]),
    "no-such-class": ("worker_class = 'gracehooks.NoSuchWorker'", ["config-unreadable"]),
}


@pytest.mark.parametrize(("line", "codes"), SERVER.values(), ids=SERVER)
def test_a_trap_in_the_configuration_is_found(place, capsys, line, codes):
    with open(place / "gunicorn.conf.py", "a") as file:
        file.write(line + "\n")
    assert found(capsys, "app:app") == codes


@pytest.mark.parametrize(
    ("more", "replaced"),
    [("", True), ("on_starting = gracehooks.on_starting", False), ("gracehooks.configure(drain_timeout=20)", False)],
)
def test_a_sync_worker_with_threads_is_found_where_ours_is_never_loaded(place, capsys, more, replaced):
    lines = [
        "import gracehooks",
        "worker_class = 'gracehooks.SyncWorker'",
        "threads = 4",
        "pidfile = 'gunicorn.pid'",
        more,
    ]
    (place / "gunicorn.conf.py").write_text("\n".join(lines))
    assert ("sync-threads" in found(capsys, "app:app")) == replaced


def test_a_start_inside_one_release_is_found(place, capsys):
    release = place / "releases" / "42"
    release.mkdir(parents=True)
    (place / "current").symlink_to("releases/42")
    for name in ("app.py", "gunicorn.conf.py"):
        shutil.copy(place / name, release)
    current = str(place / "current")
    assert found(capsys, "--unit", unit(place, WorkingDirectory=str(release))) == ["release-resolved"]
    # Behind the symlink, but nobody says by which name: the kernel names the release.
    assert found(capsys, "--unit", unit(place, WorkingDirectory=current)) == ["start-directory-resolved"]
    assert found(capsys, "--unit", unit(place, WorkingDirectory=current, Environment=f"PWD={current}")) == []
    assert found(capsys, "--supervisor", section(place, directory=current)) == ["start-directory-resolved"]
    assert found(capsys, "--supervisor", section(place, directory=current, environment=f'PWD="{current}"')) == []


# -- the boot -------------------------------------------------------------------------------------------------------
def test_the_application_is_booted_once_and_within_its_bound(place, capsys):
    assert found(capsys, "app:app", boot=True) == []
    (place / "broken.py").write_text("import no_such_module")
    assert found(capsys, "broken:app", boot=True) == ["boot-failed"]
    (place / "hung.py").write_text("import time, subprocess\nsubprocess.Popen(['sleep', '3600'])\ntime.sleep(3600)")
    assert check.main(["hung:app", "--timeout", "4"]) == 1
    said = capsys.readouterr().out
    assert "was not ready within 4 s" in said
    assert 'hung.py", line 3' in said


# -- systemd --------------------------------------------------------------------------------------------------------
def unit(place: Path, **changes: str | None) -> str:
    lines = {**UNIT, "WorkingDirectory": str(place), **changes}
    path = place / "app.service"
    path.write_text("[Service]\n" + "".join(f"{key}={value}\n" for key, value in lines.items() if value is not None))
    return str(path)


SYSTEMD = {
    "type-simple": ({"Type": "simple", "NotifyAccess": None}, ["systemd-type"]),
    "type-exec": ({"Type": "exec"}, ["systemd-type"]),
    "type-forking": ({"Type": "forking"}, ["systemd-type"]),
    "notify-access": ({"NotifyAccess": None}, ["systemd-notify-access"]),
    "kill-mode-default": ({"KillMode": None}, ["systemd-kill-mode"]),
    "kill-mode-process": ({"KillMode": "process"}, ["systemd-kill-mode"]),
    "kill-mode-none": ({"KillMode": "none"}, ["systemd-kill-mode"]),
    "kill-signal": ({"KillSignal": "SIGQUIT"}, ["systemd-kill-signal"]),
    "no-exec-stop": ({"ExecStop": None}, ["systemd-stop-unwaited"]),
    "stop-timeout": (
        {"Type": "simple", "NotifyAccess": None, "TimeoutStopSec": "5"},
        ["systemd-type", "systemd-stop-timeout"],
    ),
    "stop-extended": ({"TimeoutStopSec": "5"}, ["systemd-stop-extended"]),
    "timeout-sec": ({"TimeoutSec": "1min"}, ["systemd-stop-extended"]),
    "start-timeout": (
        {"TimeoutStartSec": "20", "ExecStart": f"{sys.prefix}/bin/gunicorn --preload app:app"},
        ["systemd-start-timeout"],
    ),
    "no-reload": ({"ExecReload": None}, ["systemd-reload-missing"]),
    "blind-reload": ({"ExecReload": "/bin/kill -s HUP $MAINPID"}, ["systemd-reload-blind"]),
    "impatient-reload": ({"ExecReload": "/venv/bin/gracehooks upgrade --no-wait"}, ["systemd-reload-blind"]),
    "no-restart": ({"Restart": None}, ["systemd-restart"]),
    "restart-on-success": ({"Restart": "on-success"}, ["systemd-restart"]),
    "oom": ({"OOMPolicy": None}, ["systemd-oom-policy"]),
    "shell": ({"ExecStart": "/bin/sh -c 'cd /srv && gunicorn app:app'"}, ["systemd-shell"]),
    "daemon": ({"ExecStart": f"{sys.prefix}/bin/gunicorn --daemon app:app"}, ["daemon"]),
    "pidfile": ({"Type": "forking", "PIDFile": "/run/other.pid"}, ["systemd-type", "systemd-pidfile-differs"]),
    "protect-system": ({"ProtectSystem": "strict"}, ["systemd-read-only"]),
    "protect-home": (
        {"ProtectHome": "yes", "ExecStart": f"{sys.prefix}/bin/gunicorn --pid /root/app.pid app:app"},
        ["systemd-read-only"],
    ),
    "environment": ({"Environment": "GRACEHOOKS_DRAIN_TIMEOUT=x"}, ["config-unreadable"]),
    "private-tmp": (
        {"PrivateTmp": "true", "ExecStart": f"{sys.prefix}/bin/gunicorn -k gracehooks.Worker -c python:email app:app"},
        ["systemd-private-tmp", "ready-path-missing"],
    ),
    "runtime-directory": (
        {"RuntimeDirectory": "app", "ExecStart": f"{sys.prefix}/bin/gunicorn --pid /run/app/app.pid app:app"},
        ["systemd-runtime-directory"],
    ),
}


def test_a_sound_unit_is_clean(shelf, capsys):
    assert found(capsys, "--unit", unit(shelf)) == []
    assert found(capsys, "--unit", unit(shelf, Type="notify-reload", ExecReload=None)) == []
    sealed = {"ProtectSystem": "strict", "ReadWritePaths": str(shelf)}
    assert found(capsys, "--unit", unit(shelf, **sealed)) == []
    bash = "/bin/bash -c 'cd . && gunicorn app:app'"  # bash replaces itself
    assert found(capsys, "--unit", unit(shelf, ExecStart=bash)) == []
    anchored = f"{sys.prefix}/bin/gracehooks run -- {sys.prefix}/bin/gunicorn app:app"
    assert found(capsys, "--unit", unit(shelf, ExecStart=anchored, ExecStop=None)) == [], "the anchor is waited for"


@pytest.mark.parametrize(("changes", "codes"), SYSTEMD.values(), ids=SYSTEMD)
def test_a_trap_in_a_unit_is_found(shelf, capsys, changes, codes):
    assert found(capsys, "--unit", unit(shelf, **changes)) == codes


# -- supervisord ----------------------------------------------------------------------------------------------------
def section(place: Path, **changes: str | None) -> str:
    lines = {**PROGRAM, "directory": str(place), **changes}
    path = place / "supervisord.conf"
    text = "".join(f"{key}={value}\n" for key, value in lines.items() if value is not None)
    path.write_text(f"[supervisord]\nnodaemon=true\n\n[program:beat]\ncommand=celery beat\n\n[program:app]\n{text}")
    return str(path)


SUPERVISORD = {
    "no-anchor": ({"command": "gunicorn app:app"}, ["supervisord-no-anchor"]),
    "stop-wait": ({"stopwaitsecs": None}, ["supervisord-stop-wait"]),
    "stop-wait-own-budget": ({"environment": 'GRACEHOOKS_JOB_TIMEOUT="300"'}, ["supervisord-stop-wait"]),
    "stop-signal": ({"stopsignal": "INT"}, ["supervisord-stop-signal"]),
    "shell": (
        {"command": "sh -c 'gracehooks run -- gunicorn app:app'"},
        ["supervisord-shell"],
    ),
    "kill-group": ({"stopasgroup": "true", "killasgroup": "false"}, ["supervisord-kill-group"]),
    "no-restart": ({"autorestart": "false"}, ["supervisord-restart"]),
    "daemon": ({"command": "gracehooks run -- gunicorn --daemon app:app"}, ["daemon"]),
    "numprocs": ({"numprocs": "2", "process_name": "app_%(process_num)02d"}, ["supervisord-numprocs"]),
    "numprocs-state": (
        {
            "numprocs": "2",
            "command": "gracehooks run -- gunicorn --pid app%(process_num)d.pid app:app",
            "environment": "GRACEHOOKS_STATE_DIR=/run",
        },
        ["supervisord-numprocs"],
    ),
}


def test_a_sound_section_is_clean(shelf, capsys):
    assert found(capsys, "--supervisor", section(shelf)) == []
    assert found(capsys, "--supervisor", section(shelf, stopasgroup="true")) == []
    many = "gracehooks run -- gunicorn --pid app-%(process_num)02d.pid -b 127.0.0.1:80%(process_num)02d app:app"
    assert found(capsys, "--supervisor", section(shelf, numprocs="4", command=many)) == []


@pytest.mark.parametrize(("changes", "codes"), SUPERVISORD.values(), ids=SUPERVISORD)
def test_a_trap_in_a_section_is_found(shelf, capsys, changes, codes):
    assert found(capsys, "--supervisor", section(shelf, **changes)) == codes


# -- Kubernetes -----------------------------------------------------------------------------------------------------
DEPLOYMENT = next(yaml.safe_load_all((ROOT / "examples/kubernetes/deployment.yaml").read_text()))


def manifest(place: Path, change) -> str:
    document = copy.deepcopy(DEPLOYMENT)
    pod = document["spec"]["template"]["spec"]
    change(document["spec"], pod, pod["containers"][0])
    path = place / "deployment.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def without(container, name):
    container["env"] = [each for each in container["env"] if each["name"] != name]


def put(values, **changes):
    values.update(changes)


def proxied(pod, **lifecycle):
    pod["containers"].append({"name": "front", "image": "docker.io/nginx:1.27-alpine", **lifecycle})


KUBERNETES = {
    "proxy": (lambda _, pod, c: proxied(pod), ["kubernetes-proxy-leaves"]),
    "proxy-that-waits": (lambda _, pod, c: proxied(pod, lifecycle={"preStop": {"sleep": {"seconds": 10}}}), []),
    "grace-period-default": (lambda _, pod, c: pod.pop("terminationGracePeriodSeconds"), ["kubernetes-grace-period"]),
    "grace-period-pre-stop": (
        lambda _, pod, c: put(c, lifecycle={"preStop": {"exec": {"command": ["sh", "-c", "sleep 15"]}}}),
        ["kubernetes-grace-period"],
    ),
    "endpoint-lag": (lambda _, pod, c: without(c, "GRACEHOOKS_LAME_DUCK"), ["kubernetes-endpoint-lag"]),
    "no-readiness": (lambda _, pod, c: c.pop("readinessProbe"), ["kubernetes-readiness-missing"]),
    "liveness-readiness": (
        lambda _, pod, c: put(c["livenessProbe"]["httpGet"], path="/-/ready"),
        ["kubernetes-liveness-readiness"],
    ),
    "liveness-boot": (
        lambda _, pod, c: (c.pop("startupProbe"), put(c["livenessProbe"], failureThreshold=3)),
        ["kubernetes-liveness-boot"],
    ),
    "startup-short": (
        lambda _, pod, c: put(c["startupProbe"], failureThreshold=5),
        ["kubernetes-startup-short"],
    ),
    "max-unavailable": (
        lambda spec, pod, c: put(spec["strategy"]["rollingUpdate"], maxUnavailable="100%"),
        ["kubernetes-max-unavailable"],
    ),
    "max-unavailable-one": (
        lambda spec, pod, c: (put(spec, replicas=1), put(spec["strategy"]["rollingUpdate"], maxUnavailable=1)),
        ["kubernetes-max-unavailable"],
    ),
    "recreate": (lambda spec, pod, c: put(spec, strategy={"type": "Recreate"}), ["kubernetes-recreate"]),
    "shell": (
        lambda _, pod, c: put(c, command=["/bin/sh", "-c", " ".join(c["command"])]),
        ["kubernetes-shell"],
    ),
    "loopback": (
        lambda _, pod, c: put(c, command=[each for each in c["command"] if "bind" not in each]),
        ["kubernetes-bind-loopback"],
    ),
    "probe-port": (
        lambda _, pod, c: put(c["readinessProbe"]["httpGet"], port=9000),
        ["kubernetes-probe-port"],
    ),
    "read-only-root": (lambda _, pod, c: c.pop("volumeMounts"), ["kubernetes-read-only-root"]),
    "stop-signal": (
        lambda _, pod, c: put(c, lifecycle={"stopSignal": "SIGQUIT"}),
        ["kubernetes-stop-signal"],
    ),
    "daemon": (lambda _, pod, c: c["command"].insert(1, "--daemon"), ["daemon"]),
}


@pytest.mark.parametrize(("change", "codes"), KUBERNETES.values(), ids=KUBERNETES)
def test_a_trap_in_a_manifest_is_found(shelf, capsys, change, codes):
    assert found(capsys, "--manifest", manifest(shelf, change)) == codes


def test_probes_are_asked_of_the_booted_application(place, capsys):
    (place / "gunicorn.conf.py").unlink()

    def elsewhere(_, pod, container):
        put(container["readinessProbe"]["httpGet"], path="/ready")

    def deaf(_, pod, container):
        put(container["readinessProbe"]["httpGet"], path="/healthz")

    assert found(capsys, "--manifest", manifest(place, elsewhere), boot=True) == ["kubernetes-readiness-path"]
    assert found(capsys, "--manifest", manifest(place, deaf), boot=True) == ["kubernetes-readiness-deaf"]


# -- containers -----------------------------------------------------------------------------------------------------
def compose(place: Path, **changes) -> str:
    service = {key: value for key, value in {**COMPOSE, **changes}.items() if value is not None}
    path = place / "compose.yaml"
    path.write_text(yaml.safe_dump({"services": {"app": service, "cache": {"image": "redis"}}}))
    return str(path)


CONTAINERS = {
    "stop-grace": ({"stop_grace_period": None}, ["container-stop-grace"]),
    "stop-signal": ({"stop_signal": "SIGINT"}, ["container-stop-signal"]),
    "shell": ({"command": ["sh", "-c", "gunicorn --bind=0.0.0.0:8000 app:app"]}, ["container-shell"]),
    "no-anchor": ({"command": "gunicorn --bind=0.0.0.0:8000 app:app"}, ["container-no-anchor"]),
    "loopback": ({"command": "gracehooks run -- gunicorn app:app"}, ["container-bind-loopback"]),
}


@pytest.mark.parametrize(("changes", "codes"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_trap_in_a_compose_file_is_found(shelf, capsys, changes, codes):
    assert found(capsys, "--manifest", compose(shelf, **changes)) == codes


def test_a_sound_compose_file_is_clean(shelf, capsys):
    assert found(capsys, "--manifest", compose(shelf)) == []


def test_traps_in_a_dockerfile_are_found(shelf, capsys):
    path = shelf / "Dockerfile"
    path.write_text("FROM python:3.13\nSTOPSIGNAL SIGQUIT\nCMD gunicorn -b 0.0.0.0:8000 app:app\n")
    assert found(capsys, "--manifest", str(path)) == ["container-stop-signal", "container-shell"]
    path.write_text(
        'FROM python:3.13\nCMD ["gracehooks", "run", "--", "gunicorn", \\\n "-b", "0.0.0.0:8000", "app:app"]\n'
    )
    assert found(capsys, "--manifest", str(path)) == []


# -- the examples ---------------------------------------------------------------------------------------------------
def test_the_examples_are_clean(place, capsys):
    examples = ROOT / "examples"
    (place / "gunicorn.conf.py").unlink()
    for path in sorted((examples / "kubernetes").glob("*.yaml")):
        assert found(capsys, "--manifest", str(path), boot=True) == [], path
    shutil.copy(examples / "gunicorn.conf.py", place)
    assert found(capsys, "app:app", boot=True) == []
    for path in sorted(examples.glob("systemd/*.service")):
        conf = path.parent / "gunicorn.conf.py"
        here = place / path.name  # without its user, who may see neither this directory nor this interpreter
        here.write_text(without_user(path))
        assert traps(capsys, "--unit", str(here), "-c", str(conf)) == [], path
    for path in sorted(examples.rglob("supervisord*.conf")):
        here = place / path.name
        here.write_text(without_user(path))
        assert traps(capsys, "--supervisor", str(here)) == [], path
    for path in [*examples.rglob("compose*.y*ml"), *examples.rglob("Dockerfile")]:
        assert traps(capsys, "--manifest", str(path)) == [], path


def without_user(path: Path) -> str:
    return re.sub(r"(?mi)^(user|group)=.*\n", "", path.read_text())


def traps(capsys, *words: str) -> list[str]:
    check.main([*words, "--no-boot", "--json"])
    said = json.loads(capsys.readouterr().out)
    return [each["code"] for one in said["checked"] for each in one["findings"]]


# -- usage ----------------------------------------------------------------------------------------------------------
def test_what_cannot_be_read_is_wrong_usage(place, capsys):
    assert check.main(["--unit", "no-such.service"]) == 2
    (place / "helm.yaml").write_text("{{ if .Values }}\nkind: {{ x }}\n{{ end }}\n")
    assert check.main(["--manifest", "helm.yaml"]) == 2
    assert "render a template first" in capsys.readouterr().err
    (place / "both.conf").write_text("[program:a]\ncommand=gunicorn a\n[program:b]\ncommand=gunicorn b\n")
    assert check.main(["--supervisor", "both.conf"]) == 2
    assert "--program: a, b" in capsys.readouterr().err
