from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.topk import gather_decode, top_k
from turbolens_training.sae.trainer import SaeRun

CPU = torch.device("cpu")
CONFIG = SaeConfig(
    d_sae=96, k=4, steps=60, batch=64, warm_up=5, dead_tokens=128, steps_per_chunk=3, tokens_per_image=8, reservoir=256
)


class Sparse:
    """Tokens made of a few of many directions, off centre and far from unit scale."""

    identity = "sparse"

    def __init__(self) -> None:
        self.widths = {"a": 16, "b": 24}

    def tokens(self, index: int, per_image: int) -> dict[str, torch.Tensor]:
        found = {}
        for name, width in self.widths.items():
            directions = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
            g = torch.Generator().manual_seed(index)
            which = torch.randint(40, (10 * per_image, 3), generator=g)
            found[name] = 5 * directions[which].sum(1) + 100
        return found


def flat(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in flat(value)]
    return [torch.tensor(state)] if isinstance(state, int | float) and not isinstance(state, bool) else []


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path: Path) -> None:
    whole = SaeRun(CONFIG, Sparse(), CPU)
    whole.train(60)

    first = SaeRun(CONFIG, Sparse(), CPU)
    first.train(30, checkpoint=tmp_path / "state.pt")
    second = SaeRun(CONFIG, Sparse(), CPU)
    second.resume(tmp_path / "state.pt")
    second.train(60)

    ours, theirs = flat(whole.state_dict()), flat(second.state_dict())
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # The comparison means something: AuxK was on when the run stopped.
    assert any(len(trainer["dead"]) for trainer in first.state_dict()["trainers"].values())


def test_a_checkpoint_of_other_settings_or_another_model_is_refused(tmp_path: Path) -> None:
    run = SaeRun(CONFIG, Sparse(), CPU)
    run.train(3, checkpoint=tmp_path / "state.pt")
    with pytest.raises(ValueError, match="another k"):
        SaeRun(dataclasses.replace(CONFIG, k=5), Sparse(), CPU).resume(tmp_path / "state.pt")
    other = Sparse()
    other.identity = "another model"
    with pytest.raises(ValueError, match="another source"):
        SaeRun(CONFIG, other, CPU).resume(tmp_path / "state.pt")


def test_training_explains_the_data_with_unit_rows_and_k_features() -> None:
    run = SaeRun(CONFIG, Sparse(), CPU)
    run.train(1)
    start = run.trainers["a"].progress().explained
    run.train(60)
    for name, trainer in run.trainers.items():
        progress = trainer.progress()
        assert progress.l0 <= CONFIG.k
        assert progress.explained > max(0.5, start)
        weights = trainer.folded()
        assert (weights.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
        # Folded weights work on tokens as they come.
        x = Sparse().tokens(10_000, 8)[name]
        values, indices = top_k((x - weights.b_dec) @ weights.W_enc + weights.b_enc, CONFIG.k)
        error = x - gather_decode(values, indices, weights.W_dec) - weights.b_dec
        assert error.square().sum() < 0.5 * (x - x.mean(0)).square().sum()


def test_the_dead_clock_counts_tokens() -> None:
    run = SaeRun(CONFIG, Sparse(), CPU)
    run.train(7)
    idle = run.trainers["a"].idle
    assert set(idle.tolist()) <= {64 * n for n in range(8)}
    assert (idle == 0).any()


def test_the_rate_warms_up_and_decays() -> None:
    config = SaeConfig(steps=100, warm_up=10, decay_share=0.2, learning_rate=1.0)
    assert config.rate(0) == pytest.approx(0.1)
    assert config.rate(50) == 1.0
    assert config.rate(99) == pytest.approx(1 / 20)
