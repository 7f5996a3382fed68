"""What the documents show can be typed in: their Python runs on the shipped model, as written but for the address."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDRESSES = re.compile(r'"(localhost:50051|embedded)"')


def python_of(document: str, target: str) -> str:
    """The Python of a document, from top to bottom, against a server at `target`."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ADDRESSES.sub(repr(target), "\n".join(blocks))


@pytest.fixture
def play(server, tmp_path, monkeypatch):
    """Run a document's Python in an empty folder; returns the names that it leaves."""
    monkeypatch.chdir(tmp_path)

    def run(document: str) -> dict:
        names = {"__name__": document}
        exec(compile(python_of(document, server.target), document, "exec"), names)
        return names

    return run


def test_the_ten_lines_of_the_readme(play, tmp_path):
    names = play("README.md")
    assert names["heat"].max() > 0, "the feature that the README looks at fires nowhere"
    assert (names["steered"].array != names["base"].array).any()
    assert (tmp_path / "steered.png").stat().st_size


def test_the_guide_to_the_sdk(play, tmp_path, capsys):
    names = play("docs/sdk.md")
    assert names["known"].label
    assert names["heat"].max() > 0
    assert names["again"] == names["edits"]
    assert {"base.png", "heat.png", "7.png", "8.png"} <= {path.name for path in tmp_path.iterdir()}
    said = capsys.readouterr().out
    for field in ("run.sampling.steps", "run.edits[0].features[0].feature", "run.edits[0].add.strength"):
        assert field in said, "the refused request did not tell of every field"


def test_features_shown_as_examples_are_ones_that_the_shipped_saes_have_a_label_for(lens):
    files = [ROOT / "README.md", ROOT / "docs/sdk.md", *(ROOT / "client/turbolens").glob("*.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    shown = set(re.findall(r'(up\.0\.1)(?:/|", |/features/)(\d+)', text)) - {("up.0.1", "999999")}  # is to be refused
    assert shown
    for sae, index in shown:
        assert lens.get_feature(sae, int(index)).label
