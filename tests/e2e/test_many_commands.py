"""The commands for many pictures, over a real socket."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import turbolens as tl
from turbolens.cli import main


@pytest.fixture
def turbolens(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a big red star, night background\na small blue ring, plain background\n")

    def run(*argv: str) -> dict:
        main([*argv, "--server", server.target, "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def test_features_of_a_file_of_prompts(turbolens, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    command = ["extract-many", "prompts.txt", "features.parquet", "--seed", "1", "--seed", "2", "--sae", "up.0.1"]
    assert turbolens(*command)["done"] == 2
    assert len(pq.read_table(tmp_path / "features.parquet")) == 4
    assert turbolens(*command)["resumed"] == 2


def test_pictures_by_a_steering_file(turbolens, tmp_path, lens):
    tl.steering.save(tmp_path / "s.json", [tl.add("up.0.1/202", 8)])
    report = turbolens("generate-many", "prompts.txt", "pictures", "--seed", "7", "--steering", "s.json")
    assert (report["done"], report["failed"]) == (2, 0)
    lines = [json.loads(line) for line in (tmp_path / "pictures" / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    made = Image.open(next((tmp_path / "pictures").rglob("*.png")))
    steered = lens.generate(lines[0]["prompt"], seed=7, steer=[tl.add("up.0.1/202", 8)])
    assert made.size == steered.image.size


def test_a_sweep_is_a_grid_and_a_table(turbolens, tmp_path):
    told = turbolens(
        "sweep", "a big red star", "--feature", "up.0.1/202", "--feature", "up.0.1/202+up.0.1/7",
        "--strengths", "-4", "8", "--seed", "3",
    )  # fmt: skip
    assert [(row["feature"], row["strength"]) for row in told["rows"]] == [
        ("up.0.1/202", -4.0), ("up.0.1/202", 8.0), ("up.0.1/202 + up.0.1/7", -4.0), ("up.0.1/202 + up.0.1/7", 8.0),
    ]  # fmt: skip
    assert Image.open(tmp_path / "sweep.png").width > 3 * 128
    with pytest.raises(SystemExit) as left:
        turbolens("sweep", "a star", "--feature", "up.0.1/202", "--strengths", "1", "--out", "nowhere/a.png")
    assert left.value.code == 1
