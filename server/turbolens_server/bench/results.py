"""Results: where they were measured, as JSON, and as tables."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

from turbolens_server.files import write_file
from turbolens_server.loading.device import versions

_REPOSITORY: Final = Path(__file__).resolve().parents[3]
_SOURCES: Final = ("client", "server", "training", "benchmarks/*.py")
"""What a result depends on; a result itself lies beside it and must not make the next one dirty."""


def machine() -> dict[str, Any]:
    """What this runs on, and which code it runs: enough to tell two results apart."""
    # Installed into an environment that lies in somebody's repository, that repository says nothing about us.
    tracked = _git("ls-files", "--error-unmatch", "--", __file__) is not None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "load_average": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "transformers": transformers.__version__,
            **versions(),
        },
        "commit": _git("rev-parse", "HEAD") if tracked else None,
        "changed": tracked and bool(_git("status", "--porcelain", "--", *_SOURCES)),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this code lies in; None where it lies in none, as when installed."""
    command = ["git", "-C", str(_REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def assemble(benchmark: str, rounds: int, cases: Sequence[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """A result as JSON holds it.

    Args:
        benchmark: its name.
        rounds: how often every contender was timed.
        cases: `label` (what sets the case apart, by name), `rows` (of :class:`Row`), and what else is to be kept.
        facts: what else holds for all cases.
    """
    result: dict[str, Any] = _plain(
        {"benchmark": benchmark, "machine": machine(), "rounds": rounds, **facts, "cases": list(cases)}
    )
    return result


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result."""
    text = json.dumps(result, indent=1)
    # The times of a row on one line: a result is also read by people.
    text = re.sub(r"\[[-\d.e,\s]+\]", lambda found: " ".join(found[0].split()), text)
    write_file(path, text + "\n")
    print(f"wrote {path}", file=sys.stderr)


def describe_machine(found: Mapping[str, Any]) -> str:
    """One line of what :func:`machine` gave."""
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    commit = (found["commit"] or "unknown")[:10] + (" with changes" if found["changed"] else "")
    where = f"{found['cpu']}, {found['cores']} cores, {found['gpu'] or 'no GPU'}"
    return f"{where}; {found['threads']} threads, load {found['load_average']:.1f}; {names}; commit {commit}"


def to_markdown(result: Mapping[str, Any]) -> str:
    """The cases of a result as a table, a line for each comparison."""
    labels = list(result["cases"][0]["label"])
    head = [*labels, "contender", "median ms", "beside", "its time, times", "ms more", "aim", "verdict"]
    lines = [head, ["---"] * len(head)]
    for case in result["cases"]:
        for row in case["rows"]:
            start = [*(str(case["label"][name]) for name in labels), row["name"], f"{row['median_ms']:.1f}"]
            found = [_cells(comparison) for comparison in row["comparisons"]]
            if row.get("limit_ms") is not None:
                found.append(["", "", "", f"≤ {row['limit_ms']:.3g} ms", row["limit_verdict"]])
            lines += [[*start, *cells] for cells in found or [[""] * 5]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(found: Mapping[str, Any]) -> list[str]:
    ratio, added, aim = found["ratio"], found["added_ms"], found["aim"]
    limits = [
        *([f"{aim['ratio']:.3g}"] if aim["ratio"] is not None else []),
        *([f"{aim['added_ms']:.3g} ms"] if aim["added_ms"] is not None else []),
    ]
    return [
        found["against"],
        f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
        f"{added['median']:.1f} ({added['low']:.1f} to {added['high']:.1f})",
        f"≤ {' or '.join(limits)}" if limits else "",
        found["verdict"] or "",
    ]


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, and floats rounded to six digits: more is noise."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
