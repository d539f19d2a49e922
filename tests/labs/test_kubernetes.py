"""A rolling update in Kubernetes, played against real servers: the endpoint goes some seconds after the TERM.

For each pod that serves, a new one is started, added to the endpoints when its readiness path says so, and then the old
one is deleted: at once its preStop hook and, after it, its TERM; its endpoint is removed only `lag` seconds later, and
until then new connections still come; at `terminationGracePeriodSeconds` comes SIGKILL. The numbers are those of the
manifests in examples/, with seconds that last TEST_POD_SECONDS (0.1 by default; 1 plays it in real time).

Each client takes the next endpoint for each new connection, as kube-proxy does. `pytest -s` shows the table;
TEST_FULL=1 plays more lags, with two replicas.
"""

from __future__ import annotations

import http.client
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.kit.server import Server, serve
from tests.kit.waiting import eventually

yaml = pytest.importorskip("yaml")

MANIFESTS = Path(__file__).resolve().parents[2] / "examples/kubernetes"
SECOND = float(os.environ.get("TEST_POD_SECONDS", "0.1"))
LAGS, REPLICAS = ((0, 1, 2, 5, 10), 2) if os.environ.get("TEST_FULL") else ((10,), 1)
#: Requests take up to so many pod seconds, so some are in flight at each TERM.
LONGEST = 2
APP = """
import time
import gracehooks

def site(environ, start_response):
    if environ["PATH_INFO"] == "/work":
        if environ["REQUEST_METHOD"] == "POST":
            open("begun", "w").close()
        time.sleep(float(environ["QUERY_STRING"]))
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]

app = gracehooks.readiness(site)
"""
results: dict[tuple[str, int], tuple[int, int]] = {}


# -- the manifest -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Policy:
    """What decides about a pod's end, in pod seconds."""

    settings: Mapping[str, float]
    pre_stop: float
    grace: float


def policy_of(path: Path) -> Policy:
    deployment = next(each for each in yaml.safe_load_all(path.read_text()) if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    settings = {
        each["name"].removeprefix("GRACEHOOKS_").lower(): float(each["value"])
        for each in container["env"]
        if each["name"].endswith(("_TIMEOUT", "_DUCK"))
    }
    pre_stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    return Policy(settings, pre_stop, pod["terminationGracePeriodSeconds"])


LAME_DUCK = policy_of(MANIFESTS / "deployment.yaml")
POLICIES = {
    "lame_duck": LAME_DUCK,
    "preStop": policy_of(MANIFESTS / "deployment-prestop.yaml"),
    "neither": Policy({**LAME_DUCK.settings, "lame_duck": 0}, 0, LAME_DUCK.grace),
}


# -- the cluster ------------------------------------------------------------------------------------------------------
class Cluster:
    """Pods, the endpoints of their service, and a kubelet that ends pods as a policy says."""

    def __init__(self, policy: Policy, lag: float, stack: ExitStack) -> None:
        self.policy, self.lag, self._stack = policy, lag, stack
        self.endpoints: list[Server] = []
        self.killed = 0
        self._next = itertools.count()
        self._timers: list[threading.Timer] = []

    def endpoint(self) -> Server:
        """Where the next connection goes."""
        endpoints = self.endpoints
        return endpoints[next(self._next) % len(endpoints)]

    def start_pod(self) -> Server:
        """Start a pod; it is an endpoint once its readiness path says so."""
        settings = {name: value * SECOND for name, value in self.policy.settings.items() if name != "ready_timeout"}
        pod = self._stack.enter_context(
            serve(APP, f"gracehooks.configure(**{settings!r})", workers=1, answers="/-/ready")
        )
        eventually(lambda: pod.get("/-/ready").status == 200, what="the pod is ready")
        self.endpoints = [*self.endpoints, pod]
        return pod

    def delete_pod(self, pod: Server) -> None:
        """Delete a pod, as kubelet and endpoint controller do it side by side; returns when it is gone."""
        pid = pod.pid
        gone_by = time.monotonic() + self.policy.grace * SECOND
        self._after(self.lag, lambda: self._remove_endpoint(pod))
        self._after(self.policy.pre_stop, lambda: os.kill(pid, signal.SIGTERM))
        eventually(lambda: not pod.processes() or time.monotonic() >= gone_by, what="the end of the pod")
        for left in pod.processes():
            self.killed += 1
            os.kill(left, signal.SIGKILL)
        for timer in self._timers:
            timer.join()

    def _remove_endpoint(self, pod: Server) -> None:
        self.endpoints = [each for each in self.endpoints if each is not pod]

    def _after(self, seconds: float, what: Any) -> None:
        timer = threading.Timer(seconds * SECOND, what)
        self._timers.append(timer)
        timer.start()


@dataclass
class Clients:
    """A closed loop of clients; every second one keeps its connection for as long as the server does."""

    cluster: Cluster
    answered: int = 0
    lost: list[str] = field(default_factory=list)

    def run(self, number: int = 6) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n % 2 == 0,), daemon=True) for n in range(number)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _client(self, keep: bool) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self._stop.is_set():
            try:
                if connection is None:
                    pod = self.cluster.endpoint()
                    connection = http.client.HTTPConnection("127.0.0.1", pod.port, timeout=60)
                headers = {} if keep else {"Connection": "close"}
                connection.request("GET", f"/work?{random.uniform(0, LONGEST) * SECOND:.4f}", headers=headers)
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200
                self.answered += 1
                if not keep or answer.will_close:
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.lost.append(type(error).__name__)
                connection = None
                self._stop.wait(0.01)


