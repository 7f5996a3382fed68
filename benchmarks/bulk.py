"""Features of very many prompts by one call, beside the engine's best and a loop of single calls; and kills.

    python -m benchmarks.bulk
    python -m benchmarks.bulk --model random:sdxl-turbo --prompts 2000 --out bulk-gpu.json

Throughput: each round times as many prompts by the engine alone at full batches, by `lens.extract_many` and by
`lens.extract` in a loop. Memory and kills: `extract_many` runs in a process of its own, whose memory is read as it
grows; it is killed at a third and at two thirds and called again, and then no row may be lost or there twice.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import tyro

import turbolens as tl
from benchmarks.places import DOCS, RESULTS
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Aim, Contender, measure
from turbolens_server.embedded import start
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job
from turbolens_server.loading.load import load_engine

ENGINE: Final = Aim(1 / 0.95)
LOOP: Final = Aim(1 / 3)
_THINGS: Final = ("star", "ring", "disk", "square", "cross")
_COLORS: Final = ("red", "blue", "green", "yellow", "purple", "white")
_CHILD: Final = """
import sys
import turbolens as tl
target, prompts, out = sys.argv[1:]
with tl.connect(target) as lens:
    lens.extract_many(prompts, out, steps=1, progress=False)
"""
"""What the process that is killed does."""
_SEEN_S: Final = 0.25
"""Between looks at the memory of the process."""


def prompts_of(count: int, first: int = 0) -> list[str]:
    """Different ones, so that no text was encoded before."""
    return [
        f"a big {_COLORS[i % len(_COLORS)]} {_THINGS[i % len(_THINGS)]} on the left, number {i}"
        for i in range(first, first + count)
    ]


def batches(engine: Engine, prompts: list[str], size: int) -> None:
    """The engine's best: nothing but full batches."""
    height, width = engine.info.default_size[1], engine.info.default_size[0]
    saes = tuple(engine.info.saes)
    for some in (prompts[at : at + size] for at in range(0, len(prompts), size)):
        engine.run([Job(prompt, 0, 1, height, width, saes=saes, picture=False) for prompt in some])


def throughput(model: str, device: str, rounds: int, prompts: int, folder: Path) -> tuple[Any, Engine]:
    """Contenders in interleaved rounds."""
    engine = load_engine(model=model, device=device)
    numbers = itertools.count()

    def fresh() -> list[str]:
        return prompts_of(prompts, prompts * next(numbers))

    with start(model, device=device) as server, tl.connect(server.target) as lens:
        size = lens.model().limits.max_batch

        def loop() -> None:
            for prompt in fresh():
                lens.extract(prompt, seed=0, steps=1)

        def many() -> None:
            lens.extract_many(fresh(), folder / "speed.parquet", steps=1, progress=False, overwrite=True)

        contenders = [
            Contender(f"engine, batches of {size}", lambda: batches(engine, fresh(), size)),
            Contender("extract in a loop", loop),
            Contender("extract_many", many, {f"engine, batches of {size}": ENGINE, "extract in a loop": LOOP}),
        ]
        return measure(contenders, rounds), engine


def _memory_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def kills(model: str, device: str, count: int, folder: Path, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Run, kill twice, run on, and read what came of it."""
    out, prompts = folder / "features.parquet", folder / "prompts.txt"
    prompts.write_text("\n".join(prompts_of(count)) + "\n", encoding="utf-8")
    memory: list[list[tuple[float, float]]] = []
    with start(model, device=device) as server:
        began = time.monotonic()
        for share in (1 / 3, 2 / 3, None):
            process = subprocess.Popen([sys.executable, "-c", _CHILD, server.target, str(prompts), str(out)])
            memory.append([])
            while process.poll() is None:
                time.sleep(_SEEN_S)
                if held := _memory_mib(process.pid):
                    memory[-1].append((time.monotonic() - began, held))
                if share is not None and _done(out) >= share * count:
                    process.kill()
                    process.wait()
                    tell(f"killed with {_done(out)} of {count} on the disk")
    import pyarrow.parquet as pq

    table = pq.read_table(out, columns=["item", "sae", "error"])
    items, names = np.asarray(table["item"]), table["sae"].to_pylist()
    rows = {(int(item), name) for item, name in zip(items, names, strict=True)}
    saes = len(set(names))
    steady = [held for _, held in memory[-1][len(memory[-1]) // 2 :]]
    return {
        "prompts": count,
        "rows": len(items),
        "lost": count * saes - len(rows),
        "doubled": len(items) - len(rows),
        "failed": sum(error is not None for error in table["error"].to_pylist()),
        "seconds": round(time.monotonic() - began, 1),
        "growth_mib": round(max(steady) - min(steady), 1),
        "memory": [[(round(at, 1), round(held, 1)) for at, held in run] for run in memory],
    }


def _done(out: Path) -> int:
    """Prompts that are safe on the disk: a part is named by where it ends."""
    parts = out.with_name(f".{out.name}.parts").glob("[0-9]*.parquet")
    return max((int(part.stem) for part in parts), default=0)


def plot(found: dict[str, Any], file: Path) -> None:
    """Memory over time, a line for each process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for i, run in enumerate(found["memory"]):
        axes.plot(*zip(*run, strict=True), label=("first", "after one kill", "after two kills")[i])
    axes.set(
        xlabel="seconds", ylabel="resident memory of the client, MiB", ylim=(0, None),
        title=f"extract_many of {found['prompts']:,} prompts, killed twice",
    )  # fmt: skip
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(
    rounds: int = 6,
    prompts: int = 192,
    killed: int = 10_000,
    model: str = "mini",
    device: str = "auto",
    out: Path = RESULTS / "bulk.json",
    picture: Path = DOCS / "bulk-memory.png",
) -> None:
    """Measure and write.

    Args:
        rounds: rounds in which each contender is timed once.
        prompts: of each contender in a round.
        killed: prompts of the run that is killed; 0: no such run.
        model: as for `turbolens serve`.
        device: likewise.
        out: JSON file to write.
        picture: PNG to draw the memory into.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows, engine = throughput(model, device, rounds, prompts, Path(folder))
        case = {"label": {"prompts": prompts, "steps": 1}, "rows": rows}
        info = engine.info
        del engine
        result = assemble("bulk", rounds, [case], model=info.model, model_hash=info.model_hash)
        print(to_markdown(result), flush=True)
        if killed:
            result["killed"] = kills(model, device, killed, Path(folder))
            print({name: value for name, value in result["killed"].items() if name != "memory"})
            plot(result["killed"], picture)
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
