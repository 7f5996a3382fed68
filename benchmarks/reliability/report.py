"""The table and plots of `docs/reliability.md`, made from the results.

python -m benchmarks.reliability.report
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from benchmarks.places import DOCS
from benchmarks.reliability.results import FOLDER, load
from benchmarks.report import rewrite
from turbolens_server.files import write_file

_LINES: Final = {
    "overload": ("ten times too many calls for {seconds:.0f} s", [
        ("accepted and lost", "0", "{accepted_and_lost} of {served}; {turned_back} turned back before they were read"),
        ("refusals p99", "< 50 ms", "{refusal_ms_p99} ms"),
        ("health", "< 200 ms", "p99 {health_ms_p99} ms, most {health_ms_most} ms"),
        ("throughput", "≥ 0.9 of the best", "{throughput_of_best}"),
    ]),
    "greedy": ("a modest caller beside a greedy one", [
        ("p95", "≤ 1.5 times that beside an equal",
         "{times} times ({p95_ms_beside_a_greedy_one} to {p95_ms_beside_an_equal} ms)"),
    ]),
    "leaving": ("half of the callers leave", [
        ("others lost", "0", "{others_lost} of {survivors_expected}"),
        ("others' pictures", "bit-equal",
         "{survivors_unlike_as_large} of {survivors} differ from a batch as large, {survivors_unlike_alone} from one "
         "alone, by at most {largest_difference_of_255} of 255"),
        ("U-Net steps of those who left", "counted", "{steps_saved} saved, {steps_wasted} wasted"),
    ]),
    "stopping": ("SIGTERM under load", [
        ("accepted and lost", "0", "{accepted_and_lost} of {answered}, ended after {seconds_to_end} s"),
    ]),
    "killed": ("`kill -9` of one of two", [("calls of the SDK lost", "0", "{failed} of {calls}")]),
    "repeated": ("a request sent three times", [
        ("pictures made", "one each", "{pictures_made} for {requests} requests sent {sent} times"),
    ]),
    "fuzz": ("{requests:,} bad requests", [
        ("`INTERNAL` or `UNKNOWN`", "0", "{faults_of_the_server}"),
        ("crashes", "0", "{crashes}"),
        ("memory", "flat", "{memory_mib_first_and_last[0]} to {memory_mib_first_and_last[1]} MiB"),
    ]),
    "growth": ("{calls:,} calls of one SDK client", [("growth", "< 5 MiB", "{grown_mib} MiB")]),
    "soak": ("{minutes:.0f} minutes of mixed callers", [
        ("failed", "0", "{failed}; {pictures} pictures"),
        ("memory", "flat", "{memory_mib_per_minute} MiB a minute"),
        ("descriptors", "flat", "{descriptors_last}, most {descriptors_most}"),
        ("p50, first and last third", "flat",
         "{p50_ms_first_and_last_third[0]:.0f}, {p50_ms_first_and_last_third[1]:.0f} ms"),
    ]),
    "overhead": ("a call beside the engine alone; TLS, token, metrics, traces on", [
        ("added", "< 3 ms or 5 %", "{added_ms[0]} ms ({added_ms[1]} to {added_ms[2]}), {ratio[0]} times: {verdict}"),
    ]),
}  # fmt: skip


def _derived(result: dict[str, Any]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    codes = result.get("codes", {})
    more["served"], more["answered"] = codes.get("OK", 0), sum(codes.values())
    more["turned_back"] = result.get("refused_before_a_handler", 0)
    if "survivors" in result:
        more["others_lost"] = result["survivors_expected"] - result["survivors"]
    if "server_alive" in result:
        more["crashes"] = 0 if result["server_alive"] else 1
    return {**result, **more}


def table(folder: Path = FOLDER) -> str:
    """Every scenario: what was measured beside its aim."""
    lines = [["scenario", "figure", "aim", "measured", "load"], ["---"] * 5]
    for name, (scenario, figures) in _LINES.items():
        result = load(name, folder)
        if result is None:
            lines += [[name, figure, aim, "not measured yet", ""] for figure, aim, _ in figures]
            continue
        fields = _derived(result)
        about = f"[{scenario.format(**fields)}](../benchmarks/results/reliability/{name}.json)"
        for number, (figure, aim, told) in enumerate(figures):
            first = number == 0
            lines.append([about if first else "", figure, aim, told.format(**fields), str(result["load"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(plots: Path, folder: Path = FOLDER) -> None:
    """What shows better than it reads."""
    plots.mkdir(parents=True, exist_ok=True)
    if (found := load("overload", folder)) is not None:
        figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
        for code, color, name in (("OK", "#2a7f3f", "served"), ("RESOURCE_EXHAUSTED", "#b3261e", "refused")):
            points = [(at, took) for at, took, said in found["calls"] if said == code]
            if points:
                axis.plot(*zip(*points, strict=True), ".", color=color, markersize=2, label=name)
        axis.axhline(0.05, color="0.6", linewidth=1)
        axis.set(yscale="log", xlabel="seconds", ylabel="seconds of a call")
        axis.legend(markerscale=5)
        _save(figure, plots / "overload.png")
    if (found := load("soak", folder)) is not None:
        figure, axes = plt.subplots(3, 1, figsize=(10, 6), sharex=True, layout="constrained")
        minutes = [one["at"] / 60 for one in found["watched"]]
        named = (("memory_mib", "MiB"), ("descriptors", "descriptors"), ("p50_ms", "p50 of a picture, ms"))
        for axis, (key, name) in zip(axes, named, strict=True):
            axis.plot(minutes, [one[key] for one in found["watched"]], color="#4c72b0")
            axis.set(ylabel=name, ylim=(0, None))
        axes[-1].set(xlabel="minutes")
        _save(figure, plots / "soak.png")
    if (found := load("fuzz", folder)) is not None:
        figure, axis = plt.subplots(figsize=(10, 3), layout="constrained")
        seen = found["watched"]
        axis.plot([one["requests"] for one in seen], [one["memory_mib"] for one in seen], color="#4c72b0")
        axis.set(xlabel="requests", ylabel="MiB", ylim=(0, None))
        _save(figure, plots / "fuzz.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Rewrite the page's table and redraw its plots."""
    page = DOCS / "reliability.md"
    draw(DOCS / "reliability")
    write_file(page, rewrite(page.read_text(), {"shown": table()}))
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
