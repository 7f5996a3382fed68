"""Our server's unsteered picture beside the bare diffusers pipeline, with and without extraction, in one run.

    python benchmarks/serve_vs_diffusers.py

Rounds interleave the contenders, so that a slow moment of the machine hits all alike; what counts is the ratio
within a round. Writes `benchmarks/results/serve_vs_diffusers.json` and the table of `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

import turbolens as tl
from turbolens_server.engine.load import embedded_model

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a big red star on the left, night background"
MARKS = ("<!-- serve_vs_diffusers -->", "<!-- end -->")


def machine() -> dict[str, Any]:
    """What this ran on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "python": platform.python_version(),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "commit": commit.stdout.strip(),
    }  # fmt: skip


def interval(ratios: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def compare(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each contender, and its time over the first one's with an interval."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        names = list(contenders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(1000 * (time.perf_counter() - start))
    base = np.array(times[next(iter(contenders))])
    rng = np.random.default_rng(0)
    rows = {}
    for name, measured in times.items():
        ratios = np.array(measured) / base
        low, high = interval(ratios, rng)
        rows[name] = {
            "median_ms": float(np.median(measured)), "ratio": float(np.median(ratios)), "low": low, "high": high,
        }  # fmt: skip
    return rows


def measure(rounds: int) -> list[dict[str, Any]]:
    """Every case: pictures a call, steps."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(embedded_model(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    cases = []
    with tl.connect("embedded") as lens:
        for count, steps in ((1, 1), (1, 4), (4, 1), (8, 1)):
            seeds = list(range(count))

            def bare(seeds: list[int] = seeds, steps: int = steps) -> object:
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                prompts = [PROMPT] * len(seeds)
                return pipeline(prompts, num_inference_steps=steps, guidance_scale=0.0, generator=generators)

            def served(seeds: list[int] = seeds, steps: int = steps, features: bool | None = None) -> object:
                return lens.generate(PROMPT, seeds=seeds, steps=steps, features=features, format="raw")

            def extracted(seeds: list[int] = seeds, steps: int = steps) -> object:
                return lens.generate(PROMPT, seeds=seeds, steps=steps, features=True, format="raw")

            rows = compare({"diffusers": bare, "turbolens": served, "turbolens, four blocks": extracted}, rounds)
            cases.append({"pictures": count, "steps": steps, "rows": rows})
            print(f"{count} pictures, {steps} steps: " + ", ".join(f"{n} {r['ratio']:.2f}x" for n, r in rows.items()))
    return cases


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    where = result["machine"]
    lines = [
        f"{where['cpu']}, {where['cores']} cores, {where['gpu'] or 'no GPU'}; torch {where['torch']}, Python "
        f"{where['python']}; {result['rounds']} interleaved rounds; commit {where['commit'][:10]}.",
        "",
        "| pictures | steps | contender | median ms | time over diffusers (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for name, row in case["rows"].items():
            ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            lines.append(f"| {case['pictures']} | {case['steps']} | {name} | {row['median_ms']:.1f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="interleaved rounds of each case")
    rounds: int = parser.parse_args().rounds
    result = {"machine": machine(), "rounds": rounds, "cases": measure(rounds)}
    results = ROOT / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "serve_vs_diffusers.json").write_text(json.dumps(result, indent=1) + "\n")
    page = ROOT / "docs" / "performance.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n\n{to_markdown(result)}\n\n{MARKS[1]}{after}")
    print(to_markdown(result))


if __name__ == "__main__":
    main()
