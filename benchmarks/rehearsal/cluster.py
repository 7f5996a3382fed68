"""A Deployment: so many pods of the newest manifests, replaced one by one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from pathlib import Path

from benchmarks.rehearsal.manifests import Manifests
from benchmarks.rehearsal.pods import Log, Pod


class Cluster:
    """Brings pods to what the manifests say."""

    def __init__(self, manifests: Manifests, secrets: Mapping[str, Mapping[str, str]], folder: Path, log: Log) -> None:
        self.manifests = manifests
        self.replicas: int = manifests.deployment["spec"]["replicas"]
        self.pods: list[Pod] = []
        self.gone: list[Pod] = []
        self._secrets, self._folder, self._log = secrets, folder, log
        self._numbers = itertools.count(1)
        self._ending: set[asyncio.Task[None]] = set()

    def addresses(self) -> list[str]:
        """Of the ready pods: the endpoints of the headless Service."""
        return [pod.address for pod in self.pods if pod.ready and not pod.terminating]

    async def reconcile(self) -> None:
        """Until there are as many ready pods as wanted, all of the newest manifests.

        At each moment at most `replicas + maxSurge` pods, and at least `replicas - maxUnavailable` ready ones.
        """
        rollout = self.manifests.deployment["spec"]["strategy"]["rollingUpdate"]
        while True:
            here = [pod for pod in self.pods if not pod.terminating]
            new = [pod for pod in here if pod.revision == self.manifests.revision]
            old = [pod for pod in here if pod.revision != self.manifests.revision]
            if not old and len(new) == self.replicas and all(pod.ready for pod in new):
                await asyncio.gather(*self._ending)
                return
            if len(new) < self.replicas and len(here) < self.replicas + rollout["maxSurge"]:
                self._start()
                continue
            ready = sum(pod.ready for pod in here)
            spare = [*(pod for pod in old if not pod.ready), *old, *new[self.replicas :]]
            if spare and (not spare[0].ready or ready > self.replicas - rollout["maxUnavailable"]):
                self._end(spare[0])
                continue
            await asyncio.sleep(0.2)

    def _start(self) -> None:
        number = next(self._numbers)
        pod = Pod(f"pod-{number}", f"127.0.1.{number}", self.manifests, self._secrets, self._folder, self._log)
        self._log(f"{pod.name} starts, of {pod.revision}")
        self.pods.append(pod)

    def _end(self, pod: Pod) -> None:
        pod.terminating = True

        async def end() -> None:
            took = await pod.terminate()
            self._log(f"{pod.name} has ended after {took:.1f} s{', killed' if pod.killed else ''}")
            self.pods.remove(pod)
            self.gone.append(pod)

        self._ending.add(task := asyncio.create_task(end()))
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """End all pods."""
        for pod in [pod for pod in self.pods if not pod.terminating]:
            self._end(pod)
        await asyncio.gather(*self._ending)
