"""Measures that need no model: similarity, stability, probes, locality, and the report that shows them."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from turbolens_server.sae.sae import Codes
from turbolens_training.catalog.cells import cell_owners
from turbolens_training.catalog.labels import GroundTruth
from turbolens_training.evaluation import figures
from turbolens_training.evaluation.evaluate import mean_rows, quality_rows
from turbolens_training.evaluation.locality import share_inside, split_by_frequency
from turbolens_training.evaluation.probes import best_probe, detector_row, firing, splits
from turbolens_training.evaluation.results import Section, write_report
from turbolens_training.evaluation.similarity import gaussian_window, luma, ssim
from turbolens_training.evaluation.splice import recovered
from turbolens_training.evaluation.stability import matched_cosines
from turbolens_training.measures.quality import SaeMeasurement
from turbolens_training.measures.ranking import Active
from turbolens_training.mini.scenes import COLORS, COUNT, sample_codes, thing_column


def slow_ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """One picture, window by window, with weighted moments as they are defined."""
    x, y, w = luma(a[None])[0], luma(b[None])[0], gaussian_window()
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            p, q = (z[top : top + 11, left : left + 11] for z in (x, y))
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, cov = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
            c1, c2 = 1e-4, 9e-4
            found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(torch.stack(found).mean())


def test_ssim_is_its_slow_twin() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 16, 18, generator=g) * 2 - 1
    b = (a + 0.3 * torch.randn(a.shape, generator=g)).clamp(-1, 1)
    assert ssim(a, b).tolist() == pytest.approx([slow_ssim(p, q) for p, q in zip(a, b, strict=True)], abs=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1, 1, 1])
    assert (ssim(a, -a) < 0).all()


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5), extra=st.integers(0, 2))
def test_matching_is_the_best_of_all(seed: int, rows: int, extra: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, 4, generator=g), torch.randn(rows + extra, 4, generator=g)
    cosine = torch.nn.functional.cosine_similarity(a.double()[:, None], b.double()[None], dim=2)
    best = max(sum(float(cosine[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(len(b)), rows))
    assert matched_cosines(a, b).sum().item() == pytest.approx(best)


def test_order_and_length_of_rows_do_not_matter_to_stability() -> None:
    a = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(matched_cosines(a, 3 * a.flip(0)), torch.ones(40, dtype=torch.float64))


def test_recovered_is_one_for_a_perfect_sae_and_zero_for_none() -> None:
    assert recovered(0.5, 0.0) == 1.0
    assert recovered(0.5, 0.5) == 0.0
    assert recovered(0.5, 1.0) == -1.0
    assert recovered(0.0, 0.1) is None


def test_changes_are_told_apart_by_place_and_frequency() -> None:
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[:, :8] = True
    change = torch.zeros(2, 3, 16, 16)
    assert share_inside(change, inside) is None
    change[..., :8], change[..., 8:] = 3.0, 1.0
    assert share_inside(change, inside) == pytest.approx(0.9)
    low, high = split_by_frequency(torch.full((1, 3, 16, 16), 0.7))
    assert torch.allclose(low, torch.tensor(0.7))
    assert high.abs().max() < 1e-6
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    low, high = split_by_frequency(checks.expand(1, 3, 16, 16))
    assert low.abs().max() < 0.2
    assert torch.allclose(low + high, checks)


def made_up(red: int) -> tuple[GroundTruth, Active, torch.Tensor]:
    """Scenes, and three features: 0 on cells of red things, 1 on a random half of the cells, 2 nowhere."""
    g = torch.Generator().manual_seed(0)
    codes, jitter = sample_codes(60, g), torch.randn(60, 16, generator=g)
    owners = cell_owners(codes, jitter, (8, 8))
    on_red = torch.zeros(owners.shape, dtype=torch.bool)
    for slot in range(2):
        mine = (codes[:, thing_column(slot, "color")] == red) & (codes[:, COUNT] > slot)
        on_red |= (owners == slot) & mine[:, None]
    dense = torch.stack([on_red.float(), (torch.rand(owners.shape, generator=g) > 0.5).float()], -1).flatten(0, 1)
    units, features = dense.nonzero(as_tuple=True)
    return GroundTruth(codes, owners, (8, 8)), Active(units, features, dense[units, features], len(dense)), dense


def test_probes_find_the_feature_that_knows_and_score_it_on_the_other_half() -> None:
    truth, active, _ = made_up(COLORS.index("red"))
    found = {(s.candidate.attribute, s.candidate.value, s.candidate.region): s for s in splits(active, truth, 3)}
    red, blue = found["color", "red", "thing"], found["color", "blue", "thing"]
    assert best_probe(red) == (0, 1.0)
    assert best_probe(blue)[1] < 0.9
    sensitivity, specificity = firing(red)
    assert (float(sensitivity[0]), float(specificity[0])) == (1.0, 1.0)
    assert (float(sensitivity[2]), float(specificity[2])) == (0.0, 1.0)
    # Choice and score share no picture: both things of one lie in one half.
    even = red.chosen_on.unflatten(0, (60, 2))
    assert (even[:, 0] == even[:, 1]).all()
    assert even[:, 0].sum() == 30

    row = detector_row("mid.0", 0, ("color", "red", "thing"), {name: firing(s) for name, s in found.items()})
    assert row["balanced_accuracy"] == 1.0
    assert float(str(row["other_values"])) < 0.6


def test_probe_scores_are_those_of_sklearn() -> None:
    truth, active, dense = made_up(0)
    thing = next(s for s in splits(active, truth, 3) if s.candidate.value == "striped")
    picture = torch.arange(60)[:, None].expand(-1, 64)
    unit = torch.where(truth.owners >= 0, 2 * picture + truth.owners, -1).flatten()
    means = torch.stack([dense[unit == u].mean(0) if (unit == u).any() else torch.zeros(2) for u in range(120)])
    feature, auroc = best_probe(thing)
    rest = ~thing.chosen_on & (thing.candidate.positive | thing.candidate.negative)
    assert auroc == pytest.approx(roc_auc_score(thing.candidate.positive[rest], means[rest, feature]), abs=1e-9)


def test_quality_rows_count_inactive_and_dense_features() -> None:
    measurement = SaeMeasurement(4, 2)
    values, indices = torch.ones(20, 2), torch.zeros(20, 2, dtype=torch.int64)  # feature 0 everywhere
    values[:, 1], indices[:, 1] = 0, 3  # feature 3 only looks chosen
    values[0, 1], indices[0, 1] = 1.0, 1  # feature 1 at one of twenty positions
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    measurement.add(999, x, Codes(values, indices), x)
    rows = quality_rows("mid.0", measurement)
    assert (rows[0]["never_active"], rows[0]["dense"], rows[0]["fvu"]) == (0.5, 0.25, 0.0)
    assert "dense" not in rows[1]


def test_means_leave_out_what_a_row_lacks() -> None:
    rows = [{"block": "a", "x": 1.0}, {"block": "a"}, {"block": "a", "x": 2.0}, {"block": "b"}]
    assert mean_rows(rows, "block", ("x",)) == [{"block": "a", "rows": 3, "x": 1.5}, {"block": "b", "rows": 1}]


def test_a_report_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    rows = [{"block": "mid.0", "score": 0.25}, {"block": "<b>", "score": 0.75, "note": "&"}]
    figures.heat_maps(tmp_path / "a.png", rows, down="block", across="block", values={"score": "x"})
    figures.scatter(tmp_path / "b.png", [], x="score", y="score", by="block")
    figures.density_histograms(tmp_path / "c.png", {"mid.0": np.array([0, 0.5, 1e-4])})
    section = Section(
        "Part", "a < b", {"long": rows, "short": rows[:1]}, ["a.png", "b.png", "c.png"], frozenset({"long"})
    )
    write_report(tmp_path, "Title & more", {"model": "mini"}, [section])
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "Title &amp; more" in page
    assert page.count("<details>") == 1
    markdown = (tmp_path / "report.md").read_text()
    assert "[long](long.md)" in markdown
    assert "| mid.0 | 0.25 |" in markdown
    assert json.loads((tmp_path / "long.json").read_text()) == rows
