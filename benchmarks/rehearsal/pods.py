"""A pod as a process, looked after as a kubelet would: probes, restarts, and an end in the right order.

Its address is one of the loopback's, so that every pod listens on the ports of the manifest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.rehearsal.manifests import Manifests

Log = Callable[[str], None]
_RESTART_S: Final = 1.0


class Pod:
    """One pod, from its start to its end."""

    def __init__(
        self,
        name: str,
        address: str,
        manifests: Manifests,
        secrets: Mapping[str, Mapping[str, str]],
        folder: Path,
        log: Log,
    ) -> None:
        self.name, self.address, self.revision = name, address, manifests.revision
        self.spec = manifests.pod
        self.ready = False
        self.terminating = False
        self.killed = False
        """Whether its grace was over before it had ended."""
        self.restarts = 0
        self._container: dict[str, Any] = self.spec["containers"][0]
        self._log = log
        self._folder = folder / name
        self._argv, self._environment = self._lay_out(manifests, secrets)
        self._process: asyncio.subprocess.Process | None = None
        self._watching = asyncio.create_task(self._watch())

    def _lay_out(
        self, manifests: Manifests, secrets: Mapping[str, Mapping[str, str]]
    ) -> tuple[list[str], dict[str, str]]:
        """Volumes as folders; paths below them, and the address to listen on, as they are here."""
        mounts = {
            mount["mountPath"]: self._folder / mount["mountPath"].strip("/")
            for mount in self._container["volumeMounts"]
        }

        below = re.compile("|".join(f"(?<![\\w/]){re.escape(path)}/" for path in mounts))

        def here(text: str) -> str:
            return below.sub(lambda match: f"{mounts[match[0][:-1]]}/", text)

        for folder in mounts.values():
            folder.mkdir(parents=True)
        for path, content in manifests.files(secrets).items():
            Path(here(path)).write_text(here(content))
        program, *arguments = manifests.command
        argv = [str(Path(sys.prefix) / "bin" / program), *(here(argument) for argument in arguments)]
        argv[argv.index("0.0.0.0")] = self.address
        keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        home = {"HOME": str(mounts["/cache"]), "TMPDIR": str(mounts["/tmp"])}
        return argv, keep | home | manifests.environment()

    async def _watch(self) -> None:
        """Start the process, and another where it ends or is dead."""
        while True:
            with (self._folder / "log").open("a") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._argv, env=self._environment, stderr=log, stdout=log
                )
            probing = asyncio.create_task(self._probe())
            ended = asyncio.create_task(self._process.wait())
            await asyncio.wait({probing, ended}, return_when=asyncio.FIRST_COMPLETED)
            probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await probing
            self.ready = False
            if self.terminating:
                return
            if not ended.done():
                self._process.kill()
                await ended
            self.restarts += 1
            self._log(f"{self.name} ended with {self._process.returncode} and is started again")
            await asyncio.sleep(_RESTART_S)

    async def _probe(self) -> None:
        """Returns where the startup or the liveness probe has failed as often as it may."""
        if not await self._passes("startupProbe"):
            return
        live = asyncio.create_task(self._until_dead())
        try:
            probe, failures = self._container["readinessProbe"], 0
            while not live.done():
                failures = 0 if (ok := await self._ask(probe)) else failures + 1
                if ok or failures >= probe["failureThreshold"]:
                    if self.ready is not ok:
                        self._log(f"{self.name} is {'ready' if ok else 'not ready'}")
                    self.ready = ok
                await asyncio.wait({live}, timeout=probe["periodSeconds"])
        finally:
            live.cancel()

    async def _passes(self, name: str) -> bool:
        probe = self._container[name]
        for _ in range(probe["failureThreshold"]):
            if await self._ask(probe):
                return True
            await asyncio.sleep(probe["periodSeconds"])
        return False

    async def _until_dead(self) -> None:
        probe, failures = self._container["livenessProbe"], 0
        while failures < probe["failureThreshold"]:
            await asyncio.sleep(probe["periodSeconds"])
            failures = 0 if await self._ask(probe) else failures + 1

    async def _ask(self, probe: Mapping[str, Any]) -> bool:
        """As the kubelet does: a connection of its own, in the clear."""
        async with grpc.aio.insecure_channel(f"{self.address}:{probe['grpc']['port']}") as channel:
            request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
            try:
                reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe["timeoutSeconds"])
            except grpc.aio.AioRpcError:
                return False
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def kill(self) -> None:
        """SIGKILL to the process, as the kernel does where memory is out."""
        assert self._process is not None
        self._process.kill()

    async def terminate(self) -> float:
        """No name any more, the pause of preStop, SIGTERM, and SIGKILL at the end of the grace; returns the seconds."""
        assert self._process is not None
        start = time.monotonic()
        self.terminating = True
        await asyncio.sleep(self._container["lifecycle"]["preStop"]["sleep"]["seconds"])
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        left = self.spec["terminationGracePeriodSeconds"] - (time.monotonic() - start)
        try:
            await asyncio.wait_for(self._process.wait(), left)
        except TimeoutError:
            self.killed = True
            self._process.kill()
            await self._process.wait()
        await self._watching
        return time.monotonic() - start

    def remove(self) -> None:
        """Remove its folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
