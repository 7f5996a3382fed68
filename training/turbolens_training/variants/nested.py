"""`turbolens train nested`: one nested SAE at every k and prefix, beside a plain TopK trained for each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from turbolens_server.files import write_file
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.sae import Codes, Sae
from turbolens_training.activations.stream import HELD_OUT, SceneStream
from turbolens_training.evaluation.plots import save_figure
from turbolens_training.evaluation.probes import best_probe, splits
from turbolens_training.measures.concepts import Concept, check_truth
from turbolens_training.measures.report import fill, markdown_table
from turbolens_training.sae.shipped import NESTED
from turbolens_training.variants.config import NestedConfig, VariantsConfig
from turbolens_training.variants.pushes import Bench, Choice, make_pushes
from turbolens_training.variants.reconstruction import Fit
from turbolens_training.variants.trained import trained

ATTRIBUTES: Final = ("shape", "color", "texture", "size")
"""Those that `up.0.0` of `mini` carries."""
UNIFORM, REVERSE = "nested, uniform", "nested, reverse"
MSAE, MATRYOSHKA = "2502.20578", "2503.17547"


@dataclasses.dataclass(frozen=True)
class Point:
    """One SAE, read at one k and width."""

    kind: str
    k: int
    width: int
    sae: Sae

    def encode(self, x: Tensor) -> Codes:
        if self.kind == "topk":
            return self.sae.encode(x)
        return self.sae.encode(x, k=self.k, prefix=self.width)


def points(config: VariantsConfig) -> Iterator[Point]:
    """Both weightings and the plain ones, at every k of all features and at every prefix at the k of the bundle."""
    ks, own = sorted((NESTED["k"], *NESTED["nested_k"])), NESTED["k"]
    d_sae = config.training("any", k=own).d_sae
    settings = [(k, d_sae) for k in ks] + [(own, width) for width in NESTED["prefixes"]]
    for k, width in settings:
        name = f"topk-{k}" if width == d_sae else f"topk-{k}-of-{width}"
        more = {} if width == d_sae else {"d_sae": width}
        yield Point("topk", k, width, trained(config.training(name, k=k, **more)))
    for weights in ("uniform", "reverse"):
        more = {} if weights == "uniform" else {"level_weights": weights}
        sae = trained(config.training(f"nested-{weights}", **NESTED, **more))
        for k, width in settings:
            yield Point(f"nested, {weights}", k, width, sae)


def told(active_by_width: Mapping[str, tuple[Any, Any, int]]) -> list[dict[str, object]]:
    """For each set of features and attribute, the mean AUROC of the best single feature for a value."""
    rows = []
    for name, (active, truth, d_sae) in active_by_width.items():
        by_attribute: dict[str, list[float]] = {}
        for split in splits(active, truth, d_sae):
            if split.candidate.region == "thing":
                by_attribute.setdefault(split.candidate.attribute, []).append(best_probe(split)[1])
        means = {name: round(sum(found) / len(found), 3) for name, found in by_attribute.items()}
        rows.append({"features": name, "n": len(truth.codes), **means})
    return rows


def measure_nested(config: NestedConfig) -> None:
    """Train what is missing, measure all, and write tables and picture to `out`/nested."""
    every = list(points(config))
    engine = load_engine(model=config.model, device=config.device, saes=[])
    check_truth(engine, "nested SAEs of other models are measured by turbolens train eval")
    concepts = [concept for concept in Concept.all() if concept.attribute in ATTRIBUTES]
    stream = SceneStream(engine, seed=config.seed, split=HELD_OUT, images=32)
    held_out = torch.cat(
        [stream.updates(i).by_block[config.block][0] for i in range(-(-config.pictures // 32))]
    )  # [N, P, d_model]
    choice = Choice.draw(engine, config.block, config.choice_pictures, seed=config.seed)
    seen = choice.updates()[0]
    bench = Bench(engine, config.block, concepts, config.scenes, 1, config.seed)
    rows: list[dict[str, Any]] = []
    for point in tqdm(every, desc="nested", unit="setting"):
        fit = Fit.of(held_out, point.sae.decode(point.encode(held_out)))
        rows.append({"kind": point.kind, "k": point.k, "width": point.width, **fit.row()})
        if point.kind != REVERSE:
            pushes = make_pushes(point.sae, choice, point.encode(seen), concepts, config.features)
            rows[-1] |= bench.best(pushes, config.lengths).row()
    sets: dict[str, tuple[Any, Any, int]] = {}
    for point in every:
        if point.k == NESTED["k"]:
            sets[f"{point.kind}, {point.width}"] = (*choice.observe(point.encode(seen)), point.sae.W_dec.shape[0])
    coarse = told(sets)
    folder = config.out / "nested"
    claims = judge_claims(rows, coarse)
    for name, table in (("curve", rows), ("coarse", coarse), ("claims", claims)):
        write_file(folder / f"{name}.json", json.dumps(table, indent=1) + "\n")
    draw(folder / "nested.png", rows, coarse)
    write_file(folder / "README.md", "\n".join(_page(rows, coarse, claims, config)))
    fill(config.out / "nested.md", "curve", short(rows))
    fill(config.out / "nested.md", "claims", markdown_table(claims))
    config.tell(folder / "README.md", report=folder / "README.md", claims=claims)


def judge_claims(rows: Sequence[Mapping[str, Any]], coarse: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Each claim of the papers that these pictures can test: what they say, what was found, and whether it holds."""
    at = {(row["kind"], row["k"], row["width"]): row for row in rows}
    full, own = max(row["width"] for row in rows), NESTED["k"]
    ks = sorted({row["k"] for row in rows})
    widths = sorted({row["width"] for row in rows} - {full})
    found: list[dict[str, object]] = []

    def claim(text: str, paper: str, measure: str, least: float, pairs: Sequence[tuple[Any, Any]]) -> None:
        gaps = [at[mine][measure] - at[other][measure] for mine, other in pairs]
        names = [f"k {mine[1]}, {mine[2]}: {gap:+.3f}" for (mine, _), gap in zip(pairs, gaps, strict=True)]
        holds = "yes" if min(gaps) >= least else "no"
        if f"{measure}_95" in at[pairs[0][0]]:
            ends = [(at[mine][f"{measure}_95"], at[other][f"{measure}_95"]) for mine, other in pairs]
            worse = any(mine[1] < other[0] for mine, other in ends)
            better = all(mine[0] > other[1] for mine, other in ends)
            if (holds == "no" and not worse) or (least == 0 and holds == "yes" and not better):
                holds = "not told apart"
        n = at[pairs[0][0]].get("n" if measure == "nearest" else "pictures", "")
        found.append({"claim": text, "paper": paper, "n": n, "here": "; ".join(names), "holds": holds})

    for kind in (UNIFORM, REVERSE):
        how = kind.partition(", ")[2]
        claim(f"{how}: one SAE explains as much at each k as a TopK trained at it, within 0.01", MSAE, "explained",
              -0.01, [((kind, k, full), ("topk", k, full)) for k in ks])  # fmt: skip
        claim(f"{how}: each prefix explains as much as a TopK of its size, within 0.01", MATRYOSHKA, "explained", -0.01,
              [((kind, own, width), ("topk", own, width)) for width in widths])  # fmt: skip
        if kind == REVERSE:  # is not steered
            continue
        claim(f"{how}: it steers as well at each k as a TopK trained at it, within 0.05", "not asked", "nearest", -0.05,
              [((kind, k, full), ("topk", k, full)) for k in ks])  # fmt: skip
        claim(f"{how}: each prefix steers as well as a TopK of its size, within 0.05", "not asked", "nearest", -0.05,
              [((kind, own, width), ("topk", own, width)) for width in widths])  # fmt: skip
    claim("reverse weighting explains more at the smallest k than uniform", MSAE, "explained", 0.0,
          [((REVERSE, ks[0], full), (UNIFORM, ks[0], full))])  # fmt: skip
    found += list(_headline(at[UNIFORM, ks[-1], full]))
    first = {row["features"]: row for row in coarse}
    few, whole = first[f"{UNIFORM}, {widths[0]}"], first[f"{UNIFORM}, {full}"]
    shares = {name: few[name] - whole[name] for name in ATTRIBUTES}
    found.append(
        {
            "claim": f"features go from coarse to fine: the first {widths[0]} tell of an attribute as well as all do, "
            "within 0.05 of AUROC",
            "paper": f"{MSAE}; {MATRYOSHKA}",
            "n": few.get("n", ""),
            "here": "; ".join(f"{name} {few[name]:.3f} of {whole[name]:.3f}" for name in ATTRIBUTES),
            "holds": ", ".join(name for name, gap in shares.items() if gap >= -0.05) or "of none",
        }
    )
    return found


