"""Two nodes of a training run from the chart's own manifests; one is killed, and the run ends as if it had not been.

    python -m benchmarks.rehearsal.training

Each node is a process of `torchrun` with the manifest's arguments. What is played: the indexed Job, which starts a new
pod in a dead one's place. The bundles are compared, bit by bit, with those of a run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import tyro

from benchmarks.places import ROOT
from benchmarks.rehearsal.manifests import Manifests, helm_template

VALUES: Final[dict[str, Any]] = {
    "gpu": {"enabled": False},
    "data": {"model": "mini", "variant": None, "prompts": "scenes", "hook_points": ["up.0.0", "up.0.1"]},
    "train": {
        "nodes": 2,
        "settings": {
            "d_sae": 64, "k": 8, "batch": 512, "steps": 240, "dead_tokens": 20_000, "reservoir": 4096, "images": 8,
            "held_out_chunks": 2, "checkpoint_steps": 60, "allow_below_gates": True,
        },
    },
}  # fmt: skip


class Nodes:
    """The pods of one run, on a volume of their own."""

    def __init__(self, manifests: Manifests, folder: Path, port: int) -> None:
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        config = folder / "config"
        config.mkdir()
        text = manifests.one("ConfigMap")["data"]["sae.yaml"]
        (config / "sae.yaml").write_text(text.replace("/work/", f"{self.work}/"))
        job = manifests.one("Job")["spec"]
        self.count = job["completions"]
        container = job["template"]["spec"]["containers"][0]
        arguments = [
            one.replace("/etc/turbolens/config", str(config))
            if not one.startswith("--rdzv-endpoint=")
            else f"--rdzv-endpoint=127.0.0.1:{port}"
            for one in container["args"]
        ]
        self._command = [str(Path(sys.prefix) / "bin" / container["command"][0]), *arguments]
        self._folder = folder
        self.processes = [self._start(index) for index in range(self.count)]

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "JOB_COMPLETION_INDEX": str(index)}
        with (self._folder / f"node-{index}.log").open("ab") as log:
            return subprocess.Popen(self._command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def log(self, index: int) -> str:
        """What a node has printed."""
        return (self._folder / f"node-{index}.log").read_text()

    def kill(self, index: int) -> None:
        """Kill a node with all that it runs, and start another in its place."""
        os.killpg(self.processes[index].pid, signal.SIGKILL)
        self.processes[index].wait()
        self.processes[index] = self._start(index)

    def wait(self, seconds: float) -> None:
        """To the end of all nodes; one that fails is started again, as a Job does."""
        until = time.monotonic() + seconds
        while any(process.poll() is None or process.returncode for process in self.processes):
            if time.monotonic() > until:
                raise TimeoutError(f"not done after {seconds:.0f} s:\n{self.log(0)[-2000:]}")
            for index, process in enumerate(self.processes):
                if process.poll():
                    self.processes[index] = self._start(index)
            time.sleep(0.5)

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def bundles(self) -> dict[str, bytes]:
        """The weights that came out."""
        return {
            str(path.relative_to(self.work)): path.read_bytes()
            for path in sorted(self.work.glob("bundles/**/*.safetensors"))
        }


@contextlib.contextmanager
def nodes(manifests: Manifests, folder: Path, port: int) -> Iterator[Nodes]:
    """Nodes that are gone at the end, whatever happens."""
    made = Nodes(manifests, folder, port)
    try:
        yield made
    finally:
        made.end()


def main(seconds: float = 400.0) -> None:
    """Rehearse; exit with 1 where the disturbed run came to something else.

    Args:
        seconds: that a run may take.
    """
    manifests = helm_template("run", ROOT / "deploy/helm/turbolens-training", VALUES)
    with tempfile.TemporaryDirectory(prefix="turbolens-training-") as temporary:
        folder = Path(temporary)
        start = time.monotonic()
        with nodes(manifests, folder / "plain", 29511) as plain:
            plain.wait(seconds)
        print(f"undisturbed: {time.monotonic() - start:.0f} s, {', '.join(plain.bundles())}")
        start = time.monotonic()
        with nodes(manifests, folder / "disturbed", 29512) as disturbed:
            while len([*disturbed.work.glob("sae/rank-*/state.pt")]) < disturbed.count:
                if time.monotonic() - start > seconds:
                    raise TimeoutError(disturbed.log(0)[-2000:])
                time.sleep(0.2)
            disturbed.kill(1)
            print(f"node 1 killed after {time.monotonic() - start:.0f} s, past the first checkpoint")
            disturbed.wait(seconds)
        same = plain.bundles() == disturbed.bundles()
        went_on = re.findall(r"going on from step (\d+)", disturbed.log(0) + disturbed.log(1))
        print(f"disturbed: {time.monotonic() - start:.0f} s; went on from step {' and '.join(went_on)}; "
              f"bundles are {'the same, bit by bit' if same else 'OTHERS'}")  # fmt: skip
        if not (same and went_on and plain.bundles()):
            sys.exit(disturbed.log(0)[-2000:] + disturbed.log(1)[-2000:])


if __name__ == "__main__":
    tyro.cli(main)
