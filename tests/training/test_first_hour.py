"""A new user's first hour, as the script does it: installed into an environment of its own."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "first_hour.sh"
STEPS = ["install", "picture", "captions", "train", "label", "serve", "steer"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_nothing_to_a_steered_picture(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path), site.getsitepackages()[0]],
        env={**environment, "PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    print(done.stdout)  # shown by `make test-slow`: the seconds of each step
    assert re.findall(r"^(\w+): \d+ s$", done.stdout, re.MULTILINE) == STEPS
    night, snow = (np.asarray(Image.open(tmp_path / f"{name}.png"), float) for name in ("night", "snow"))
    assert night[:, 96:].mean() < 80, "the right side is night"
    assert snow[:, 96:].mean() > night[:, 96:].mean() + 80, "and then far brighter, as snow is"
    assert "up.0." in (tmp_path / "steer.log").read_text(), "the file tells its edits"