def _headline(row: Mapping[str, Any]) -> Iterator[dict[str, object]]:
    """The figures of 2502.20578's abstract, of CLIP's embeddings with about 80 % of the features silent."""
    silent = 1 - row["k"] / row["width"]
    for text, paper, measure, bound in (
        ("cosine of reconstructions", "0.99", "cosine", 0.99),
        ("variance left unexplained", "below 0.1", "explained", 0.9),
    ):
        low, high = row[f"{measure}_95"]
        told = (row[measure], low, high) if measure == "cosine" else (1 - row[measure], 1 - high, 1 - low)
        yield {
            "claim": f"{text} where few fire ({silent:.0%} silent here)",
            "paper": f"{MSAE}: {paper} at about 80 %",
            "n": row["pictures"],
            "here": f"{told[0]:.4f} ({told[1]:.4f} to {told[2]:.4f})",
            "holds": "yes" if low >= bound else "no" if high < bound else "not told apart",
        }


def short(rows: Sequence[Mapping[str, Any]]) -> str:
    """The curves as the page shows them: a row for each kind and measure, and how far the intervals go."""
    full = max(row["width"] for row in rows)
    names = {(row["k"], row["width"]): f"k {row['k']}" if row["width"] == full else f"first {row['width']}"
             for row in rows}  # fmt: skip
    table: list[dict[str, object]] = []
    ends = []
    for measure, text in (("explained", "explained"), ("cosine", "cosine"), ("nearest", "steered to the value")):
        some = [row for row in rows if measure in row]
        for kind in dict.fromkeys(row["kind"] for row in some):
            label = "a TopK trained for each" if kind == "topk" else kind
            row: dict[str, object] = {"": f"{text}, {label}"}
            for each in (each for each in some if each["kind"] == kind):
                row[names[each["k"], each["width"]]] = f"{each[measure]:.{2 if measure == 'nearest' else 3}f}"
            table.append(row)
        known = [each[f"{measure}_95"] for each in some if f"{measure}_95" in each]
        halves = [(high - low) / 2 for low, high in known]
        if halves:
            ends.append(f"{measure} ± {min(halves):.3f} to {max(halves):.3f}")
    return f"{markdown_table(table)}\nIntervals at 95 %: {', '.join(ends)}.\n"


