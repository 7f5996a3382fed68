"""What nested and temporal SAEs are compared by: fits by their definition, pushes that are equally long, claims."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.engine.engine import Engine
from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.temporal import by_step, side_by_side
from turbolens_training.measures.concepts import Concept
from turbolens_training.measures.counterfactual import interval
from turbolens_training.measures.report import fill
from turbolens_training.sae.shipped import NESTED
from turbolens_training.variants.nested import judge_claims, told
from turbolens_training.variants.nested import short as curves
from turbolens_training.variants.pushes import Bench, Choice, Pushed, make_pushes
from turbolens_training.variants.reconstruction import Fit
from turbolens_training.variants.temporal import BATCH, NOTHING, RIDGE, by_rival, encode, feature_paths, short
from turbolens_training.variants.temporal import judge_claims as temporal_claims

SHAPES = [concept for concept in Concept.all() if concept.attribute == "shape"][:2]


@given(st.integers(0, 2**31))
def test_a_fit_is_one_less_the_error_over_the_spread(seed: int) -> None:
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(seed)) + 3
    made = x + 0.3 * torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(seed + 1))
    flat = x.reshape(-1, 4).numpy().astype(np.float64)
    error = ((flat - made.reshape(-1, 4).numpy().astype(np.float64)) ** 2).sum()
    fit = Fit.of(x, made)
    assert fit.explained == pytest.approx(1 - error / ((flat - flat.mean(0)) ** 2).sum(), rel=1e-9)
    low, high = fit.interval()
    assert low - 0.05 <= fit.explained <= high + 0.05


@pytest.fixture(scope="module")
def choice(engine: Engine) -> Choice:
    return Choice.draw(engine, "up.0.0", 64, seed=5)


def test_pushes_are_as_long_as_the_update_and_move_pictures(engine: Engine, choice: Choice) -> None:
    sae = engine.saes["up.0.0"]
    pushes = make_pushes(sae, choice, sae.encode(choice.updates()[0]), SHAPES, 1)
    assert [push.norm().item() for push in pushes.values()] == pytest.approx([choice.rms().item()] * 2, rel=1e-4)
    bench = Bench(engine, "up.0.0", SHAPES, 4, 1, 5)
    still, moved = (bench.best(pushes, [length]) for length in (0.0, 2.0))
    assert (still.change, still.nearest, still.count) == (0, 0, 8)
    assert moved.nearest > 0.5
    assert bench.best(pushes, [2.0], (0, 0)).change == 0  # a window without steps
    assert bench.best(pushes, [0.0, 2.0]).length == 2.0


def test_codes_of_single_steps_count_as_those_of_a_run(engine: Engine) -> None:
    sae = engine.saes["up.0.0"]
    x = torch.randn(4, 2, 3, 128, generator=torch.Generator().manual_seed(0))
    codes, made = encode(sae, x)
    assert codes.values.shape == (8, 3, 10)
    assert torch.equal(made[2], sae.decode(sae.encode(x[2])))


def test_the_path_of_a_feature_is_what_its_activation_adds_at_each_step() -> None:
    g = torch.Generator().manual_seed(0)
    steps, d, n = 3, 5, 7
    rows = torch.nn.functional.normalize(torch.randn(n, steps * d, generator=g), dim=1)
    predictors = torch.randn(steps - 1, d, d, generator=g)
    weights = SaeWeights(
        rows.T.contiguous(), torch.zeros(n), rows, torch.zeros(steps * d), scales=torch.tensor([1.0, 0.5, 0.2]),
        predictors=predictors,
    )  # fmt: skip
    sae = Sae(Bundle("b", "b", "turbolens-temporal", 2, weights, None, "", None, {}), torch.device("cpu"))
    rms = torch.tensor([2.0, 3.0, 4.0])
    paths = feature_paths(sae, rms)
    one = rows[4].reshape(steps, d) * weights.scales[:, None]  # type: ignore[index]
    ways = [one[0]]
    for step in range(1, steps):
        ways.append(ways[-1] @ predictors[step - 1] + one[step])
    for step, way in enumerate(ways):
        assert paths["norm"][step, 4] == pytest.approx(float(way.norm() / rms[step]), rel=1e-5)
        assert paths["cosine"][step, 4] == pytest.approx(float(torch.cosine_similarity(way, ways[0], dim=0)), rel=1e-4)
        assert paths["added"][step, 4] == pytest.approx(float(one[step].norm() / rms[step]), rel=1e-5)
    x = torch.randn(steps, 6, d, generator=g)
    assert by_step(side_by_side(x), steps).equal(x)


def test_what_the_first_features_tell_grows_with_their_number(engine: Engine, choice: Choice) -> None:
    sae = engine.saes["up.0.0"]
    active, truth = choice.observe(sae.encode(choice.updates()[0]))
    few = active.features < 16
    first = type(active)(active.units[few], active.features[few], active.values[few], active.count)
    rows = told({"16": (first, truth, 256), "all": (active, truth, 256)})
    assert rows[0]["color"] < rows[1]["color"]  # type: ignore[operator]
    assert rows[1]["n"] == 64


def test_a_claim_that_fails_at_one_setting_does_not_hold() -> None:
    ks, widths = sorted((NESTED["k"], *NESTED["nested_k"])), NESTED["prefixes"]
    settings = [(k, 256) for k in ks] + [(NESTED["k"], width) for width in widths]
    rows: list[dict[str, object]] = [
        {"kind": kind, "k": k, "width": width, "explained": 0.9 - (kind == "nested, uniform" and k == 2) * 0.02,
         "nearest": 0.5}
        for kind in ("topk", "nested, uniform", "nested, reverse") for k, width in settings
    ]  # fmt: skip
    (most,) = (row for row in rows if (row["kind"], row["k"]) == ("nested, uniform", 20))
    most |= {"cosine": 0.989, "cosine_95": [0.988, 0.991], "explained_95": [0.88, 0.91], "pictures": 9}
    told_rows = [{"features": f"nested, uniform, {width}", "shape": 0.9, "color": 0.8 + width / 2560, "texture": 0.9,
                  "size": 0.9} for width in (*widths, 256)]  # fmt: skip
    claims = {str(row["claim"]): row for row in judge_claims(rows, told_rows)}
    holds = {claim: row["holds"] for claim, row in claims.items()}
    assert holds["uniform: one SAE explains as much at each k as a TopK trained at it, within 0.01"] == "no"
    assert holds["reverse: one SAE explains as much at each k as a TopK trained at it, within 0.01"] == "yes"
    assert holds["reverse weighting explains more at the smallest k than uniform"] == "yes"
    assert list(holds.values())[-3:] == ["not told apart", "not told apart", "shape, texture, size"]
    assert claims["cosine of reconstructions where few fire (92% silent here)"]["here"] == "0.9890 (0.9880 to 0.9910)"
    shown = curves(rows).splitlines()
    assert shown[2].startswith("| explained, a TopK trained for each | 0.900 |")
    assert shown[-1] == "Intervals at 95 %: explained ± 0.015 to 0.015, cosine ± 0.002 to 0.002."


def test_what_intervals_do_not_tell_apart_is_no_claim() -> None:
    def row(name: str, explained: float, nearest: float) -> dict[str, object]:
        shares: dict[str, object] = {"explained": explained, "changes_explained": 0.5, "nearest": nearest,
                                     "others_right": 0.8}  # fmt: skip
        shares |= {"harm_per_change": 0.4, "nearest_per_change": nearest / 0.5}
        ends = {f"{key}_95": [value - 0.05, value + 0.05] for key, value in shares.items()}  # type: ignore[operator]
        told = {"others_95": [0.7, 0.9], "pictures": 96, "n": 72, "L0 of a run": 40.0}
        return {"features of": name, "steps steered": "all", **shares, **ends, **told}

    rows = [row(RIDGE, 0.9, 0.9), row("near", 0.92, 0.88), row("far", 0.7, 0.99), row(RIDGE + BATCH, 0.9, 0.1),
            row(NOTHING + BATCH, 0.7, 0.5)]  # fmt: skip
    claims = temporal_claims(rows)
    holds = {(claim["of"], claim["than"], claim["claim"]): claim["holds"] for claim in claims}
    assert holds[RIDGE, "near", "explains more of the updates"] == "not told apart"
    assert holds[RIDGE, "far", "explains more of the updates"] == "yes"
    assert holds[RIDGE, "far", "steers more pictures"] == "not told apart"
    assert holds[RIDGE + BATCH, NOTHING + BATCH, "explains more of the updates"] == "yes"
    assert holds[RIDGE + BATCH, RIDGE, "steers more pictures"] == "no"
    assert {told for (*_, what), told in holds.items() if str(what).startswith("harms")} == {"not told apart"}
    assert [(row["features of"], row["than"]) for row in by_rival(claims)] == [
        (RIDGE, "near"), (RIDGE, "far"), (RIDGE + BATCH, NOTHING + BATCH), (RIDGE + BATCH, RIDGE),
    ]  # fmt: skip
    assert by_rival(claims)[1]["explains more of the updates"] == "yes, +0.200"
    assert short(rows)[0]["nearest of all"] == "0.90 (0.85 to 0.95)"


def test_a_page_gets_its_table_between_its_marks_and_keeps_all_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- one -->\nold\n<!-- end -->\n\nb\n<!-- two -->\nstays\n<!-- end -->\n")
    fill(page, "one", "| new |\n")
    fill(page, "three", "lost")
    fill(tmp_path / "none.md", "one", "lost")
    kept = "# A\n\n<!-- one -->\n| new |\n<!-- end -->\n\nb\n<!-- two -->\nstays\n<!-- end -->\n"
    assert page.read_text() == kept
    assert [file.name for file in tmp_path.iterdir()] == ["page.md"]


def test_what_is_told_per_change_has_the_interval_of_its_share() -> None:
    row = Pushed(1.0, 0.5, 0.8, 0.25, 100, 0.9).row()
    assert row["nearest_per_change"] == 2
    low, high = interval(0.5, 100)
    assert row["nearest_per_change_95"] == [round(4 * low, 2), round(4 * high, 2)]
    assert row["harm_per_change"] == pytest.approx(0.4)
    low, high = row["harm_per_change_95"]  # type: ignore[misc]
    assert low < 0.4 < high
