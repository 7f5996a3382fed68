"""The SDK's tests, and every call to a real server, with the oldest and newest `grpcio` and `protobuf` that it allows.

    python tools/versions.py

Each pair has an environment of its own, made anew, into which pip puts the SDK as callers install it, and what tests
need; the server beside them runs from this environment, at the versions that constraints.txt pins.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
VARIED: Final = ("grpcio", "protobuf")
TOOLS: Final = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis", "pandas", "scipy", "duckdb")
"""What the tests need beside the SDK."""
NEED_THE_SERVER: Final = ("--ignore=tests/client/test_cli.py", "-k", "not shell_completes")
"""Tests of commands that the SDK alone does not bring."""
_STARTS_S: Final = 120.0


def bounds() -> dict[str, tuple[str, str]]:
    """Of each package that varies, how pip is asked for the oldest and for the newest that the SDK allows."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = {}
    for name in VARIED:
        (line,) = (line for line in asked if re.match(rf"{name}\b", line))
        oldest = re.search(r">=([\d.]+)", line)
        assert oldest is not None, line
        found[name] = f"{name}=={oldest[1]}", line
    return found


def pairs() -> list[tuple[str, ...]]:
    """Every choice of an oldest or a newest."""
    return list(itertools.product(*bounds().values()))


def pins() -> str:
    """constraints.txt without what varies, and without the libraries that follow it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return "\n".join(line for line in lines if not re.match("grpcio|protobuf|googleapis|types-", line)) + "\n"


@contextlib.contextmanager
def a_server(folder: Path) -> Iterator[str]:
    """`turbolens serve` of this environment on a free port; its address."""
    log = folder / "server.log"
    command = [str(Path(sys.prefix) / "bin" / "turbolens"), "serve", "--port", "0", "--log-format", "json"]
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            end = time.monotonic() + _STARTS_S
            events: dict[str, dict[str, str]] = {}
            while "ready" not in events:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.3)
                lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
                events = {line["event"]: line for line in lines}
            yield events["listening"]["address"]
        finally:
            process.terminate()


def check(pair: tuple[str, ...], folder: Path, wheel: Path, target: str) -> bool:
    """The tests with one pair of versions."""
    python = str(folder / "bin" / "python")
    # What lies on PYTHONPATH would count as installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / "pins.txt").write_text(pins())
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--progress-bar", "off"]
    subprocess.run(
        [*pip, "-c", str(folder / "pins.txt"), f"{wheel}[tables,yaml]", *pair, *TOOLS], check=True, env=environment
    )
    told = subprocess.run(
        [python, "-c", "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in "
         f"{VARIED}), sep=', ')"], check=True, capture_output=True, text=True, env=environment,
    ).stdout.strip()  # fmt: skip
    print(f"{told}:", flush=True)
    environment |= {
        "TURBOLENS_VERSIONS_SERVER": target,
        "CI": "1",  # hypothesis then has no clock
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = [
        subprocess.run(
            [*tests, *NEED_THE_SERVER, f"--confcutdir=tests/{name}", f"tests/{name}"],
            cwd=ROOT,
            env=environment,
            check=False,
        )
        for name in ("client", "versions")
    ]
    return not any(one.returncode for one in done)


def main() -> None:
    """Check every pair."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=int, help="of the pairs, by number from 0: oldest both first, newest both last")
    chosen = parser.parse_args().only
    every = pairs() if chosen is None else [pairs()[chosen]]
    with tempfile.TemporaryDirectory() as name, a_server(Path(name)) as target:
        build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
        subprocess.run([*build, "--wheel-dir", name, ROOT], check=True)
        (wheel,) = Path(name).glob("turbolens-*.whl")
        failed = [pair for number, pair in enumerate(every) if not check(pair, Path(name) / str(number), wheel, target)]
    if failed:
        raise SystemExit(f"failed with: {'; '.join(', '.join(pair) for pair in failed)}")
    print(f"passed with {len(every)} pairs of versions")


if __name__ == "__main__":
    main()
