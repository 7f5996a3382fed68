"""What was seen, kept in `benchmarks/results/reliability/`, a file for each scenario."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.places import RESULTS
from turbolens_server.bench.results import describe_machine, machine
from turbolens_server.files import write_file

FOLDER: Final = RESULTS / "reliability"


def save(name: str, result: dict[str, Any]) -> None:
    """Write a result, with the machine and how busy it was."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    about = {"machine": describe_machine(machine()), "load": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    text = json.dumps({"scenario": name, **about, **result}, indent=1)
    text = re.sub(r"[\[{][^\[\]{}]+[\]}]", lambda found: " ".join(found[0].split()), text)  # a reading on one line
    write_file(FOLDER / f"{name}.json", text + "\n")
    say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in result.items() if not isinstance(value, list)))


def load(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """A result; None where it was not measured yet."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def ms(seconds: list[float], quantile: float) -> float:
    """A quantile of seconds, in milliseconds."""
    return round(1000 * float(np.quantile(seconds, quantile)), 1) if seconds else float("nan")
