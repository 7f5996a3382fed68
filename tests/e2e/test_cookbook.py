"""Every recipe runs as written, and makes the pictures that the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/cookbook.md"


def test_every_recipe_makes_the_picture_beside_it(server, tmp_path, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    code = "\n".join(blocks).replace('"embedded"', repr(server.target))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "cookbook"})
    shown = re.findall(r"!\[[^\]]+\]\((cookbook/[^)]+)\)", text)
    assert len(shown) == 10
    assert {path.removeprefix("cookbook/") for path in shown} == {file.name for file in tmp_path.iterdir()}
    for path in shown:
        made, kept = (np.asarray(Image.open(file), int) for file in (tmp_path / Path(path).name, ROOT / "docs" / path))
        assert made.shape == kept.shape, path
        assert np.abs(made - kept).mean() < 4, path  # machines round otherwise; another picture is tens apart


def test_the_pictures_are_small():
    assert sum(file.stat().st_size for file in (ROOT / "docs/cookbook").iterdir()) < 1.5 * 2**20
