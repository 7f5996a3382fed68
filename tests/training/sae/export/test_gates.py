"""Every gate of the export fires, names what is wrong, and lets through what is right."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.sae.config import Gates
from turbolens_training.sae.export.gates import BelowGatesError, failures, pass_gates, record

ROWS = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
GOOD = SaeWeights(ROWS.T.contiguous(), torch.zeros(6), ROWS, torch.zeros(4))
MEASURED = {"l0_most": 2, "l0_mean": 1.9, "k": 2, "aim": 2, "explained_variance": 0.9, "dead": 0.01}


def failed(weights: SaeWeights = GOOD, gates: Gates = Gates(), **changes: float | None) -> list[str]:  # noqa: B008
    return failures(weights, gates=gates, **{**MEASURED, **changes})  # type: ignore[arg-type]


def test_what_is_good_passes() -> None:
    assert failed() == []
    assert failed(k=None, l0_most=6, l0_mean=3.0) == []  # JumpReLU has no most
    assert failed(explained_variance=0.8, dead=0.05) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"explained_variance": 0.79}, "explained variance is 0.7900, below 0.8"),
        ({"explained_variance": float("nan")}, "explained variance is nan"),
        ({"dead": 0.06}, "6.0% of the features are dead, more than 5.0%"),
        ({"dead": float("nan")}, "dead"),
        ({"l0_most": 3}, "3 features are active at a position, more than k=2"),
        ({"k": None, "l0_mean": 3.1}, "3.1 features are active on average, more than 1.5 times k=2"),
        ({"k": None, "l0_mean": float("nan")}, "nan features"),
        ({"weights": dataclasses.replace(GOOD, W_dec=1.01 * ROWS)}, "norm 1.0100, expected 1"),
        ({"weights": dataclasses.replace(GOOD, b_enc=torch.full((6,), torch.nan))}, "b_enc holds values"),
        ({"weights": dataclasses.replace(GOOD, b_dec=torch.zeros(5))}, "b_dec has shape"),
        ({"gates": Gates(explained_variance=0.95)}, "below 0.95"),
        ({"gates": Gates(dead=0.0)}, "more than 0.0%"),
        ({"gates": Gates(l0=0.5)}, "more than 0.5 times"),
    ],
)
def test_every_gate_fires(changes: dict, says: str) -> None:
    (reason,) = failed(**changes)
    assert says in reason


def test_one_below_holds_back_all_and_every_reason_is_told() -> None:
    below = {"mid.0": [], "up.0.1": failed(explained_variance=0.1, dead=0.5)}
    with pytest.raises(BelowGatesError, match=r"up.0.1: explained variance.*, 50.0% of.*--allow-below-gates") as caught:
        pass_gates(below, allow_below=False)
    assert "mid.0" not in str(caught.value)
    pass_gates(below, allow_below=True)
    pass_gates({"mid.0": []}, allow_below=False)


def test_the_record_says_what_was_let_through() -> None:
    kept = record(Gates(dead=0.2), failed(explained_variance=0.1))
    assert kept["thresholds"] == {"explained_variance": 0.8, "dead": 0.2, "l0": 1.5, "norm_tolerance": 1e-3}
    assert kept["below"] == ["explained variance is 0.1000, below 0.8"]
    assert record(Gates(), [])["below"] == []


@pytest.mark.parametrize(
    "settings", [{"dead": -0.1}, {"l0": -1.0}, {"explained_variance": 1.1}, {"norm_tolerance": float("nan")}]
)
def test_thresholds_that_make_no_sense(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"gates.{next(iter(settings))}"):
        Gates(**settings)
