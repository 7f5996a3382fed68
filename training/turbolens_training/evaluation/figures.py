"""Figures of an evaluation, each from the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from torch import Tensor

mpl.use("Agg")  # no display
from matplotlib import pyplot as plt

from turbolens_training.evaluation.plots import save_figure

Rows = Sequence[Mapping[str, Any]]


def heat_maps(path: Path, rows: Rows, *, down: str, across: str, values: Mapping[str, str]) -> None:
    """Tables as heat-maps from 0 to 1, side by side: `values` names the columns to show, each with a title.

    A cell without a row, or whose row lacks the value, stays empty; one on which several rows fall shows their mean.
    """
    downs = list(dict.fromkeys(row[down] for row in rows))
    acrosses = list(dict.fromkeys(row[across] for row in rows))
    size = ((1.6 + 0.75 * len(acrosses)) * len(values), 1.2 + 0.38 * len(downs))
    figure, axes = plt.subplots(1, len(values), figsize=size, squeeze=False)
    for axis, (value, title) in zip(axes[0], values.items(), strict=True):
        cells = _mean_cells(rows, downs, acrosses, down, across, value)
        axis.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (i, j), cell in np.ndenumerate(cells):
            if np.isfinite(cell):
                axis.text(j, i, f"{cell:.2f}", ha="center", va="center", fontsize=7, color="w" if cell < 0.6 else "k")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(acrosses)), [str(name) for name in acrosses], fontsize=7, rotation=30, ha="right")
        axis.set_yticks(range(len(downs)), [str(name) for name in downs], fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def _mean_cells(
    rows: Rows, downs: Sequence[Any], acrosses: Sequence[Any], down: str, across: str, value: str
) -> npt.NDArray[np.float64]:
    cells = np.full((len(downs), len(acrosses)), np.nan)
    for i, name in enumerate(downs):
        for j, other in enumerate(acrosses):
            found = [row[value] for row in rows if (row[down], row[across]) == (name, other) and value in row]
            if found:
                cells[i, j] = np.mean(found)
    return cells


def density_histograms(path: Path, frequencies: Mapping[str, npt.NDArray[Any]]) -> None:
    """How often features are active, by block: a histogram of log10 of the share of positions; dead ones are counted
    in the title."""
    figure, axes = plt.subplots(1, len(frequencies), figsize=(3 * len(frequencies), 2.6), squeeze=False, sharey=True)
    for axis, (block, frequency) in zip(axes[0], frequencies.items(), strict=True):
        live = frequency[frequency > 0]
        axis.hist(np.log10(live), bins=np.linspace(-6, 0, 49), color="C0")
        axis.set_title(f"{block}: {len(frequency) - len(live)} of {len(frequency)} never active", fontsize=8)
        axis.set_xlabel("log10 of the share of positions", fontsize=7)
    axes[0][0].set_ylabel("features", fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def scatter(path: Path, rows: Rows, *, x: str, y: str, by: str, limits: tuple[float, float] | None = None) -> None:
    """Points of two columns, a colour for each value of `by`; a cross marks each colour's mean."""
    figure, axis = plt.subplots(figsize=(5.2, 4))
    shown = [row for row in rows if x in row and y in row]
    for index, name in enumerate(dict.fromkeys(row[by] for row in shown)):
        points = np.array([(row[x], row[y]) for row in shown if row[by] == name], float)
        color = f"C{index % 10}"
        axis.scatter(points[:, 0], points[:, 1], s=12, alpha=0.5, color=color, label=str(name))
        axis.scatter(
            points[:, 0].mean(), points[:, 1].mean(), s=90, marker="X", color=color, edgecolors="k", linewidths=0.7
        )
    if limits:
        axis.set(xlim=limits, ylim=limits)
    axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    if shown:
        axis.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def curves(path: Path, rows: Rows, *, x: str, y: str, by: str) -> None:
    """Lines of two columns, each value of `by` a line through its rows in their order; single rows are points."""
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for index, name in enumerate(dict.fromkeys(row[by] for row in rows)):
        points = np.array([(row[x], row[y]) for row in rows if row[by] == name], float)
        marker, size = ("*", 12) if len(points) == 1 else ("o", 4)
        axis.plot(points[:, 0], points[:, 1], color=f"C{index % 10}", lw=0.8, label=str(name), marker=marker, ms=size)
    axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def error_bars(path: Path, rows: Rows, *, x: str, y: str, by: str, across: str) -> None:
    """Points of two columns with their intervals (`NAME_low`, `NAME_high` of the first word of each column's name): a
    panel for each value of `across`, a colour for each value of `by`."""
    panels = list(dict.fromkeys(row[across] for row in rows))
    names = list(dict.fromkeys(row[by] for row in rows))
    wide = min(4, len(panels))
    tall = -(-len(panels) // wide)
    figure, axes = plt.subplots(
        tall, wide, figsize=(3.2 * wide, 2.9 * tall + 0.9), squeeze=False, sharex=True, sharey=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        for row in (row for row in rows if row[across] == panel):
            index = names.index(row[by])
            bars = []
            for column in (x, y):
                low, high = (float(row[f"{column.split('_')[0]}_{end}"]) for end in ("low", "high"))
                bars.append([[max(0.0, row[column] - low)], [max(0.0, high - row[column])]])
            look = {"color": plt.get_cmap("tab20")(index % 20), "marker": "os^D"[index % 4], "ms": 5, "lw": 0.8}
            axis.errorbar(row[x], row[y], xerr=bars[0], yerr=bars[1], ls="", label=str(row[by]), **look)
        counts = sorted({row["pairs"] for row in rows if row[across] == panel})
        axis.set_title(f"{panel} ({', '.join(map(str, counts))} pairs)", fontsize=9)
        axis.grid(alpha=0.3)
    figure.supxlabel(x.replace("_", " "), fontsize=9)
    figure.supylabel(y.replace("_", " "), fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=5, fontsize=7)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.9 / figure.get_figheight()))
    save_figure(figure, path)


def picture_sheet(path: Path, pictures: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Pictures [rows, columns, 3, H, W] in [-1, 1] with their names."""
    pixels = ((pictures.permute(0, 1, 3, 4, 2) + 1) / 2).clamp(0, 1).numpy()
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(1.45 * len(columns), 1.65 * len(rows)), squeeze=False)
    for line, name, shown in zip(axes, rows, pixels, strict=True):
        for axis, picture in zip(line, shown, strict=True):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
        caption = line[0].text(0, 1.04, name, transform=line[0].transAxes, fontsize=6.5)
        caption.set_in_layout(False)  # it runs over the whole row
    for axis, name in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(name, fontsize=6.5)
    figure.tight_layout()
    save_figure(figure, path)