def draw(path: Path, rows: Sequence[Mapping[str, Any]], coarse: Sequence[Mapping[str, Any]]) -> None:
    """Three curves over k, three over the prefix, and what the first features tell of."""
    full, own = max(row["width"] for row in rows), NESTED["k"]
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for line, (over, fixed) in zip(axes, (("k", ("width", full)), ("width", ("k", own))), strict=True):
        for axis, measure in zip(line[:3], ("explained", "cosine", "nearest"), strict=True):
            for kind in kinds:
                some = [row for row in rows if row["kind"] == kind and row[fixed[0]] == fixed[1] and measure in row]
                if not some:
                    continue
                some.sort(key=lambda row: row[over])
                xs, ys = [row[over] for row in some], [row[measure] for row in some]
                axis.plot(xs, ys, marker="o", label=kind)
                if f"{measure}_95" in some[0]:
                    low, high = zip(*(row[f"{measure}_95"] for row in some), strict=True)
                    axis.fill_between(xs, low, high, alpha=0.12)
            axis.set_xscale("log", base=2)
            axis.set_xticks(xs, [str(x) for x in xs])
            axis.set(xlabel="k, all features" if over == "k" else f"first features, k {own}", ylabel=measure)
    axes[0][0].legend()
    for axis, kind in ((axes[0][3], UNIFORM), (axes[1][3], "topk")):
        shown = [row for row in coarse if str(row["features"]).startswith(f"{kind}, ")]
        shown.sort(key=lambda row: int(str(row["features"]).rpartition(" ")[2]))
        names = [name for name in shown[0] if name not in ("features", "n")]
        image = axis.imshow([[row[name] for name in names] for row in shown], vmin=0.5, vmax=1, aspect="auto")
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set_yticks(range(len(shown)), [str(row["features"]).rpartition(" ")[2] for row in shown])
        for y, row in enumerate(shown):
            for x, name in enumerate(names):
                axis.text(x, y, f"{row[name]:.2f}", ha="center", va="center", fontsize=7, color="white")
        axis.set_title(f"{kind}: AUROC of the best of the first features", fontsize=9)
    figure.colorbar(image, ax=axes[:, 3])
    save_figure(figure, path)


def _page(
    rows: Sequence[Mapping[str, Any]], coarse: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]],
    config: VariantsConfig,
) -> Iterator[str]:  # fmt: skip
    yield "# Nested SAEs beside plain ones\n"
    yield (
        f"Made by `turbolens train nested`: `{config.block}` of `{config.model}`, all trained alike, {config.steps:,} "
        f"steps of {config.batch:,} tokens. What it is: [nested.md](../nested.md).\n"
    )
    yield "## Claims\n"
    yield markdown_table(claims)
    yield (
        "## k and prefix\n\nExplained variance and cosine of held-out pictures in one step; the interval is a "
        "bootstrap over pictures. `nearest`: share of steered pictures nearest to the wanted value of all, of n, at "
        "the `length` of a push (in norms of the update) that was best on scenes of their own.\n"
    )
    yield markdown_table(rows)
    yield (
        "## Coarse to fine\n\nMean over an attribute's values of the AUROC of the best single feature, chosen on one "
        "half of n pictures and scored on the other.\n"
    )
    yield markdown_table(coarse)
    yield "![Curves](nested.png)\n"
