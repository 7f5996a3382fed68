"""Every fused kernel compiles for a GPU, on a machine without one, and nothing spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the extra `triton`")

TOOL = Path(__file__).resolve().parents[3] / "tools" / "kernels_aot.py"


def test_every_kernel_compiles_for_hopper_without_spills(tmp_path):
    """`make kernels` does it for the other architectures."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TOOL), "--arch", "90"],
        env={**env, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("shortlist", "merge", "above_threshold", "decode_rows", "edit_updates"):
        assert f"sm 90: {kernel}" in done.stdout
