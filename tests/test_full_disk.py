"""Every writer on a full disk: what was there stays whole, and nothing half-written is left.

And every reader on a cut file: one line that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import turbolens as tl
from turbolens._files import write_whole
from turbolens_server.bench import results as bench
from turbolens_server.catalog.labels import FeatureLabels, read_labels, write_labels
from turbolens_server.files import add_lines, write_file, write_files
from turbolens_server.sae.bundle import FeatureStats, SaeWeights, load_bundle, save_bundle, save_stats
from turbolens_server.unet.artifacts import ArtifactCache
from turbolens_training.activations.cache import ShardCache, find_caches
from turbolens_training.activations.stream import Updates
from turbolens_training.checkpoints import cut_log, read_states, save_state
from turbolens_training.evaluation import figures
from turbolens_training.evaluation.plots import save_figure
from turbolens_training.evaluation.results import Section, write_report
from turbolens_training.measures.report import write_table
from turbolens_training.sae.sweep.sweep import once, read_result

D_SAE = 6


def bundle(folder: Path) -> None:
    weights = SaeWeights(torch.ones(4, D_SAE), torch.zeros(D_SAE), torch.ones(D_SAE, 4) / 2, torch.zeros(4))
    save_bundle(
        folder / "saes/mid.0", hook_point="mid.0", hook_module="mid_block.attentions.0", model_name=None,
        model_hash=None, architecture="topk", k=2, weights=weights, stats=None, provenance={},
    )  # fmt: skip


def stats(folder: Path) -> None:
    save_stats(
        folder / "saes/mid.0",
        FeatureStats(*[np.ones(D_SAE, np.float32) for _ in range(3)], np.array([999]), np.ones(1, np.float32)),
    )


def labels(folder: Path) -> None:
    write_labels(folder / "saes/mid.0", [FeatureLabels(i, "star", 0.5, ()) for i in range(D_SAE)], catalog={"n": 1})


def artifact(folder: Path) -> None:
    def make(into: Path) -> dict[str, object]:
        with (into / "plan").open("wb") as file:
            file.write(b"x" * 4096)
        return {}

    ArtifactCache(folder / "cache").add("graphs", {"n": sum(1 for _ in folder.rglob("plan"))}, make)


def shard(folder: Path) -> None:
    cache = ShardCache.create(folder, {"model_hash": "m"})
    cache.write(
        len(cache.shards()), Updates(("a",), (1,), torch.zeros(1, 1), (999,), {"mid.0": torch.ones(1, 1, 4, 64)})
    )


def figure(folder: Path) -> None:
    drawn = plt.figure()
    try:
        save_figure(drawn, folder / "a.png")
    finally:
        plt.close(drawn)


def report(folder: Path) -> None:
    write_report(folder, "A report", {"model": "m"}, [Section("One", "Text.", {"t": [{"a": 1}]})])


def log(folder: Path) -> None:
    if (folder / "log.jsonl").exists():
        cut_log(folder / "log.jsonl", 0)
    else:
        add_lines(folder / "log.jsonl", ['{"step": 0, "text": "as long as the disk is not"}', '{"step": 1}'])


WRITERS: dict[str, Callable[[Path], object]] = {
    "file": lambda folder: write_file(folder / "a", "text" * 100),
    "files": lambda folder: write_files({folder / "a": b"x", folder / "b": b"y" * 400}),
    "bundle": bundle,
    "statistics": stats,
    "labels": labels,
    "artifact": artifact,
    "benchmark": lambda folder: bench.save(folder / "a.json", {"cases": [1.0] * 100}),
    "shard": shard,
    "checkpoint": lambda folder: save_state(folder / "state.pt", {"step": 1, "x": torch.ones(100)}),
    "log": log,
    "figure": figure,
    "curves": lambda folder: figures.curves(
        folder / "c.png", [{"a": 1.0, "b": 2.0, "s": "x"}], x="a", y="b", by="s"
    ),
    "table": lambda folder: write_table(folder / "t", [{"a": 1, "b": "text"}] * 9),
    "report": report,
    "point of a sweep": lambda folder: once(folder / f"{len(list(folder.iterdir()))}.json", {"a": 1}, lambda: {"b": 2}),
    "steering, JSON": lambda folder: tl.steering.save(folder / "s.json", [tl.ablate("mid.0/1")]),
    "steering, YAML": lambda folder: tl.steering.save(folder / "s.yaml", [tl.ablate("mid.0/1")]),
    "file of the SDK": lambda folder: write_whole(folder / "p.png", b"x" * 100),
}  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("most", [0, 20])
def test_what_was_there_stays_whole(name: str, most: int, tmp_path: Path, full_disk) -> None:
    if name in ("statistics", "labels"):
        bundle(tmp_path)
    WRITERS[name](tmp_path)
    before, folders = content(tmp_path), {path for path in tmp_path.rglob("*") if path.is_dir()}
    with full_disk(most), pytest.raises(Exception, match=r"cannot be written|File too large|no space left") as caught:
        WRITERS[name](tmp_path)
    assert isinstance(caught.value, OSError | ValueError | RuntimeError)
    assert "\n" not in str(caught.value)
    after = content(tmp_path)
    assert after == before
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders


def find_artifact(folder: Path) -> object:
    return ArtifactCache(folder / "cache").find("graphs", {"n": 0})


def read_shard(folder: Path) -> object:
    (cache,) = find_caches(folder)
    return cache.read(0)


READERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "weights": ("bundle", "saes/mid.0/sae_weights.safetensors", lambda folder: load_bundle(folder / "saes/mid.0")),
    "settings": ("bundle", "saes/mid.0/cfg.json", lambda folder: load_bundle(folder / "saes/mid.0")),
    "provenance": ("bundle", "saes/mid.0/provenance.json", lambda folder: load_bundle(folder / "saes/mid.0")),
    "statistics": (
        "statistics", "saes/mid.0/feature_stats.safetensors", lambda folder: load_bundle(folder / "saes/mid.0"),
    ),
    "labels": ("labels", "saes/mid.0/features.parquet", lambda folder: read_labels(folder / "saes/mid.0", D_SAE)),
    "artifact": ("artifact", "cache/graphs/*/plan", find_artifact),
    "manifest of artifacts": (
        "artifact", "cache/graphs/*/manifest.json", find_artifact,
    ),
    "shard": ("shard", "*/shards/*/*.f16", read_shard),
    "captions of a shard": ("shard", "*/shards/*/*.parquet", read_shard),
    "manifest of a cache": ("shard", "*/*.json", read_shard),
    "checkpoint": ("checkpoint", "state.pt", lambda folder: list(read_states(folder / "state.pt", "cpu", ["x"]))),
    "point of a sweep": ("point of a sweep", "0.json", lambda folder: read_result(folder / "0.json", {"a": 1})),
    "steering, JSON": ("steering, JSON", "s.json", lambda folder: tl.steering.load(folder / "s.json")),
    "steering, YAML": ("steering, YAML", "s.yaml", lambda folder: tl.steering.load(folder / "s.yaml")),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_cut_file_is_named_in_one_line(name: str, share: float, tmp_path: Path) -> None:
    writer, pattern, read = READERS[name]
    if writer in ("statistics", "labels"):
        bundle(tmp_path)
    WRITERS[writer](tmp_path)
    read(tmp_path)
    (file, *_) = sorted(tmp_path.glob(pattern))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(Exception, match=r"^[^\n]+$") as caught:
        read(tmp_path)
    assert isinstance(caught.value, ValueError | RuntimeError)
    told = str(caught.value)
    assert "\n" not in told
    assert file.name in told or str(file.parent) in told, told
