"""From the command to the first picture, and the server's peak memory, beside an older commit of this repository.

    python -m benchmarks.start --before 36f620c590

Each start is a process of its own; contenders take turns. The cache is warm: what can be compiled has been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tyro

import turbolens as tl
from benchmarks.places import RESULTS, ROOT
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Aim, Contender, measure

BEFORE = "36f620c590"
"""The last commit that served a CPU by plain PyTorch alone."""
_PACKAGES = ("client", "server", "training", "studio")
_STARTS_S = 900.0
"""The first one may have to compile."""


@dataclasses.dataclass
class Starts:
    """Starts of one build of the server, one after the other."""

    tree: Path
    backend: str
    peak_mib: list[float] = dataclasses.field(default_factory=list)

    def first_picture(self) -> None:
        """Start, ask until there is a picture, note the peak of the process's memory, and end."""
        path = os.pathsep.join(str(self.tree / package) for package in _PACKAGES)
        command = [sys.executable, "-c", "import sys; from turbolens.cli import main; main(sys.argv[1:])", "serve"]
        command += ["--port", "0", "--log-format", "json", "--backend", self.backend]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=self.tree, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            with tl.connect(_address(process)) as lens:
                end = time.monotonic() + _STARTS_S
                while True:
                    try:
                        lens.generate("a big red star", seed=0)
                        break
                    except tl.Unavailable:
                        if process.poll() is not None or time.monotonic() > end:
                            raise
                    time.sleep(0.02)
            status = Path(f"/proc/{process.pid}/status").read_text()
            (peak,) = re.findall(r"VmHWM:\s+(\d+)", status)
            self.peak_mib.append(int(peak) / 1024)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{") and (event := json.loads(line)).get("event") == "listening":
            return str(event["address"])
    raise RuntimeError("the server did not start")


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A commit's files in a folder of their own."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def run(rounds: int, before: str) -> dict[str, Any]:
    """Measure starts of this build, compiled and pinned to PyTorch, beside those of an older commit."""
    with checked_out(before) as tree:
        starts: Mapping[str, Starts] = {
            "before": Starts(tree, "torch"),
            "torch": Starts(ROOT, "torch"),
            "compiled": Starts(ROOT, "torch-compile"),
        }
        aims = {"compiled": Aim(0.5), "torch": Aim()}
        rows = measure(
            [
                Contender(name, one.first_picture, {"before": aims[name]} if name in aims else {})
                for name, one in starts.items()
            ],
            rounds,
        )
    peaks = {name: round(statistics.median(one.peak_mib), 1) for name, one in starts.items()}
    case = {"label": {"pictures": 1, "steps": 1}, "rows": rows, "peak_mib": peaks}
    return assemble("start", rounds, [case], before=before)


def main(rounds: int = 6, before: str = BEFORE, out: Path = RESULTS / "start.json") -> None:
    """Measure and write.

    Args:
        rounds: rounds in which each build starts once.
        before: commit to compare with.
        out: JSON file to write.
    """
    result = run(rounds, before)
    print(to_markdown(result))
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
