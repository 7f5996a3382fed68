"""The dose table as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from turbolens_server.files import whole_file

mpl.use("Agg")  # no display
from matplotlib import pyplot as plt


def plot_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Share of pictures nearest to a value of all, and of other attributes right (dashed), by strength.

    A panel for each attribute.
    """
    attributes = list(dict.fromkeys(row["attribute"] for row in rows))
    figure, axes = plt.subplots(1, max(1, len(attributes)), figsize=(3.2 * max(1, len(attributes)), 3.2), squeeze=False)
    for axis, attribute in zip(axes[0], attributes, strict=False):
        curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["attribute"] == attribute:
                curves.setdefault((row["value"], row["features"]), []).append(row)
        values = list(dict.fromkeys(value for value, _ in curves))
        for (value, _), points in curves.items():
            strengths = [point["strength"] for point in points]
            color = f"C{values.index(value)}"
            axis.plot(strengths, [p["nearest"] for p in points], color=color, lw=1.8, label=value)
            axis.plot(strengths, [p["others_right"] for p in points], color=color, lw=0.6, ls="--")
        axis.set(title=attribute, xlabel="strength (mean activations)", ylim=(-0.03, 1.03))
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("share")
    figure.tight_layout()
    save_figure(figure, path)


def labelled_grid(
    path: Path, names: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[npt.NDArray[np.uint8]]]
) -> None:
    """Rows of pictures [height, width, 3], each row with its name above it, each column with its own below all."""
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(1.5 * len(columns), 1.7 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, name, pictures in zip(axes, names, rows, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
        row[-1].set_title(" ", fontsize=7)  # the room that the name, which is wider than a picture, is written in
        row[0].text(0, 1.05, name, transform=row[0].transAxes, fontsize=7, in_layout=False)
    for axis, column in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(column, fontsize=7)
    save_figure(figure, path)


def contact_strip(
    path: Path, strips: Sequence[tuple[str, str, Sequence[npt.NDArray[np.uint8]]]], strengths: Sequence[float]
) -> None:
    """Rows of pictures, each (name, prompt, a picture [height, width, 3] for every strength)."""
    figure, axes = plt.subplots(
        len(strips), len(strengths), figsize=(1.5 * len(strengths), 1.75 * len(strips)), squeeze=False
    )
    for row, (name, prompt, pictures) in zip(axes, strips, strict=True):
        for axis, picture, strength in zip(row, pictures, strengths, strict=True):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f" \n{strength:+g}", fontsize=7)  # below the room for the prompt, which is wider
        row[0].set_ylabel(name, fontsize=6)
        row[0].text(0, 1.17, prompt, transform=row[0].transAxes, fontsize=6, in_layout=False)
    figure.tight_layout()
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG and let go of it."""
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)
