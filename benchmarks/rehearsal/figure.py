"""The rehearsal, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def draw(result: dict[str, Any], path: Path) -> None:
    """Every call over the pods that were ready for it, and what the autoscaler wanted at the end of each phase."""
    figure, (calls, pods) = plt.subplots(
        2, 1, figsize=(13, 6.5), sharex=True, height_ratios=(3, 1.4), constrained_layout=True
    )
    at, took = zip(*result["latencies"], strict=True)
    calls.plot(at, took, ".", color="#4c72b0", markersize=3)
    lost = [(one["at"], one["s"]) for one in result["failed"]]
    if lost:
        calls.plot(*zip(*lost, strict=True), "x", color="#c44e52", label="failed")
    calls.set(ylabel="seconds of a call", yscale="log", title=f"{result['calls']} calls, {len(lost)} failed")
    seconds = [one["at"] for one in result["watched"]]
    pods.step(seconds, [one["ready"] for one in result["watched"]], where="post", color="#55a868", label="ready pods")
    pods.step(seconds, [one["rate"] for one in result["watched"]], where="post", color="0.6", label="calls a second")
    ends = [phase["to"] for phase in result["phases"]]
    pods.plot(
        ends, [phase["wanted"] for phase in result["phases"]], "v", color="#dd8452", label="the autoscaler would want"
    )
    pods.set(xlabel="seconds", ylim=(0, None))
    pods.legend(loc="upper left", ncols=3, fontsize="small")
    for number, phase in enumerate(result["phases"]):
        for axis in (calls, pods):
            axis.axvspan(phase["from"], phase["to"], color="0.5", alpha=0.12 * (number % 2), linewidth=0)
        middle = (phase["from"] + phase["to"]) / 2
        calls.text(
            middle,
            0.98,
            phase["name"],
            transform=calls.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=8,
            rotation=90,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
