"""The SDK's tests, and every call to a real server, with the oldest and newest `grpcio` and `protobuf` that it allows.

    python tools/versions.py
    python tools/versions.py --only 0 3    # oldest both, newest both

The pairs take turns in an environment made anew, into which pip puts the SDK as callers install it, and what tests
need; the server beside it runs from this environment, at the versions that constraints.txt pins.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
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
_PIP: Final = ("-m", "pip", "--disable-pip-version-check")
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
    # Pinned, so that nothing is compiled beside the tests.
    environment = {"TURBOLENS_BACKEND": "torch", **os.environ}
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors, env=environment) as process:
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


def build(folder: Path) -> Path:
    """The SDK's wheel, made from a copy: a build leaves files where it runs, and takes those of earlier ones along."""
    copy = folder / "repository"
    shutil.copytree(ROOT / "client", copy / "client", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([sys.executable, *_PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, copy], check=True)
    (wheel,) = folder.glob("turbolens-*.whl")
    return wheel


def check(pair: tuple[str, ...], python: str, wheel: Path, target: str) -> bool:
    """The tests with one pair of versions."""
    # What lies on PYTHONPATH would count as installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pins_file = wheel.parent / "pins.txt"
    pins_file.write_text(pins())
    pip = [python, *_PIP, "install", "--quiet", "--progress-bar", "off", "--upgrade", "-c", str(pins_file)]
    subprocess.run([*pip, f"{wheel}[tables,yaml]", *pair, *TOOLS], check=True, env=environment)
    told = subprocess.run(
        [python, "-c", "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in "
         f"{VARIED}), sep=', ')"], check=True, capture_output=True, text=True, env=environment,
    ).stdout.strip()  # fmt: skip
    print(f"{told}:", flush=True)
    environment |= {
        "TURBOLENS_VERSIONS_SERVER": target,
        "CI": "1",  # hypothesis then has no clock
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
    }
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *NEED_THE_SERVER]
    done = [
        subprocess.run([*tests, f"--confcutdir=tests/{name}", f"tests/{name}"], cwd=ROOT, env=environment, check=False)
        for name in ("client", "versions")
    ]
    return not any(one.returncode for one in done)


def main() -> None:
    """Check every pair."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", type=int, nargs="+", help="of the pairs, by number: 0, oldest both, to 3, newest both"
    )
    every = pairs()
    chosen = parser.parse_args().only or range(len(every))
    with tempfile.TemporaryDirectory() as name, a_server(Path(name)) as target:
        wheel = build(Path(name))
        subprocess.run([sys.executable, "-m", "venv", Path(name) / "venv"], check=True)
        python = str(Path(name) / "venv" / "bin" / "python")
        failed = [every[number] for number in chosen if not check(every[number], python, wheel, target)]
    if failed:
        raise SystemExit(f"failed with: {'; '.join(', '.join(pair) for pair in failed)}")
    print(f"passed with {len(chosen)} pairs of versions")


if __name__ == "__main__":
    main()
