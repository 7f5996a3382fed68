from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import r2_score, roc_auc_score

from turbolens_server.sae.sae import Codes
from turbolens_training.measures.quality import SaeMeasurement, VarianceSums
from turbolens_training.measures.ranking import Active, Ranking, pool
from turbolens_training.measures.report import write_table


def test_explained_variance_is_one_minus_sse_over_sst_of_the_whole_split() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 8)) * np.arange(1, 9) + 1000  # far off centre: sums in float32 would be lost
    y = x + rng.normal(size=x.shape) * 0.5
    sums = VarianceSums()
    for part in np.array_split(np.arange(3000), [10, 500, 501, 2000]):
        sums.add(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    expected = 1 - ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert sums.explained == pytest.approx(expected, abs=1e-9)
    assert sums.explained == pytest.approx(r2_score(x, y, multioutput="variance_weighted"), abs=1e-9)
    assert sums.rms == pytest.approx(np.sqrt((x**2).sum(1).mean()))
    halves = [VarianceSums(), VarianceSums()]
    for half, part in zip(halves, (slice(0, 900), slice(900, None)), strict=True):
        half.add(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    assert (halves[0] + halves[1]).explained == pytest.approx(expected, abs=1e-9)


def test_statistics_are_those_of_the_dense_activations() -> None:
    g = torch.Generator().manual_seed(0)
    measurement, dense = SaeMeasurement(20, 4), []
    for timestep in (999, 999, 499):
        values, indices = (torch.randn(50, 20, generator=g)).topk(4, dim=1)
        values = (values - 1).relu()
        dense.append(torch.zeros(50, 20).scatter(1, indices, values))
        measurement.add(timestep, torch.ones(50, 3) * timestep, Codes(values, indices), torch.zeros(50, 3))
    z, stats = torch.cat(dense), measurement.stats()
    active = z > 0
    assert np.allclose(stats.frequency, active.float().mean(0))
    assert np.allclose(stats.max, z.amax(0))
    assert np.allclose(stats.mean, z.sum(0) / active.sum(0).clamp(min=1), rtol=1e-5)
    assert stats.timesteps.tolist() == [999, 499]
    assert stats.update_rms == pytest.approx([999 * 3**0.5, 499 * 3**0.5], rel=1e-6)
    rows = measurement.rows("b", dead=0.25)
    assert [row["timestep"] for row in rows] == ["all", "999", "499"]
    assert rows[0]["l0_mean"] == pytest.approx(active.sum(1).float().mean().item(), abs=1e-3)
    assert rows[0]["l0_p99"] == np.quantile(active.sum(1), 0.99, method="inverted_cdf")


def sparse(dense: torch.Tensor) -> Active:
    units, features = dense.nonzero(as_tuple=True)
    return Active(units, features, dense[units, features], len(dense))


def test_comparisons_are_those_of_sklearn_and_scipy_ties_included() -> None:
    g = torch.Generator().manual_seed(0)
    dense = (torch.randint(-6, 5, (300, 12), generator=g)).clamp(min=0).float() / 3  # few values: many ties
    dense[:, 0] = 0
    kind = torch.randint(3, (300,), generator=g)  # 2: takes no part
    dense[kind == 1, 1] += 0.5
    ranking = Ranking(sparse(dense), 12)
    found = ranking.compare(kind == 1, kind == 0)
    part = kind < 2
    for j in range(12):
        assert found.auroc[j].item() == pytest.approx(roc_auc_score(kind[part], dense[part, j]), abs=1e-12)
        pos, neg = dense[kind == 1, j].double(), dense[kind == 0, j].double()
        if j:
            p = mannwhitneyu(pos, neg, alternative="greater", method="asymptotic", use_continuity=False).pvalue
            assert found.z[j].item() == pytest.approx(norm.isf(p), abs=1e-6)
            assert found.selectivity[j].item() == pytest.approx((pos.mean() / (pos.mean() + neg.mean())).item())
    assert (found.auroc[0], found.z[0], found.selectivity[0]) == (0.5, 0.0, 0.5)
    assert torch.equal(ranking.active_units(part), (dense[part] > 0).sum(0).double())
    assert (ranking.compare(kind == 7, kind == 0).auroc == 0.5).all()


def test_pooling_is_the_mean_over_a_unit() -> None:
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(60, 7, generator=g).relu()
    into = torch.randint(-1, 5, (60,), generator=g)
    pooled = pool(sparse(dense), into, 5)
    found = torch.zeros(5, 7, dtype=torch.float64).index_put_((pooled.units, pooled.features), pooled.values)
    expected = torch.stack([dense[into == unit].mean(0) for unit in range(5)])
    assert torch.allclose(found.float(), expected)


def test_tables_are_written_for_people_and_programs(tmp_path: Path) -> None:
    rows = [{"block": "mid.0", "ev": 0.9}, {"block": "up.0.0", "dead": 0.1}]
    write_table(tmp_path / "quality", rows)
    assert (tmp_path / "quality.md").read_text().splitlines()[2] == "| mid.0 | 0.9 |  |"
    assert json.loads((tmp_path / "quality.json").read_text()) == rows
