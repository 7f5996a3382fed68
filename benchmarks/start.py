"""From the command to the first picture, and the server's peak memory, beside an older commit of this repository.

    python -m benchmarks.start --before 36f620c590

Each start is a process of its own; contenders take turns. The cache is warm: a round that does not count comes first,
in which what can be compiled is. Memory is the peak of the whole process, files that it has mapped and touched
included, as the kernel tells it (VmHWM), after the first picture and after eight together with all features. No start
that counts has a process beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import tyro
from grpc_health.v1 import health_pb2, health_pb2_grpc

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
_ENDS_S: Final = 20.0
_PROMPT: Final = "a big red star"


class Caller:
    """A process that asks servers of one build for pictures by that build's own SDK: contracts changed."""

    _CODE: Final = """
import json, sys, turbolens as tl
for line in sys.stdin:
    told = json.loads(line)
    with tl.connect(told.pop("address")) as lens:
        lens.generate(**told)
    print(flush=True)
"""

    def __init__(self, environment: Mapping[str, str]) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", self._CODE]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def generate(self, address: str, **told: Any) -> None:
        """Have pictures made."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"address": address, "prompt": _PROMPT, **told}) + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError("no picture came; the caller has said why")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Build:
    """A build of the server."""

    def __init__(self, name: str, tree: Path, backend: str, cache: Path) -> None:
        path = os.pathsep.join(str(tree / package) for package in _PACKAGES)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TURBOLENS_")}
        self.name = name
        self._environment = {**kept, "PYTHONPATH": path}
        self._tree = tree
        self._settings = ["--port", "0", "--log-format", "json", "--backend", backend, "--cache", str(cache)]
        self._caller = Caller(self._environment)

    def close(self) -> None:
        """End what asks it."""
        self._caller.close()

    def start(self) -> tuple[float, dict[str, float]]:
        """Start and have a picture made: milliseconds to it, and the peaks of memory in MiB."""
        command = [sys.executable, "-c", "import sys; from turbolens.cli import main; main(sys.argv[1:])", "serve"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, *self._settings], stderr=subprocess.PIPE, text=True, cwd=self._tree, env=self._environment
        )
        try:
            address = _address(process)
            _wait(process, address)
            self._caller.generate(address, seed=0)
            took = 1000 * (time.perf_counter() - began)
            peaks = {"first picture": _peak_mib(process.pid)}
            self._caller.generate(address, seeds=list(range(8)), features=True)
            peaks["eight pictures with features"] = _peak_mib(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_ENDS_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return took, peaks


def _wait(process: subprocess.Popen[str], address: str) -> None:
    """Wait until a server serves pictures, by its health: the SDK would ask ever less often."""
    ask = health_pb2.HealthCheckRequest(service="turbolens.v1.GenerationService")
    until = time.perf_counter() + _STARTS_S
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while (
            health.Check(ask, wait_for_ready=True, timeout=_STARTS_S).status != health_pb2.HealthCheckResponse.SERVING
        ):
            if process.poll() is not None or time.perf_counter() > until:
                raise RuntimeError(f"{address}: the server does not come to serve")
            time.sleep(0.01)


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
    times: dict[str, list[float]] = {}
    peaks: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as open_builds:
        tree = open_builds.enter_context(checked_out(before))
        of = {"before": (tree, "torch"), "torch": (ROOT, "torch"), "compiled": (ROOT, "torch-compile")}
        builds = [open_builds.enter_context(contextlib.closing(Build(name, *at, cache))) for name, at in of.items()]
        for turn in range(-1, rounds):
            first = max(turn, 0) % len(builds)
            for build in (*builds[first:], *builds[:first]):
                took, found = build.start()
                if turn < 0:
                    continue
                times.setdefault(build.name, []).append(took)
                for when, mib in found.items():
                    peaks.setdefault(when, {}).setdefault(build.name, []).append(mib)
    aims = {"torch": {"before": Aim()}, "compiled": {"before": Aim(0.5), "torch": Aim()}}
    rows = compare([Contender(b.name, b.start, aims.get(b.name, {})) for b in builds], times)
    memory = [_memory(when, name, mib) for when, mib in peaks.items() for name in mib]
    case = {"label": {"pictures": 1, "steps": 1}, "rows": rows, "memory": memory}
    return assemble("start", rounds, [case], before=before)


def _memory(when: str, name: str, of: Mapping[str, Sequence[float]]) -> dict[str, Any]:
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
