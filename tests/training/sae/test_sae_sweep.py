"""A sweep at its smallest, from the command line to its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbolens_server.sae.bundle import load_bundle
from turbolens_training import cli
from turbolens_training.activations.cache import find_caches
from turbolens_training.sae.sweep import sweep as sweeping
from turbolens_training.sae.sweep.config import Point, SweepConfig
from turbolens_training.sae.sweep.sweep import elect

BLOCKS = ("down.2.1", "mid.0", "up.0.0", "up.0.1")


def test_a_sweep_trains_serves_and_tables_every_point_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "--steps 12 --batch 64 --images 4 --reservoir 256 --held-out-chunks 4"
    few = "--served-pictures 1 --splice-scenes 2 --probe-pictures 16"
    places = ["--cache", str(tmp_path / "cache"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    command = ["sweep", "--model", str(tiny_folder), "--device", "cpu", *places, *small.split(), *few.split()]
    points = ["--points", "topk:4:64", "temporal:4:64"]
    cli.main([*command, *points])

    topk, temporal = json.loads((tmp_path / "out" / "sweep.json").read_text())
    for result in (topk, temporal):
        assert tuple(row["block"] for row in result["quality"]) == BLOCKS
        assert all(row["l0_mean"] <= 4 for row in result["quality"])
        assert result["served"]["positions"] > 0
        assert result["served"]["same_count"] == result["served"]["positions"]
        assert result["served"]["largest_difference"] < 1e-3
        folder = tmp_path / "work" / Point(result["architecture"], 4, 64).name / "bundles"
        below = {block: load_bundle(folder / block).provenance["gates"]["below"] for block in BLOCKS}
        assert result["below_gates"] == below
        assert any(below.values()), "12 steps are not enough, and the table says so"
    assert "splice" in topk
    assert "splice" not in temporal
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert "| topk | 4 | 64 |" in table
    assert "refused: features are of whole runs" in table
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 0

    # Again: nothing is collected, trained or evaluated, and the table is the same.
    shards = {cache.key: cache.shards() for cache in find_caches(tmp_path / "cache")}
    for name in ("train_point", "evaluate_point"):
        monkeypatch.setattr(sweeping, name, lambda *_, **__: pytest.fail("done a second time"))
    cli.main([*command, *points])
    assert (tmp_path / "out" / "sweep.md").read_text() == table
    assert {cache.key: cache.shards() for cache in find_caches(tmp_path / "cache")} == shards
    with pytest.raises(SystemExit, match=r"result.json: of a sweep with another steps; choose another --work"):
        cli.main([*command, *points, "--steps", "13"])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red star, number {i}\n" for i in range(200)))
    with pytest.raises(SystemExit, match=r"result.json: of a sweep with another prompts; choose another --work"):
        cli.main([*command, *points, "--prompts", str(prompts)])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("relu:4:64", "expected ARCHITECTURE:K:D_SAE"),
        ("topk:4", "expected ARCHITECTURE:K:D_SAE"),
        ("topk:65:64", "k=65, expected 1 to d_sae=64"),
    ],
)
def test_a_point_that_cannot_be_trained_is_refused_before_anything_is(points: str, message: str, capsys) -> None:
    with pytest.raises((SystemExit, ValueError)) as stopped:
        cli.main(["sweep", "--points", points])
    assert message in f"{stopped.value} {''.join(capsys.readouterr())}"


def test_the_middle_point_of_each_variant_is_evaluated() -> None:
    elected = elect(SweepConfig().grid())
    assert {(point.architecture, point.k, point.d_sae) for point in elected} == {
        ("topk", 10, 256), ("batch-topk", 10, 256), ("jumprelu", 10, 256), ("matryoshka", 10, 256),
        ("temporal", 40, 512),
    }  # fmt: skip
