"""A real Prometheus that reads the pods' metrics, and what an autoscaler makes of its answers."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.rehearsal.manifests import CHART, NAMESPACE, RELEASE

TOLERANCE: Final = 0.1
"""An autoscaler leaves alone what is nearer to its aim."""


class Prometheus:
    """Debian's own program, with the chart's rules, and a file of targets that is written anew as pods come and go."""

    def __init__(self, folder: Path, interval_s: float) -> None:
        self._folder, self._interval = folder, interval_s
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""

    async def start(self, port: int) -> None:
        """Start it; returns when it answers."""
        config = {
            "global": {"scrape_interval": f"{self._interval:g}s", "evaluation_interval": f"{self._interval:g}s"},
            "rule_files": [str(CHART / "files/rules.yaml")],
            # The labels that the chart's PodMonitor gives.
            "scrape_configs": [{
                "job_name": RELEASE,
                "file_sd_configs": [{"files": [str(self._folder / "targets.json")], "refresh_interval": "1s"}],
            }],
        }  # fmt: skip
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.tell([])
        self.url = f"http://127.0.0.1:{port}"
        with (self._folder / "prometheus.log").open("w") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(Path(sys.prefix) / "bin/prometheus"), f"--config.file={self._folder}/prometheus.yml",
                f"--storage.tsdb.path={self._folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}",
                stdout=log, stderr=log,
            )  # fmt: skip
        for _ in range(100):
            try:
                await self.value("vector(1)")
            except OSError:
                await asyncio.sleep(0.2)
            else:
                return
        raise RuntimeError(f"Prometheus does not answer; see {self._folder}/prometheus.log")

    def tell(self, pods: Sequence[tuple[str, str]]) -> None:
        """The pods' names and addresses with the port of their metrics."""
        targets = [{"targets": [address], "labels": {"namespace": NAMESPACE, "pod": name}} for name, address in pods]
        partial = self._folder / "targets.partial"
        partial.write_text(json.dumps(targets))
        partial.rename(self._folder / "targets.json")

    async def ask(self, query: str) -> list[dict[str, Any]]:
        """The samples of a question."""
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"

        def get() -> list[dict[str, Any]]:
            with urllib.request.urlopen(url, timeout=10) as reply:
                result: list[dict[str, Any]] = json.load(reply)["data"]["result"]
                return result

        return await asyncio.to_thread(get)

    async def value(self, query: str) -> float:
        """The one number that an autoscaler wants.

        Raises:
            ValueError: there is none, or more than one.
        """
        (sample,) = await self.ask(query)
        return float(sample["value"][1])

    async def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            await self._process.wait()


def decide(
    replicas: int, triggers: Sequence[Mapping[str, Any]], values: Sequence[float], least: int, most: int
) -> list[int]:
    """The replicas that each trigger wants, as the HorizontalPodAutoscaler's documentation has it; the largest counts.

    Args:
        replicas: that are there.
        triggers: of a ScaledObject: `metricType`, and `threshold` in `metadata`.
        values: what Prometheus answered to each.
        least: `minReplicaCount`.
        most: `maxReplicaCount`.
    """
    wanted = []
    for trigger, value in zip(triggers, values, strict=True):
        aim = float(trigger["metadata"]["threshold"])
        ratio = value / aim if trigger["metricType"] == "Value" else value / (aim * replicas)
        count = replicas if abs(ratio - 1) <= TOLERANCE else math.ceil(replicas * ratio - 1e-9)
        wanted.append(min(most, max(least, count)))
    return wanted
