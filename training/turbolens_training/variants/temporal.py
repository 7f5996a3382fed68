"""`turbolens train temporal`: SAEs of whole runs beside each other and beside SAEs of single steps, at equal L0."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from turbolens_server.files import write_file
from turbolens_server.loading.hub import embedded_saes
from turbolens_server.loading.load import load_engine
from turbolens_server.loading.places import EMBEDDED_SAES
from turbolens_server.sae.bundle import load_bundle
from turbolens_server.sae.sae import Codes, Sae, in_one
from turbolens_server.sae.temporal import by_step, side_by_side
from turbolens_training.activations.stream import HELD_OUT, SceneStream
from turbolens_training.evaluation.plots import save_figure
from turbolens_training.measures.concepts import Concept, check_truth
from turbolens_training.measures.report import fill, markdown_table, with_interval
from turbolens_training.sae.shipped import NESTED, TEMPORAL
from turbolens_training.variants.config import TemporalConfig
from turbolens_training.variants.nested import ATTRIBUTES
from turbolens_training.variants.pushes import Bench, Choice, make_pushes
from turbolens_training.variants.reconstruction import Fit
from turbolens_training.variants.trained import trained

STEPS: Final = int(TEMPORAL["run_steps"])
RIDGE, LAST, NOTHING = "residuals of ridge", "changes", "steps side by side"
BATCH: Final = ", BatchTopK"
"""Of a name: selected as published."""
MEASURES: Final = (
    ("explained", "explains more of the updates", 1),
    ("changes_explained", "explains more of what steps change", 1),
    ("nearest", "steers more pictures", 1),
    ("nearest_per_change", "steers more per change", 1),
    ("harm_per_change", "harms less per change", -1),
)
"""What is compared: the measure, the claim, and 1 where more is better."""
_PATHS: Final = 6


def competitors(config: TemporalConfig) -> dict[str, Sae]:
    """All that is compared: a run's code has k features, by BatchTopK on average, and a step's a Tth of them, so that a
    run has equally many."""
    runs = {
        name: trained(config.training(f"temporal-{how}", **{**TEMPORAL, "prediction": how}))
        for name, how in ((RIDGE, "ridge"), (LAST, "last"), (NOTHING, "nothing"))
    }
    runs |= {
        name + BATCH: trained(
            config.training(f"temporal-{how}-batch", **{**TEMPORAL, "prediction": how, "selection": "batch-topk"})
        )
        for name, how in ((RIDGE, "ridge"), (NOTHING, "nothing"))
    }
    single = {"one_step_share": 0.0, "multi_steps": (STEPS,)}
    per_step = trained(config.training("steps-topk", k=TEMPORAL["k"] // STEPS, **single))
    nested = trained(config.training("steps-nested", **NESTED, **single))
    return {**runs, "each step": per_step, "each step, nested": nested}


def encode(sae: Sae, x: Tensor) -> tuple[Codes, Tensor]:
    """What an SAE finds in runs x [T, N, P, d_model], and their reconstruction; of single steps all codes, as one."""
    if sae.bundle.steps:
        codes = sae.encode(side_by_side(x))
        return codes, by_step(sae.decode(codes), len(x))
    found = [sae.encode(step) for step in x]
    rows = len(x[0])
    together = in_one([(range(at * rows, (at + 1) * rows), codes) for at, codes in enumerate(found)])
    return together, torch.stack([sae.decode(codes) for codes in found])


def measure_temporal(config: TemporalConfig) -> None:
    """Train what is missing, measure all, and write tables and pictures to `out`/temporal."""
    saes = competitors(config)
    engine = load_engine(model=config.model, device=config.device, saes=[])
    check_truth(engine, "temporal SAEs of other models are measured by turbolens train eval")
    concepts = [concept for concept in Concept.all() if concept.attribute in ATTRIBUTES]
    stream = SceneStream(engine, seed=config.seed, split=HELD_OUT, images=32, one_step_share=0.0, multi_steps=(STEPS,))
    held_out = torch.cat([stream.updates(i).by_block[config.block] for i in range(-(-config.pictures // 32))], 1)
    choice = Choice.draw(engine, config.block, config.choice_pictures, seed=config.seed, steps=STEPS)
    bench = Bench(engine, config.block, concepts, config.scenes, STEPS, config.seed)
    rows: list[dict[str, Any]] = []
    for name, sae in tqdm(saes.items(), desc="temporal", unit="SAE"):
        codes, made = encode(sae, held_out)
        l0 = (codes.values > 0).sum().item() / held_out[0, ..., 0].numel()
        changed = Fit.of(held_out.diff(dim=0).flatten(0, 1), made.diff(dim=0).flatten(0, 1))
        # Features are chosen on the first step's codes, or the run's: what single steps have of later ones is alike.
        seen = sae.encode(side_by_side(choice.updates())) if sae.bundle.steps else sae.encode(choice.updates()[0])
        pushes = make_pushes(sae, choice, seen, concepts, config.features)
        fit = Fit.of(held_out.movedim(0, 2).flatten(1, 2), made.movedim(0, 2).flatten(1, 2))
        told = {"features of": name, "L0 of a run": round(l0, 1), **fit.row()}
        told["changes_explained"] = round(changed.explained, 3)
        told["changes_explained_95"] = [round(end, 3) for end in changed.interval()]
        rows.append({**told, "steps steered": "all", **bench.best(pushes, config.lengths).row()})
        if name == RIDGE:
            for window in ((0, 1), (1, STEPS)):
                steered = bench.best(pushes, config.lengths, window).row()
                rows.append({"features of": name, "steps steered": f"{window[0]} to {window[1] - 1}", **steered})
    folder = config.out / "temporal"
    path = embedded_saes(config.sae) if config.sae in EMBEDDED_SAES else Path(config.sae)
    bundle = load_bundle(path if (path / "cfg.json").exists() else path / config.block)
    claims = judge_claims(rows)
    for name, table in (("comparison", rows), ("claims", claims)):
        write_file(folder / f"{name}.json", json.dumps(table, indent=1) + "\n")
    paths = feature_paths(Sae(bundle, torch.device("cpu")), choice.rms())
    draw(folder / "temporal.png", rows, paths, None if bundle.stats is None else torch.from_numpy(bundle.stats.mean))
    page = [
        "# SAEs of whole runs, beside those of steps\n",
        f"Made by `turbolens train temporal`: `{config.block}` of `{config.model}` in {STEPS} steps, all trained "
        f"alike, {config.steps:,} steps of {config.batch:,} tokens, each {STEPS} updates of a run. What it is: "
        "[temporal.md](../temporal.md).\n",
        "## Claims\n",
        "What 2605.27813 says of SD 1.5; its figures were not to be had, so its order is compared. In brackets "
        "intervals at 95 %; told apart is where they do not overlap.\n",
        markdown_table(claims),
        "## Comparison\n\nL0 is of a whole run at a position. `changes_explained`: of what each step changes, about "
        "the mean. `nearest`, `length`, `change`: as in [nested](../nested/README.md); `harm_per_change`: share of the "
        "other attributes that is lost, by the change of the picture.\n",
        markdown_table(rows),
        "![Comparison, and the paths of features](temporal.png)\n",
    ]
    write_file(folder / "README.md", "\n".join(page))
    fill(config.out / "temporal.md", "comparison", markdown_table(short(rows)))
    fill(config.out / "temporal.md", "claims", markdown_table(by_rival(claims)))
    config.tell(folder / "README.md", report=folder / "README.md", claims=claims)


def feature_paths(sae: Sae, rms: Tensor) -> dict[str, Tensor]:
    """The way of every feature over the steps: each [T, d_sae].

    Returns:
        `norm`: of its direction, in norms of the update; `cosine`: with its direction at the first step; `added`: what
        it brings at a step beyond what follows from the step before, in norms of the update.
    """
    weights, steps = sae.bundle.weights, range(len(rms))
    assert weights.scales is not None
    ways = torch.stack([sae.directions(step) for step in steps])
    own = weights.W_dec.unflatten(1, (len(rms), -1)).movedim(1, 0) * weights.scales[:, None, None]
    return {
        "norm": ways.norm(dim=2) / rms[:, None],
        "cosine": torch.cosine_similarity(ways, ways[:1], dim=2),
        "added": own.norm(dim=2) / rms[:, None],
    }


def judge_claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """The published comparison, row by row: the residuals beside all else, and as published beside the same."""
    whole = {row["features of"]: row for row in rows if row["steps steered"] == "all"}
    pairs = [(RIDGE, name) for name in whole if name != RIDGE and BATCH not in name]
    pairs += [(RIDGE + BATCH, name) for name in (NOTHING + BATCH, RIDGE) if {RIDGE + BATCH, name} <= whole.keys()]
    found: list[dict[str, object]] = []
    for measure, claim, sign in MEASURES:
        for mine, other in pairs:
            best, row = whole[mine], whole[other]
            gap = best[measure] - row[measure]
            (low, high), (other_low, other_high) = best[f"{measure}_95"], row[f"{measure}_95"]
            apart = low > other_high or high < other_low
            found.append(
                {
                    "claim": claim,
                    "of": mine,
                    "than": other,
                    "n": row["pictures" if measure.endswith("explained") else "n"],
                    "here": with_interval(best, measure),
                    "other": with_interval(row, measure),
                    "holds": ("yes" if sign * gap > 0 else "no") if apart else "not told apart",
                    "by how much": f"{gap:+.3f}",
                }
            )
    return found


def by_rival(claims: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """The claims in short: a row for each comparison, a column for each claim."""
    pairs = dict.fromkeys((claim["of"], claim["than"]) for claim in claims)
    return [
        {"features of": mine, "than": other}
        | {
            claim["claim"]: f"{claim['holds']}, {claim['by how much']}"
            for claim in claims
            if (claim["of"], claim["than"]) == (mine, other)
        }
        for mine, other in pairs
    ]


def short(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """The comparison as the page shows it."""
    return [
        {
            "features of": row["features of"],
            "L0": row["L0 of a run"],
            "explained": with_interval(row, "explained"),
            "of what steps change": with_interval(row, "changes_explained"),
            "nearest of all": with_interval(row, "nearest", 2),
            "others right": with_interval({**row, "others": row["others_right"]}, "others", 2),
            "nearest per change": with_interval(row, "nearest_per_change", 2),
            "harm per change": with_interval(row, "harm_per_change", 2),
        }
        for row in rows
        if row["steps steered"] == "all"
    ]


def draw(path: Path, rows: Sequence[Mapping[str, Any]], paths: Mapping[str, Tensor], means: Tensor | None) -> None:
    """The comparison as bars; below, the paths of features at their mean activations `means`."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), layout="constrained")
    whole = [row for row in rows if row["steps steered"] == "all"]
    names = [row["features of"] for row in whole]
    for axis, measure in zip(axes[0], ("explained", "nearest", "harm_per_change"), strict=True):
        values = [row[measure] for row in whole]
        axis.barh(names, values, color=[f"C{at}" for at in range(len(names))])
        for at, row in enumerate(whole):
            axis.plot(row[f"{measure}_95"], [at, at], color="black")
        if measure == "explained":
            axis.set_xlim(min(values) - 0.05, 1)
        axis.invert_yaxis()
        axis.set_title(f"{measure} at equal L0")
    sizes = torch.ones(paths["norm"].shape[1]) if means is None else means
    paths = {**paths, "norm": paths["norm"] * sizes, "added": paths["added"] * sizes}
    half = _PATHS // 2  # those that do most, and those that do most after the first step
    most = [paths["norm"].amax(0), paths["added"][1:].amax(0)]
    shown = [feature for each in most for feature in each.argsort(descending=True)[:half].tolist()]
    steps = list(range(len(paths["norm"])))
    told = ("its direction, in norms of the update", "cosine with its first direction", "what a step adds by itself")
    for axis, measure, text in zip(axes[1], ("norm", "cosine", "added"), told, strict=True):
        low, middle, high = paths[measure].quantile(torch.tensor([0.1, 0.5, 0.9]), dim=1).tolist()
        axis.fill_between(steps, low, high, color="0.85", label="80 % of all features")
        axis.plot(steps, middle, color="0.4", lw=2, label="median")
        for feature in shown:
            axis.plot(steps, paths[measure][:, feature].tolist(), marker="o", label=f"feature {feature}")
        axis.set_xticks(steps)
        axis.set(xlabel="step", title=text)
    axes[1][0].legend(fontsize=7)
    save_figure(figure, path)
