"""Ctrl-C ends a command quietly at every moment, sent as a terminal does: to each of its processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from turbolens_server.loading.hub import embedded_saes

COMMAND = "from turbolens_command import main; main()"
"""What pip makes of `turbolens`."""
LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what a process has loaded by /proc")


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True, cwd=folder,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("it did not come to that within a minute")
        time.sleep(0.002)


def loads(library: str, process: subprocess.Popen[str]) -> None:
    """Until it has loaded a library, in the middle of its imports."""
    wait_for(lambda: library in Path(f"/proc/{process.pid}/maps").read_text(), process)


def says(text: str, process: subprocess.Popen[str]) -> str:
    """Until it has said something; all that it said so far."""
    said = ""
    while text not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


def interrupt(process: subprocess.Popen[str], *, within_s: float = 20) -> tuple[int, str]:
    """The exit code, and what it said on the way."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        out, error = process.communicate(timeout=within_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for noise in ("Traceback", "KeyboardInterrupt", "Exception ignored"):
        assert noise not in out + error
    return process.returncode, error


def left(folder: Path) -> list[str]:
    """Commands of what still runs of all that a process began, known by the home folder that it was given."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={folder}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def ends_whole(folder: Path, *, within_s: float = 10) -> None:
    """Nothing that it began outlives it."""
    end = time.monotonic() + within_s
    while outlives := left(folder):
        assert time.monotonic() < end, outlives
        time.sleep(0.1)


@LINUX
@pytest.mark.parametrize(
    ("command", "library"),
    [
        ("serve --port 0", "cygrpc"), ("serve --port 0", "libtorch_cpu"), ("serve --port 0", "_safetensors_rust"),
        ("train sae --out saes", "libtorch_cpu"), ("studio --embedded --no-open", "libtorch_cpu"),
    ],
)  # fmt: skip
def test_in_the_middle_of_imports(command, library, tmp_path):
    process = start(*command.split(), folder=tmp_path)
    loads(library, process)
    assert interrupt(process)[0] == 130


@pytest.mark.parametrize("later_s", [0.0, 0.5])
def test_a_server_that_loads_or_warms_up(later_s, tmp_path):
    process = start("serve", "--port", "0", "--log-format", "json", folder=tmp_path)
    said = says('"listening"', process)
    time.sleep(later_s)
    code, more = interrupt(process)
    assert code == (0 if '"ready"' in said + more else 130)
    assert '"stopped"' in more


@LINUX
def test_a_server_that_serves_and_compiles_in_the_background(tmp_path):
    process = start("serve", "--port", "0", "--log-format", "json", "--backend", "auto", folder=tmp_path)
    says('"ready"', process)
    wait_for(lambda: len(left(tmp_path)) > 1, process)
    time.sleep(1.0)  # what compiles is a process of its own, at its imports
    code, error = interrupt(process)
    assert code == 0
    assert "not compiled" not in error
    ends_whole(tmp_path)


@LINUX
def test_a_server_that_compiles_before_it_serves(tmp_path):
    process = start("serve", "--port", "0", "--log-format", "json", "--backend", "torch-compile", folder=tmp_path)
    says('"part"', process)
    time.sleep(1.0)
    code, more = interrupt(process)
    assert code == 130
    assert '"stopped"' in more
    ends_whole(tmp_path)


@LINUX
@pytest.mark.parametrize(
    "command", ["train sae --out made --steps 100000", "catalog build --saes saes --images 100000"]
)
def test_long_work(command, tmp_path):
    shutil.copytree(embedded_saes(), tmp_path / "saes")
    process = start(*command.split(), folder=tmp_path)
    loads("_safetensors_rust", process)
    time.sleep(4)
    assert interrupt(process)[0] == 130
