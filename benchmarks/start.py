"""From the command to the first picture, and the server's peak memory, beside an older commit of this repository.

    python -m benchmarks.start --before 36f620c590

Each start is a process of its own; contenders take turns. The cache is warm: a round that does not count comes first,
in which what can be compiled is. Memory is the peak of the whole process, files that it has mapped and touched
included, as the kernel tells it (VmHWM), after the first picture and after eight together with all features. No start
that counts has a process beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import tyro

import turbolens as tl
from benchmarks.places import RESULTS, ROOT
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Aim, Contender, compare, estimate, judge
from turbolens_server.unet.artifacts import default_cache

BEFORE: Final = "36f620c590"
"""The last commit that served a CPU by plain PyTorch alone."""
MOST_MEMORY: Final = 0.75
"""Of the peak before."""
_PACKAGES: Final = ("client", "server", "training", "studio")
_STARTS_S: Final = 900.0
"""The first one may have to compile."""
_PROMPT: Final = "a big red star"


@dataclasses.dataclass(frozen=True)
class Build:
    """A build of the server."""

    name: str
    tree: Path
    backend: str
    cache: Path

    def start(self) -> tuple[float, dict[str, float]]:
        """Start and ask until there is a picture: milliseconds to it, and the peaks of memory in MiB."""
        path = os.pathsep.join(str(self.tree / package) for package in _PACKAGES)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TURBOLENS_")}
        command = [sys.executable, "-c", "import sys; from turbolens.cli import main; main(sys.argv[1:])", "serve"]
        command += ["--port", "0", "--log-format", "json", "--backend", self.backend, "--cache", str(self.cache)]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=self.tree, env={**kept, "PYTHONPATH": path}
        )
        try:
            with tl.connect(_address(process)) as lens:
                while (took := _picture_after(lens, began)) is None:
                    if process.poll() is not None or time.perf_counter() - began > _STARTS_S:
                        raise RuntimeError(f"{self.name}: the server does not come to serve")
                    time.sleep(0.01)
                peaks = {"first picture": _peak_mib(process.pid)}
                lens.generate(_PROMPT, seeds=range(8), features=True)
                peaks["eight pictures with features"] = _peak_mib(process.pid)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        return took, peaks


def _picture_after(lens: tl.Lens, began: float) -> float | None:
    """Milliseconds to a picture; None: not ready."""
    try:
        lens.generate(_PROMPT, seed=0)
    except tl.Unavailable:
        return None
    return 1000 * (time.perf_counter() - began)


def _peak_mib(pid: int) -> float:
    (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(peak) / 1024


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if line.startswith("{") and (event := json.loads(line)).get("event") == "listening":
            return str(event["address"])
    raise RuntimeError(f"the server did not start: {''.join(told[-3:])}")


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


def run(rounds: int, before: str, cache: Path) -> dict[str, Any]:
    """Measure starts of this build, compiled and pinned to PyTorch, beside those of an older commit."""
    with checked_out(before) as tree:
        builds = [
            Build("before", tree, "torch", cache),
            Build("torch", ROOT, "torch", cache),
            Build("compiled", ROOT, "torch-compile", cache),
        ]
        times: dict[str, list[float]] = {build.name: [] for build in builds}
        peaks: dict[str, dict[str, list[float]]] = {}
        for turn in range(-1, rounds):
            first = max(turn, 0) % len(builds)
            for build in (*builds[first:], *builds[:first]):
                took, found = build.start()
                if turn >= 0:
                    times[build.name].append(took)
                    for when, mib in found.items():
                        peaks.setdefault(when, {}).setdefault(build.name, []).append(mib)
    aims = {"torch": {"before": Aim()}, "compiled": {"before": Aim(0.5), "torch": Aim()}}
    rows = compare([Contender(b.name, b.start, aims.get(b.name, {})) for b in builds], times)
    memory = [_memory(when, name, of) for when, of in peaks.items() for name in of]
    case = {"label": {"pictures": 1, "steps": 1}, "rows": rows, "memory": memory}
    return assemble("start", rounds, [case], before=before)


def _memory(when: str, name: str, of: dict[str, Sequence[float]]) -> dict[str, Any]:
    """One line of the table of memory."""
    told = {"when": when, "name": name, "median_mib": estimate(of[name]).median}
    if name == "before":
        return told
    ratio = estimate([mine / other for mine, other in zip(of[name], of["before"], strict=True)])
    aim = Aim(MOST_MEMORY) if name == "compiled" else Aim()
    return {**told, "ratio": ratio, "aim": aim.ratio, "verdict": judge(ratio, ratio, aim, len(of[name]))}


def memory_table(memory: Sequence[dict[str, Any]]) -> str:
    """Peaks beside those before."""
    lines = [["most memory after", "contender", "median MiB", "beside before, times", "aim", "verdict"], ["---"] * 6]
    for row in memory:
        cells = ["", "", ""]
        if ratio := row.get("ratio"):
            aim = f"≤ {row['aim']:.3g}" if row["aim"] is not None else ""
            cells = [f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})", aim, row["verdict"] or ""]
        lines.append([row["when"], row["name"], f"{row['median_mib']:,.0f}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(rounds: int = 6, before: str = BEFORE, cache: Path | None = None, out: Path = RESULTS / "start.json") -> None:
    """Measure and write.

    Args:
        rounds: rounds in which each build starts once.
        before: commit to compare with.
        cache: folder of compiled code; the user's own where none is named.
        out: JSON file to write.
    """
    result = run(rounds, before, cache or default_cache())
    print(to_markdown(result))
    print(memory_table(result["cases"][0]["memory"]))
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
