"""A sweep as tables, as a figure, and as it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")  # no display
from matplotlib import pyplot as plt

from turbolens_server.files import write_files
from turbolens_training.evaluation.plots import save_figure
from turbolens_training.measures.report import markdown_table

Results = Sequence[Mapping[str, Any]]

_REFUSED: Final = "refused: features are of whole runs"
_MARKS: Final = {"batch-topk": "s", "jumprelu": "^", "matryoshka": "D", "temporal": "*"}


def write_sweep(folder: Path, results: Results) -> None:
    """Write sweep.md, sweep.json and sweep.png."""
    parts = [
        "# A sweep of SAEs",
        "On held-out data, as served: explained variance / mean number of active features / dead features.",
        markdown_table([sweep_row(result) for result in results]),
        "![Explained variance against the number of active features](sweep.png)",
        markdown_table([architecture_row(result) for result in results if "served" in result]),
    ]
    files = {"sweep.md": "\n\n".join(parts), "sweep.json": json.dumps(list(results), indent=1) + "\n"}
    write_files({folder / name: content for name, content in files.items()})
    plot_sweep(folder / "sweep.png", results)


def sweep_row(result: Mapping[str, Any]) -> dict[str, object]:
    """One point: what its SAEs explain, with how many features, and how many are dead."""
    cells = {
        row["block"]: f"{row['explained_variance']:.3f} / {row['l0_mean']:.1f} / {100 * row['dead']:.1f} %"
        for row in result["quality"]
    }
    named = {name: result[name] for name in ("architecture", "k", "d_sae")}
    return {**named, **cells, "seconds per SAE": result["seconds_per_sae"]}


def architecture_row(result: Mapping[str, Any]) -> dict[str, object]:
    """What became of one architecture, from training to evaluation."""
    served, recipe = result["served"], result["recipe"]
    apart = served["largest_difference"]
    below = "; ".join(f"{block}: {', '.join(why)}" for block, why in result["below_gates"].items() if why)
    row: dict[str, object] = {
        "architecture": f"{result['architecture']}, k {result['k']}, d_sae {result['d_sae']}",
        "trained": f"{recipe['steps']:,} steps of {recipe['batch']:,}",
        "exported": below or "passes every gate",
        "served as": served["architecture"],
        "positions served the same features": (
            f"{served['same_features']:,} of {served['positions']:,}, {f'within {apart:.0e}' if apart else 'exactly'}"
        ),
    }
    if "splice" not in result:
        return {**row, "spliced in, all blocks": _REFUSED, "mean best AUROC": _REFUSED}
    (spliced,) = (line for line in result["splice"] if line["block"] == "all")
    means = []
    for block in result["below_gates"]:
        scores = [line["auroc"] for line in result["probes"] if line["block"] == block]
        means.append(f"{block} {sum(scores) / len(scores):.3f}")
    attributes = f"attributes right {spliced['right']:.3f}, then {spliced['right_spliced']:.3f}"
    return {
        **row,
        "spliced in, all blocks": f"{spliced['psnr']:.1f} dB, {attributes}",
        "mean best AUROC": ", ".join(means),
    }


def plot_sweep(path: Path, results: Results) -> None:
    """Explained variance against L0, a panel for each block: TopK as a line for each d_sae, the others as marks."""
    blocks = [row["block"] for row in results[0]["quality"]]
    sizes = sorted({result["d_sae"] for result in results})
    ticks = sorted({result["k"] for result in results})
    figure, axes = plt.subplots(1, len(blocks), figsize=(3.3 * len(blocks), 3.4), squeeze=False)
    for axis, block in zip(axes[0], blocks, strict=True):
        lines: dict[int, list[tuple[float, float]]] = {}
        for result in results:
            (row,) = (row for row in result["quality"] if row["block"] == block)
            at, architecture = (row["l0_mean"], row["explained_variance"]), result["architecture"]
            if architecture == "topk":
                lines.setdefault(result["d_sae"], []).append(at)
                continue
            color = f"C{sizes.index(result['d_sae'])}"
            axis.plot(*at, _MARKS[architecture], color=color, mec="k", ms=8, mew=0.7, label=architecture)
        for d_sae, points in sorted(lines.items()):
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=f"C{sizes.index(d_sae)}", label=f"topk, {d_sae}")
        axis.set(title=block, xlabel="active features at a position", xscale="log")
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("explained variance")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)
