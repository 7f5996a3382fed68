"""Both trainers are given the same, and are judged as they compute."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.report import section
from benchmarks.train_beside_saelens import (
    Data,
    Theirs,
    Training,
    contenders_of,
    explained_variance,
    measure_case,
    synthetic,
)
from turbolens_server.bench.results import assemble
from turbolens_training.sae.config import SaeConfig

pytestmark = pytest.mark.interop
CONFIG = SaeConfig(d_sae=48, k=4, batch=32, steps=24, warm_up=2, learning_rate=1e-2, reservoir=64)


@pytest.fixture(scope="module")
def data() -> Data:
    return synthetic(16, directions=64, active=4, batch=CONFIG.batch, batches=5, held_out=200)


@pytest.mark.parametrize("sparse", [False, True])
def test_all_learn_and_every_step_is_timed(sparse, data, tmp_path):
    case = measure_case(CONFIG, data, 2, rate=1e-2, sparse=sparse)
    before = {
        name: explained_variance(each.weights(), CONFIG.k, data.held_out)
        for name, each in contenders_of(CONFIG, data.tokens, rate=1e-2, sparse=sparse).items()
    }
    assert all(case["explained"][name] > before[name] for name in before)
    *others, ours = case["rows"]
    assert [found.against for found in ours.comparisons] == [row.name for row in others]
    assert {len(row.ms) for row in case["rows"]} == {CONFIG.steps // 2 - 1}
    result = assemble("train_beside_saelens", 11, [case], sae_lens="6")
    (tmp_path / "train.json").write_text(json.dumps(result))
    assert f"TurboLens {case['explained']['TurboLens']:.3f}" in section("train", tmp_path, tmp_path)


def test_batches_come_in_order_and_again(data):
    seen = []
    training = Training(lambda x, step: seen.append((step, x)), data.batches, 4)
    training()
    training()
    assert [step for step, _ in seen] == list(range(8))
    assert all(torch.equal(x, data.batches[step % 5]) for step, x in seen)


def test_their_weights_are_judged_as_sae_lens_computes(data):
    theirs = Theirs(CONFIG, data.tokens, {}, {"lr": 1e-2})
    Training(theirs.step, data.batches, 10)()
    factor = theirs._trainer.activation_scaler.scaling_factor
    with torch.no_grad():
        reconstruction = theirs._sae(data.held_out * factor) / factor
    left = (reconstruction - data.held_out).square().sum() / (data.held_out - data.held_out.mean(0)).square().sum()
    assert explained_variance(theirs.weights(), CONFIG.k, data.held_out) == pytest.approx(1 - left.item(), abs=1e-4)
