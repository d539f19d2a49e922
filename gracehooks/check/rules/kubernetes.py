"""Traps in a Kubernetes workload (kubernetes.io: pod lifecycle, probes, Deployments; pkg/kubelet/prober)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gracehooks.check.facts import Facts, Workload
from gracehooks.check.rules import Seen, rule, seen

PAGE = "docs/how-to/kubernetes.md"
#: Kubernetes' own defaults.
GRACE_PERIOD, PERIOD, THRESHOLD = 30, 10, 3


def pre_stop(workload: Workload) -> float:
    """The seconds that a preStop hook sleeps, as far as it can be read."""
    hook = (workload.container.get("lifecycle") or {}).get("preStop") or {}
    if isinstance(hook.get("sleep"), Mapping):
        return _number(hook["sleep"].get("seconds"), 0)
    words = " ".join(str(each) for each in (hook.get("exec") or {}).get("command") or [])
    found = re.search(r"\bsleep\s+([0-9.]+)(s|m)?", words)
    return float(found[1]) * (60 if found[2] == "m" else 1) if found else 0.0


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def _has_pre_stop(workload: Workload) -> bool:
    return bool((workload.container.get("lifecycle") or {}).get("preStop"))


@rule(
    "kubernetes-grace-period",
    finds="`terminationGracePeriodSeconds` shorter than the preStop hook and the stop budget together",
    happens="the kubelet sends SIGKILL: requests and jobs in flight are lost, and nothing is reported",
    moment="{limit:g} s after the pod was deleted, the preStop hook included; the stop may need {whole:g} s",
    cure="terminationGracePeriodSeconds: {wanted}",
    source="kubernetes.io, Termination of Pods: 30 by default, counted from before the preStop hook",
    page=f"{PAGE}#the-grace-period",
)
def grace_period(facts: Facts) -> Iterator[Seen]:
    workload = facts.workload
    if workload is None or facts.settings is None:
        return
    given = workload.pod.get("terminationGracePeriodSeconds")
    limit = _number(given, GRACE_PERIOD)
    whole = pre_stop(workload) + facts.budget
    if limit < pre_stop(workload) + facts.needed:
        says = f"{limit:g}" + ("" if given is not None else " (the default)")
        wanted = math.ceil(pre_stop(workload)) + facts.recommended
        yield seen("terminationGracePeriodSeconds", says, limit=limit, whole=whole, wanted=wanted)


@rule(
    "kubernetes-endpoint-lag",
    finds="neither `lame_duck` nor a preStop hook that sleeps",
    happens="the pod gets its TERM while its endpoint is still being removed everywhere: connections that arrive in those "
    "seconds are refused",
    moment="for some seconds after each pod's TERM: a rollout, a scale-down, a drained node",
    cure='GRACEHOOKS_LAME_DUCK: "10" in the container\'s env (or preStop: sleep: seconds: 10), and a grace period that '
    "holds it",
    source="kubernetes.io, Termination of Pods: endpoint removal and TERM run side by side; tests/labs/test_kubernetes.py",
    page=f"{PAGE}#the-endpoint-lags",
)
def endpoint_lag(facts: Facts) -> Iterator[Seen]:
    workload, settings = facts.workload, facts.settings
    if workload is None or settings is None or _has_pre_stop(workload):
        return
    if not _attached(facts) or settings.lame_duck == 0:
        yield seen("lame_duck", f"{settings.lame_duck:g}" if _attached(facts) else "not there", limit=0)


#: Proxies by the names of their images.
PROXIES = ("nginx", "openresty", "envoy", "haproxy", "caddy", "traefik", "httpd")


@rule(
    "kubernetes-proxy-leaves",
    finds="a proxy beside the server in one pod, without a preStop hook of its own",
    happens="every container gets its TERM at the same time: the proxy closes its port while the server still waits for the "
    "requests that arrive, which are refused",
    moment="for some seconds after each pod's TERM",
    cure="the same preStop sleep in the container {name}; or the proxy as a sidecar (an init container with restartPolicy: "
    "Always), which is ended after the others",
    source="kubernetes.io, Termination of Pods, and Sidecar Containers",
    page=f"{PAGE}#the-endpoint-lags",
)
def proxy_leaves(facts: Facts) -> Iterator[Seen]:
    workload = facts.workload
    for each in (workload.pod.get("containers") or []) if workload is not None else []:
        if workload is None or not isinstance(each, Mapping) or each.get("name") == workload.container.get("name"):
            continue
        image = str(each.get("image") or "").rpartition("/")[2].partition("@")[0].partition(":")[0]
        if image.split("-")[0] in PROXIES and not (each.get("lifecycle") or {}).get("preStop"):
            yield seen("containers", f"{each.get('name')} ({each.get('image')})", name=each.get("name"))


def _attached(facts: Facts) -> bool:
    return facts.server is not None and facts.server.attached


@rule(
    "kubernetes-readiness-missing",
    finds="no `readinessProbe`",
    happens="the pod gets traffic when its process runs, before a worker is ready, and a rollout takes it for good and ends "
    "the old pods",
    moment="at each rollout and each start of a pod",
    cure="readinessProbe: httpGet: path: /-/ready, and gracehooks.readiness(app) round the application",
    source="kubernetes.io, Container probes: without one the state is Success",
    page=f"{PAGE}#the-probes",
)
def readiness_missing(facts: Facts) -> Iterator[Seen]:
    if facts.workload is not None and facts.workload.probe("readiness") is None:
        yield seen("readinessProbe", "not set")


@rule(
    "kubernetes-readiness-path",
    finds="a `readinessProbe` whose path the application does not answer with success",
    happens="the pod never becomes ready: the application {answer}",
    moment="at the first rollout, which then stands still",
    cure="gracehooks.readiness(app, {path!r}) round the application, or the path that it has in the probe",
    source="asked here, in the booted application",
    page=f"{PAGE}#the-probes",
)
def readiness_path(facts: Facts) -> Iterator[Seen]:
    path = facts.workload.path("readiness") if facts.workload is not None else None
    answer = facts.boot.probes.get(path, "") if facts.boot is not None and path is not None else ""
    if answer:
        yield seen("readinessProbe", f"path: {path}", answer=answer, path=path)


@rule(
    "kubernetes-readiness-deaf",
    finds="a `readinessProbe` whose path says yes in the lame duck, too",
    happens="whoever goes by the probe (a load balancer with checks of its own, a mesh, a pod that got its TERM by hand) "
    "learns of the end only when connections are refused",
    moment="in the lame duck",
    cure='gracehooks.readiness(app, "/-/ready") round the application, and path: /-/ready in the probe',
    source="asked here, in the booted application; a pod that is deleted leaves the endpoints whatever its probe says",
    page=f"{PAGE}#the-probes",
    advice=True,
)
def readiness_deaf(facts: Facts) -> Iterator[Seen]:
    path = facts.workload.path("readiness") if facts.workload is not None else None
    if facts.boot is not None and path is not None and facts.boot.says_no.get(path) is False:
        yield seen("readinessProbe", f"path: {path}")


@rule(
    "kubernetes-liveness-readiness",
    finds="a `livenessProbe` on the readiness path",
    happens="the kubelet restarts the container when it only asked for no more traffic: what it had in flight is bounded by "
    "the grace period, and the restart helps nobody",
    moment="{seconds:g} s into a lame duck or a drain that does not come from the pod's deletion (there, the kubelet stops "
    "asking)",
    cure="livenessProbe on a path of its own that answers while the process lives, or tcpSocket",
    source="pkg/kubelet/prober/worker.go, doProbe(); gracehooks/readiness.py",
    page=f"{PAGE}#the-probes",
)
def liveness_readiness(facts: Facts) -> Iterator[Seen]:
    workload = facts.workload
    if workload is None or workload.path("liveness") is None:
        return
    path = workload.path("liveness")
    known = facts.boot.says_no.get(path or "") if facts.boot is not None else None
    same = path == workload.path("readiness") and known is not False
    if same or path == "/-/ready" or known:
        yield seen("livenessProbe", f"path: {path}", seconds=_patience(workload.probe("liveness") or {}))


def _patience(probe: Mapping[str, Any]) -> float:
    """How long a probe may fail before it has a consequence."""
    return _number(probe.get("periodSeconds"), PERIOD) * _number(probe.get("failureThreshold"), THRESHOLD)


@rule(
    "kubernetes-liveness-boot",
    finds="a `livenessProbe` that gives up before `ready_timeout`, and no `startupProbe`",
    happens="the kubelet restarts a container that still boots, again and again",
    moment="{seconds:g} s after its start, where ready_timeout lets it boot for {ready:g} s",
    cure="a startupProbe on the readiness path with failureThreshold: {threshold} and periodSeconds: 2",
    source="kubernetes.io, Container probes: liveness waits for a startupProbe only",
    page=f"{PAGE}#the-probes",
)
def liveness_boot(facts: Facts) -> Iterator[Seen]:
    workload, settings = facts.workload, facts.settings
    probe = workload.probe("liveness") if workload is not None else None
    if probe is None or workload is None or settings is None or workload.probe("startup") is not None:
        return
    if not isinstance(probe.get("httpGet"), Mapping) or not _attached(facts):
        return  # a socket answers from the master's first moment on
    seconds = _number(probe.get("initialDelaySeconds"), 0) + _patience(probe)
    if seconds < settings.ready_timeout:
        ready = settings.ready_timeout
        yield seen("livenessProbe", f"{seconds:g} s", seconds=seconds, ready=ready, threshold=math.ceil(ready / 2))


@rule(
    "kubernetes-startup-short",
    finds="a `startupProbe` that gives up before `ready_timeout`",
    happens="the kubelet restarts a container that still boots, again and again",
    moment="{seconds:g} s after its start, where ready_timeout lets it boot for {ready:g} s",
    cure="failureThreshold: {threshold} with periodSeconds: {period:g}, or a ready_timeout that fits",
    source="kubernetes.io, Container probes",
    page=f"{PAGE}#the-probes",
)
def startup_short(facts: Facts) -> Iterator[Seen]:
    probe = facts.workload.probe("startup") if facts.workload is not None else None
    if probe is None or facts.settings is None or not _attached(facts):
        return
    seconds = _number(probe.get("initialDelaySeconds"), 0) + _patience(probe)
    ready, period = facts.settings.ready_timeout, _number(probe.get("periodSeconds"), PERIOD)
    if seconds < ready:
        threshold = math.ceil(ready / period)
        yield seen("startupProbe", f"{seconds:g} s", seconds=seconds, ready=ready, threshold=threshold, period=period)


@rule(
    "kubernetes-max-unavailable",
    finds="a rolling update that may take every pod at once",
    happens="all {replicas} old pods may be ended before one new pod is ready",
    moment="at each rollout",
    cure="maxUnavailable: 0 and maxSurge: 1",
    source="kubernetes.io, Deployments, Max Unavailable (a percentage is rounded down; the default is 25%)",
    page=f"{PAGE}#the-rolling-update",
)
def max_unavailable(facts: Facts) -> Iterator[Seen]:
    workload = facts.workload
    if workload is None or workload.kind != "Deployment":
        return
    spec = workload.document.get("spec") or {}
    strategy = spec.get("strategy") or {}
    replicas = int(_number(spec.get("replicas"), 1))
    given = (strategy.get("rollingUpdate") or {}).get("maxUnavailable", "25%")
    if strategy.get("type", "RollingUpdate") != "RollingUpdate" or replicas == 0:
        return
    text = str(given)
    many = math.floor(replicas * float(text[:-1]) / 100) if re.fullmatch(r"[0-9.]+%", text) else _number(given, 0)
    if many >= replicas:
        yield seen("maxUnavailable", f"{text} of {replicas}", replicas=replicas)


@rule(
    "kubernetes-recreate",
    finds="`strategy: Recreate`",
    happens="every old pod is ended before a new one is made: connections are refused until the new ones are ready",
    moment="at each rollout",
    cure="strategy: type: RollingUpdate, with maxUnavailable: 0 and maxSurge: 1",
    source="kubernetes.io, Deployments, Recreate Deployment",
    page=f"{PAGE}#the-rolling-update",
)
def recreate(facts: Facts) -> Iterator[Seen]:
    workload = facts.workload
    if workload is None:
        return
    strategy = (workload.document.get("spec") or {}).get("strategy") or {}
    if strategy.get("type") == "Recreate":
        yield seen("strategy", "Recreate")


@rule(
    "kubernetes-shell",
    finds="a container command through a shell that stays in front of the server",
    happens="the shell is PID 1, and the kernel gives PID 1 no signal that it has no handler for: TERM is lost, the server "
    "never learns that it should stop, and all is killed",
    moment="when the grace period is over",
    cure="command: the program and its arguments without a shell, or `exec` before it",
    source="pid_namespaces(7); measured: dash 0.5.12 stays in front of its last command, bash does only in a pipeline",
    page=f"{PAGE}#the-container",
)
def shell(facts: Facts) -> Iterator[Seen]:
    if facts.workload is not None and facts.workload.command.shell:
        yield seen("command", facts.workload.command.text)


@rule(
    "kubernetes-bind-loopback",
    finds="a `bind` on the loopback address only",
    happens="probes and Services come to the pod's own address, where nobody listens: the pod never becomes ready",
    moment="at the first start",
    cure='bind = "0.0.0.0:8000" (or "[::]:8000")',
    source="gunicorn's settings, bind: 127.0.0.1:8000 by default; the kubelet asks the pod's address",
    page=f"{PAGE}#the-container",
)
def bind_loopback(facts: Facts) -> Iterator[Seen]:
    workload, server = facts.workload, facts.server
    if workload is None or server is None or not server.bind:
        return
    containers = workload.pod.get("containers") or []
    alone = len(containers) == 1  # a proxy beside it may well speak to it over the loopback
    if alone and all(re.match(r"(127\.|localhost|\[::1\])", each) for each in server.bind):
        yield seen("bind", ", ".join(server.bind))


@rule(
    "kubernetes-probe-port",
    finds="a probe on a port that the server does not listen on",
    happens="the probe is refused: {consequence}",
    moment="at the first start",
    cure="port: {ports}",
    source="bind and the container's ports, compared here",
    page=f"{PAGE}#the-probes",
)
def probe_port(facts: Facts) -> Iterator[Seen]:
    workload, server = facts.workload, facts.server
    if workload is None or server is None or len(workload.pod.get("containers") or []) != 1:
        return
    ports = sorted({int(each.rpartition(":")[2]) for each in server.bind if re.search(r":[0-9]+$", each)})
    if not ports or len(ports) != len(server.bind):
        return  # a unix socket or a descriptor: something else must stand in front
    named = {
        each.get("name"): each.get("containerPort")
        for each in workload.container.get("ports") or []
        if isinstance(each, Mapping)
    }
    for name in ("readiness", "liveness", "startup"):
        probe = workload.probe(name) or {}
        asked = probe.get("httpGet") or probe.get("tcpSocket") or {}
        port = named.get(asked.get("port"), asked.get("port"))
        if isinstance(port, int) and port not in ports:
            consequence = "the pod never becomes ready" if name == "readiness" else "the container is restarted"
            yield seen(f"{name}Probe", f"port: {port}", consequence=consequence, ports=ports[0])


@rule(
    "kubernetes-read-only-root",
    finds="`readOnlyRootFilesystem` without a writable /tmp",
    happens="no worker can be made: gunicorn keeps each worker's heartbeat in a temporary file",
    moment="at the first start",
    cure="an emptyDir (medium: Memory) mounted on /tmp",
    source="gunicorn/workers/workertmp.py; Python's tempfile",
    page=f"{PAGE}#the-container",
)
def read_only_root(facts: Facts) -> Iterator[Seen]:
    workload, server = facts.workload, facts.server
    if workload is None or not (workload.container.get("securityContext") or {}).get("readOnlyRootFilesystem"):
        return
    mounts = {
        str(each.get("mountPath", "")).rstrip("/")
        for each in workload.container.get("volumeMounts") or []
        if isinstance(each, Mapping) and not each.get("readOnly")
    }
    own = (server.worker_tmp_dir or "") if server is not None else ""
    if not mounts & {"/tmp", "/var/tmp", "/usr/tmp"} and own != "/dev/shm" and own.rstrip("/") not in mounts - {""}:
        yield seen("readOnlyRootFilesystem", "true")


@rule(
    "kubernetes-stop-signal",
    finds="a `stopSignal` that is gracehooks' hammer",
    happens="the server drops every request and job in flight and reports them as lost",
    moment="when a pod is ended",
    cure="remove stopSignal, or SIGTERM",
    source="kubernetes.io, Container lifecycle, stopSignal; gunicorn's signals",
    page=f"{PAGE}#the-container",
)
def stop_signal(facts: Facts) -> Iterator[Seen]:
    if facts.workload is None:
        return
    given = str((facts.workload.container.get("lifecycle") or {}).get("stopSignal") or "")
    if given in ("SIGINT", "SIGQUIT", "SIGKILL"):
        yield seen("stopSignal", given)
