"""Two servers from the chart's own manifests, rolled, scaled to three and back, one killed, all under the SDK's calls.

    python -m benchmarks.rehearsal          # about eight minutes; `make rehearse` runs it

What is real: helm's rendering, the program with the manifests' command, settings and variables, its health service, TLS
and tokens, the SDK with DNS and turns, Prometheus with the chart's rules. What is played: the kubelet, the Deployment's
controller, the DNS of a headless Service, cert-manager. No container: no other user, no read-only root, no limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.places import DOCS, RESULTS, ROOT
from benchmarks.rehearsal.cluster import Cluster
from benchmarks.rehearsal.figure import draw
from benchmarks.rehearsal.manifests import NAMESPACE, RELEASE, certificate, render
from benchmarks.rehearsal.names import Names
from benchmarks.rehearsal.prometheus import Prometheus, decide
from turbolens_server.rpc.tokens import make_token

VALUES: dict[str, Any] = {
    "resources": {"limits": {"cpu": "1"}},
    # All pods share two cores here, and not with themselves alone.
    "timing": {"startupSeconds": 300},
    "tls": {"enabled": True, "certManager": {"enabled": True, "issuer": "ours"}},
    "auth": {"existingSecret": "tokens"},
    "settings": {"model": "mini", "max_queue_pictures": 256, "max_connection_age_s": 20},
}
SCALING = {
    "kind": "keda",
    "min": 1,
    "max": 4,
    "prometheus": "http://prometheus",
    "queueWaitSeconds": 0.5,
    "picturesPerSecond": 3,
}
CALLERS = 2
"""Processes that call, each with a channel of its own."""


class Callers:
    """Processes that call with the SDK, and all that they have seen."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._processes: list[asyncio.subprocess.Process] = []
        self._reading: list[asyncio.Task[None]] = []
        self.calls: list[dict[str, Any]] = []
        self.rate = 0.0

    async def start(self) -> None:
        """Start them; they begin slowly."""
        for _ in range(CALLERS):
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._processes.append(process)
            self._reading.append(asyncio.create_task(self._read(process)))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self.calls.append(json.loads(line))

    def set_rate(self, rate: float) -> None:
        """Calls a second from now on, of all together."""
        self.rate = rate
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{rate / CALLERS}\n".encode())

    async def stop(self) -> None:
        """Let them end, once every call has."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()
        await asyncio.gather(*self._reading)


class Rehearsal:
    """The story, and what is written down of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start = time.time()
        self.phases: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.watched: list[dict[str, Any]] = []
        scaled = render({**VALUES, "autoscaling": SCALING})
        self.scaler = scaled.one("ScaledObject")["spec"]
        self.manifests = render(VALUES)
        self.secrets = {
            f"{RELEASE}-turbolens-tls": certificate(self.manifests.one("Certificate")["spec"]["dnsNames"], folder)
        }

    def log(self, text: str) -> None:
        """Say what happened, and when."""
        at = round(time.time() - self.start, 1)
        self.events.append({"at": at, "what": text})
        print(f"{at:6.1f} s  {text}", file=sys.stderr)

    async def run(self) -> dict[str, Any]:
        """All of it, in order."""
        token = self._tokens()
        cluster = Cluster(self.manifests, self.secrets, self.folder, self.log)
        service = f"{RELEASE}-turbolens.{NAMESPACE}.svc"
        port = self.manifests.one("Service", f"{RELEASE}-turbolens")["spec"]["ports"][0]["port"]
        names = Names(service, cluster.addresses)
        dns_port = await names.start("127.0.0.1")
        callers = Callers([
            sys.executable, "-m", "benchmarks.rehearsal.load", "--target", f"dns://127.0.0.1:{dns_port}/{service}:{port}",
            "--ca", str(self.folder / "ca.crt"), "--token", token, "--rate", "0.5",
        ])  # fmt: skip
        prometheus = Prometheus(self.folder, interval_s=5)
        await prometheus.start(dns_port % 10_000 + 20_000)
        watching = asyncio.create_task(self._watch(cluster, prometheus, callers))
        try:
            async with self._phase("start", callers, cluster, prometheus):
                await cluster.reconcile()
                await callers.start()
            async with self._phase("two pods", callers, cluster, prometheus):
                callers.set_rate(1.5)
                await asyncio.sleep(45)
            async with self._phase("rolled to new settings", callers, cluster, prometheus):
                cluster.manifests = render({**VALUES, "settings": {**VALUES["settings"], "max_queue_pictures": 200}})
                await cluster.reconcile()
            async with self._phase("scaled to three", callers, cluster, prometheus):
                cluster.replicas = 3
                await cluster.reconcile()
                await asyncio.sleep(20)
            async with self._phase("back to two", callers, cluster, prometheus):
                cluster.replicas = 2
                await cluster.reconcile()
                await asyncio.sleep(5)
            async with self._phase("one killed", callers, cluster, prometheus):
                cluster.pods[0].kill()
                await asyncio.sleep(1)
                await cluster.reconcile()
                await asyncio.sleep(10)
            async with self._phase("too much", callers, cluster, prometheus):
                await self._overload(callers, prometheus)
            async with self._phase("quiet", callers, cluster, prometheus):
                callers.set_rate(0.3)
                await asyncio.sleep(150)
        finally:
            await callers.stop()
            watching.cancel()
            await cluster.close()
            await prometheus.stop()
        return self._result(callers, cluster, names)

    def _tokens(self) -> str:
        """A token, and the file of its hash, as the program makes them."""
        token, digest = make_token()
        entry = f'[[token]]\nname = "rehearsal"\nsha256 = "{digest}"\nscopes = ["generate"]\n'
        self.secrets["tokens"] = {"tokens": entry}
        return token

    @contextlib.asynccontextmanager
    async def _phase(
        self, name: str, callers: Callers, cluster: Cluster, prometheus: Prometheus
    ) -> AsyncIterator[None]:
        """Write down what came of the calls of a phase, and what the autoscaler would do at its end."""
        self.log(f"== {name}")
        begin = time.time()
        before = await self._pictures(prometheus)
        yield
        after = await self._pictures(prometheus)
        # A count that is less than it was has begun anew.
        made = {pod: round(n - before.get(pod, 0) if n >= before.get(pod, 0) else n) for pod, n in after.items()}
        triggers = self.scaler["triggers"]
        values = [await prometheus.value(trigger["metadata"]["query"]) for trigger in triggers]
        replicas = len(cluster.addresses())
        wanted = decide(replicas, triggers, values, self.scaler["minReplicaCount"], self.scaler["maxReplicaCount"])
        self.phases.append({
            "name": name, "from": round(begin - self.start, 1), "to": round(time.time() - self.start, 1),
            "pictures": made,
            "rate": callers.rate, "ready": replicas, "wanted": max(wanted),
            "triggers": {
                trigger["name"]: {"value": round(value, 4), "wants": count}
                for trigger, value, count in zip(triggers, values, wanted, strict=True)
            },
        })  # fmt: skip
        self.log(
            f"   {self.phases[-1]['triggers']}: {replicas} ready, {max(wanted)} wanted; {self.phases[-1]['pictures']}"
        )

    async def _pictures(self, prometheus: Prometheus) -> dict[str, float]:
        """What each pod has made so far, by its own count."""
        samples = await prometheus.ask("sum by (pod) (turbolens_batch_size_sum)")
        return {one["metric"]["pod"]: float(one["value"][1]) for one in samples}

    async def _overload(self, callers: Callers, prometheus: Prometheus) -> None:
        """More and more calls, until one in twenty waits for longer than the autoscaler aims at."""
        aim = float(self.scaler["triggers"][0]["metadata"]["threshold"])
        for rate in (3, 6, 9, 12):
            callers.set_rate(rate)
            for _ in range(5):
                await asyncio.sleep(5)
                if await prometheus.value(self.scaler["triggers"][0]["metadata"]["query"]) > 2 * aim:
                    return

    async def _watch(self, cluster: Cluster, prometheus: Prometheus, callers: Callers) -> None:
        """Tell Prometheus of the pods, and write down how many are ready, every second."""
        port = next(p["containerPort"] for p in self.manifests.pod["containers"][0]["ports"] if p["name"] == "metrics")
        while True:
            prometheus.tell([(pod.name, f"{pod.address}:{port}") for pod in cluster.pods])
            self.watched.append({
                "at": round(time.time() - self.start, 1), "ready": len(cluster.addresses()), "pods": len(cluster.pods),
                "rate": callers.rate,
            })  # fmt: skip
            await asyncio.sleep(1)

    def _result(self, callers: Callers, cluster: Cluster, names: Names) -> dict[str, Any]:
        calls = [{**call, "at": round(call["at"] - self.start, 2)} for call in callers.calls]
        for phase in self.phases:
            took = [call["s"] for call in calls if phase["from"] <= call["at"] < phase["to"]]
            phase["calls"] = len(took)
            phase["failed"] = sum(bool(c["error"]) for c in calls if phase["from"] <= c["at"] < phase["to"])
            phase |= {f"p{q}_s": round(float(np.quantile(took, q / 100)), 3) if took else None for q in (50, 99)}
        pods = [*cluster.gone, *cluster.pods]
        return {
            "benchmark": "rehearsal", "calls": len(calls), "failed": [call for call in calls if call["error"]],
            "killed_at_the_end_of_their_grace": sum(pod.killed for pod in pods), "dns_questions": names.asked,
            "restarts": sum(pod.restarts for pod in pods), "phases": self.phases, "events": self.events,
            "watched": self.watched, "latencies": [[call["at"], call["s"]] for call in calls],
        }  # fmt: skip


def main(out: Path = RESULTS / "rehearsal.json", figure: Path = DOCS / "deployment/rehearsal.png") -> None:
    """Rehearse and write; exit with 1 where a call failed.

    Args:
        out: JSON file to write.
        figure: picture to draw.
    """
    with tempfile.TemporaryDirectory(prefix="turbolens-rehearsal-") as folder:
        result = asyncio.run(Rehearsal(Path(folder)).run())
    out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, figure)
    for phase in result["phases"]:
        print(f"{phase['name']:24}{phase['calls']:5} calls, {phase['failed']} failed, p50 {phase['p50_s']} s, "
              f"p99 {phase['p99_s']} s; {phase['ready']} ready, {phase['wanted']} wanted")  # fmt: skip
    print(f"{result['calls']} calls, {len(result['failed'])} failed; figure {figure.relative_to(ROOT)}")
    if result["failed"] or result["killed_at_the_end_of_their_grace"]:
        sys.exit(str(result["failed"][:3]))


if __name__ == "__main__":
    tyro.cli(main)
