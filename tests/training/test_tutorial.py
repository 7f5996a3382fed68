"""The tutorial of docs/training.md, run as it is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCK = re.compile(r"<!-- tutorial -->\n```(sh|python)\n(.*?)```", re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_does_what_it_says(tmp_path):
    blocks = BLOCK.findall(PAGE.read_text())
    assert [language for language, _ in blocks] == ["sh", "python"]
    # `turbolens` and `python` are those of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, code in blocks:
        began = time.perf_counter()
        command = ["bash", "-e", "-c", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        print(f"{language}: {time.perf_counter() - began:.0f} s")  # shown by `make test-slow`
    assert 1 <= done.stdout.count("background=snow: word") <= 4
    night, snow = (np.asarray(Image.open(tmp_path / f"{name}.png"), float) for name in ("night", "snow"))
    assert night[:, 96:].mean() < 80, "the right side is night"
    assert snow[:, 96:].mean() > 180, "and then snow"
    red = snow[..., 0] - snow[..., 1:].mean(-1) > 80
    assert red[:, :64].mean() > 0.1, "the star stays"
