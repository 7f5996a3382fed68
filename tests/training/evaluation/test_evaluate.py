from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from turbolens_server.sae.bundle import FeatureStats, save_stats
from turbolens_training import cli
from turbolens_training.evaluation.edits import NOTHING, PROMPT

D_SAE = 48
"""Of the random SAEs."""
FAST = (
    "--device cpu --quality-pictures 4 --splice-scenes 4 --probe-pictures 8 --batch 4 --pairs 1 --choice-pairs 1 "
    "--concepts color=blue background=night --features 4 --multipliers 1 --strengths 8 --mean-multipliers 1 3 "
    "--locality-features 1 --locality-scenes 2"
)


def test_every_part_from_the_command_line(tiny_folder: Path, random_saes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["--model", str(tiny_folder), "--saes", str(random_saes), "--seeds", str(random_saes), "--out", str(out)]
    cli.main(["eval", *common, *FAST.split()])

    tables = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert {row["block"] for row in tables["quality"]} == {"down.2.1", "mid.0", "up.0.0", "up.0.1"}
    for row in tables["quality"]:
        assert row["fvu"] == pytest.approx(1 - row["explained_variance"], abs=2e-4)
        assert row["l0_p99"] <= 4
    assert all(row["mean_cosine"] == 1.0 and row["chance"] < 0.9 for row in tables["stability"])
    assert [row["block"] for row in tables["splice"]] == ["down.2.1", "mid.0", "up.0.0", "up.0.1", "all"]
    assert all(0 <= row["auroc"] <= 1 for row in tables["probes"])
    assert {row["label"] for row in tables["detectors"]} == {"color=blue"}
    sites = ["none", "down.2.1", "mid.0", "up.0.0", "up.0.1", "all", "prompt"]
    assert [row["block"] for row in tables["blocks"] if row["attribute"] == "color"] == sites
    named = ["add", "set", "ablate and add", "replace", "add random", "add one labelled"]
    methods = ["transfer", "random features", *named, *2 * ["mean difference"], "dense transfer", "patch"]
    assert [row["method"] for row in tables["scene_edit_all"]] == [NOTHING, *methods, PROMPT]
    means = [row["multiplier"] for row in tables["scene_edit_all"] if row["method"] == "mean difference"]
    assert means == [1.0, 3.0]
    assert len(tables["scene_edit"]) == 14 * 3
    assert all(row["nearer_low"] <= row["nearer"] <= row["nearer_high"] for row in tables["scene_edit"])
    assert {row["pairs"] for row in tables["scene_edit"]} == {1, 2}
    assert len(tables["locality"]) == 4
    assert tables["run"]["seconds"].keys() == {
        "quality",
        "stability",
        "splice",
        "probes",
        "blocks",
        "edits",
        "locality",
    }
    page = (out / "report.html").read_text()
    figures = sorted(path.name for path in out.glob("*.png"))
    assert page.count("data:image/png;base64,") == len(figures) == 9
    for text in (page, (out / "report.md").read_text(), json.dumps(tables["run"])):
        assert str(tmp_path) not in text


def test_quality_is_measured_on_named_prompts_and_the_rest_needs_truth(
    tiny_folder: Path, random_saes: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("".join(f"a picture of thing number {n}\n" for n in range(60)))
    common = ["eval", "--model", str(tiny_folder), "--sae", str(random_saes), "--prompts", str(prompts), *FAST.split()]
    with pytest.raises(
        SystemExit, match=r"splice, .* need scenes whose truth is known, and mine\.txt has none; --parts"
    ):
        cli.main([*common, "--out", str(tmp_path / "out")])
    cli.main([*common, "--out", str(tmp_path / "out"), "--parts", "quality"])
    mine = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert {row["prompts"] for row in mine} == {"mine.txt"}
    cli.main([*common[:5], *FAST.split(), "--out", str(tmp_path / "scenes"), "--parts", "quality"])
    scenes = json.loads((tmp_path / "scenes" / "quality.json").read_text())
    assert {row["prompts"] for row in scenes} == {"captioned scenes"}
    assert scenes[0]["explained_variance"] != mine[0]["explained_variance"]


def test_published_means_alone_tell_nothing_of_which_features_are_active(
    tiny_folder: Path, random_saes: Path, tmp_path: Path
) -> None:
    saes = shutil.copytree(random_saes, tmp_path / "saes")
    none = np.zeros(0, np.float32)
    for folder in saes.iterdir():
        unknown = np.zeros(D_SAE, np.float32)
        save_stats(folder, FeatureStats(unknown + 2, unknown, unknown.copy(), none.astype(np.int64), none))
    common = ["--model", str(tiny_folder), "--saes", str(saes), "--seeds", str(saes), "--out", str(tmp_path / "out")]
    cli.main(["eval", *common, *FAST.split(), "--parts", "stability"])
    rows = json.loads((tmp_path / "out" / "stability.json").read_text())
    assert all((row["features"], row["mean_cosine"]) == (D_SAE, 1.0) for row in rows)
    for part in ("locality", "edits"):
        with pytest.raises(SystemExit, match="no measured statistics; turbolens catalog build makes them"):
            cli.main(["eval", *common, *FAST.split(), "--parts", part])


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="parts: no speed; there are quality, stability"):
        cli.main(["eval", "--saes", str(tmp_path), "--parts", "speed"])