def rolling_update(policy: Policy, lag: float) -> tuple[Clients, Cluster]:
    with ExitStack() as stack:
        cluster = Cluster(policy, lag, stack)
        old = [cluster.start_pod() for _ in range(REPLICAS)]
        clients = Clients(cluster)
        clients.run()
        try:
            eventually(lambda: clients.answered >= 20)
            for each in old:  # maxSurge 1, maxUnavailable 0
                cluster.start_pod()
                cluster.delete_pod(each)
            served = clients.answered
            eventually(lambda: clients.answered >= served + 20)
        finally:
            clients.stop()
        for each in cluster.endpoints:  # all at once; the kit's own end of each would take a lame duck
            each.signal("TERM")
        return clients, cluster


# -- the tests --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    yield
    if not results:
        return
    lags = sorted({lag for _, lag in results})
    print("\n\nrolling update: lost of all requests, by the lag of the endpoint (pod seconds)")
    print(f"{'lag':>14}" + "".join(f"{lag:>18}" for lag in lags))
    for name in POLICIES:
        cells = [results.get((name, lag)) for lag in lags]
        print(f"{name:>14}" + "".join(f"{f'{c[0]} of {c[0] + c[1]}' if c else '':>18}" for c in cells))


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_rolling_update_while_the_endpoint_lags(name, lag):
    clients, cluster = rolling_update(POLICIES[name], lag)
    results[name, lag] = len(clients.lost), clients.answered
    if name == "neither":
        assert clients.lost or lag == 0, "connections that came after the stop should have been refused"
    else:
        assert not clients.lost, clients.lost[:20]
    assert cluster.killed == 0, "a pod was not gone at the end of its grace period"


def test_a_grace_period_that_is_too_short_kills_what_the_drain_would_have_saved():
    """What `kubernetes-grace-period` warns of: TERM, a request of 25 s in flight, and SIGKILL after 10."""
    policy = Policy({**LAME_DUCK.settings, "lame_duck": 0}, 0, 10)
    with ExitStack() as stack:
        cluster = Cluster(policy, 0, stack)
        pod = cluster.start_pod()
        outcome: list[Any] = []

        def ask() -> None:
            try:
                outcome.append(pod.get(f"/work?{25 * SECOND}", method="POST").status)
            except (OSError, http.client.HTTPException) as error:
                outcome.append(error)

        client = threading.Thread(target=ask)
        client.start()
        eventually(lambda: (pod.dir / "begun").exists(), what="the request is in flight")
        cluster.delete_pod(pod)
        client.join(60)
    assert cluster.killed
    assert isinstance(outcome[0], (OSError, http.client.HTTPException))


@pytest.mark.parametrize("version", ["1.34", ""], ids=["1.34", "newest"])
@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_manifests_fit_the_published_schema(path, version):
    validator = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all(path.read_text()):
        validator.validate(document, version or validator.latest_version(), strict=True)
