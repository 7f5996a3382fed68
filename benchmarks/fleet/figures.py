"""What a fleet does, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

COLORS = {"random": "#c44e52", "round robin": "#4c72b0", "least loaded": "#55a868", "one queue": "#8172b3"}


def draw_study(result: dict[str, Any], path: Path) -> None:
    """The p99 of each policy over the load, and around the loss of a server."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), constrained_layout=True)
    for axis, pictures in zip(axes, (1, 4), strict=False):
        for policy, color in COLORS.items():
            rows = [r for r in result["policies"] if r["policy"] == policy and r["pictures of a call"] == pictures]
            rows = [r for r in rows if not r["refused"]]
            axis.plot([r["pictures_per_s"] for r in rows], [r["p99_s"] for r in rows], "o-", color=color, label=policy)
        axis.axvline(result["most_pictures_per_s"], color="0.6", linestyle=":", label="all in batches of 8")
        axis.set(xlabel="pictures a second", ylabel="p99 of a call, seconds", ylim=(0, None),
                 title=f"{result['servers']} servers, calls of {pictures} picture{'s' * (pictures > 1)}")  # fmt: skip
        axis.legend()
    axis = axes[2]
    loads = sorted({one["pictures_per_s"] for one in result["losses"]})
    for one in result["losses"]:
        color = ("#55a868", "#dd8452", "#c44e52")[loads.index(one["pictures_per_s"])]
        style = "-" if one["cold_start_s"] < 60 else "--"
        label = f"{one['pictures_per_s'] / result['most_pictures_per_s']:.0%} load, start of {one['cold_start_s']:g} s"
        label += f", {one['refused']:,} refused" if one["refused"] else ""
        axis.plot(
            [w["from_s"] for w in one["windows"]], [w["p99_s"] for w in one["windows"]], style, color=color, label=label
        )
    axis.axvline(40, color="0.6", linestyle=":")
    axis.set(xlabel="seconds; a server is lost at 40", ylabel="p99 of those answered, by five seconds", ylim=(0, 1.5),
             title="A server is lost, and another starts")  # fmt: skip
    axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_check(result: dict[str, Any], path: Path) -> None:
    """How long calls took, real beside simulated, as the share that was answered by then."""
    figure, axes = plt.subplots(
        1, len(result["cases"]), figsize=(4 * len(result["cases"]), 3.8), constrained_layout=True
    )
    for axis, one in zip(axes, result["cases"], strict=True):
        for name, color, style in (("real_s", "#4c72b0", "-"), ("simulated_s", "#dd8452", "--")):
            took = one[name]
            axis.plot(took, np.linspace(0, 1, len(took)), style, color=color, label=name.removesuffix("_s"))
        label = one["label"]
        axis.set(xlabel="seconds", ylabel="share of the calls", ylim=(0, 1.01),
                 title=f"{label['servers']} processes, {label['calls a second']:g} calls a second")  # fmt: skip
        axis.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
