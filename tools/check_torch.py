"""Warn before pip would download gigabytes: say which PyTorch it would take, and how to get a small one."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

HINT = """
  pip is about to download a CUDA build of PyTorch: several gigabytes.
  On a machine with an NVIDIA GPU this is what you want. Without one, stop here (Ctrl+C) and run make again with
  TORCH_INDEX set to the CPU index that PyTorch's own installation page names.
"""


def main(wanted: str, index: str) -> None:
    name, _, pinned = wanted.partition("==")
    try:
        if version(name).split("+")[0] == pinned:
            return
    except PackageNotFoundError:
        pass
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--dry-run",
        "--quiet",
        "--report",
        "-",
    ]
    found = subprocess.run(
        [*command, *(["--index-url", index] if index else []), wanted], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(f"pip cannot find {wanted}: {found.stderr.strip().splitlines()[-1] if found.stderr else ''}")
    if re.search(r'"name":\s*"(nvidia-[a-z0-9-]+|cuda-[a-z-]+|triton)"', found.stdout):
        print(HINT, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
