"""Tables and plots of `docs/performance.md` and `docs/studio.md`, made from what lies in `benchmarks/results/`.

    python -m benchmarks.report

The pages have a pair of marks for each result; what lies between them is written here, and nothing else is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from benchmarks.places import DOCS, RESULTS
from benchmarks.start import memory_table
from turbolens_server.bench.results import describe_machine, to_markdown
from turbolens_server.bench.suite import describe_case
from turbolens_server.files import whole_file, write_file

_MARKS: Final = re.compile(r"(<!-- result (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_COLORS: Final = {"met": "#2a7f3f", "missed": "#b3261e", "undecided": "#8a6d00", None: "#5f6368"}


def section(name: str, results: Path, plots: Path) -> str:
    """What the page says of one result, plot included; where there is none, that there is none."""
    path = results / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    result = json.loads(path.read_text())
    if result["benchmark"] == "kernels":
        return kernels(result)
    if result["benchmark"] == "live_painting":
        return live_painting(result)
    if result["benchmark"] == "coding":
        return coding(result)
    if result["benchmark"] == "stages":
        return stages(result)
    parts = [f"{describe_machine(result['machine'])}; {result['rounds']} interleaved rounds."]
    if result["benchmark"] == "bench":
        speed = result["speed"]
        parts.append(
            f"`{result['model']}`, {result['backend']}, {result['dtype']}, {result['size'][0]} pixels. Measured in the "
            f"same run: {speed['tflops']:.3g} TFLOP/s in a large matrix product, {speed['gb_s']:.3g} GB/s in a large "
            f"copy."
        )
        parts += [f"- {describe_case(case)}." for case in result["cases"]]
    if result["benchmark"] == "many_callers":
        parts += [f"- {_throughput(case)}." for case in result["cases"]]
    if result["benchmark"] == "start":
        parts.append(f"Before: commit {result['before']}.")
        parts.append(memory_table(result["cases"][0]["memory"]))
    if result["benchmark"] == "train_beside_saelens":
        parts.append(f"SAELens {result['sae_lens']}.")
        parts += [f"- {_explained(case)}." for case in result["cases"]]
    if result["benchmark"] == "train_beside_published":
        parts += [f"- {line}." for case in result["cases"] for line in _whole_runs(case)]
    parts.append(to_markdown(result))
    plots.mkdir(parents=True, exist_ok=True)
    draw(result, plots / f"{name}.svg")
    parts.append(f"![Ratios with their 95 % intervals]({plots.name}/{name}.svg)")
    # A list's lines follow one another; all else stands apart.
    text = "\n\n".join(parts)
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", text)


def kernels(result: Mapping[str, Any]) -> str:
    """Plain torch beside the fused kernel that serves, for each kernel and number of pictures."""
    cases = {(case["kernel"], case["k"], case["pictures"], case["contender"]): case["us"] for case in result["cases"]}
    pictures = sorted({case["pictures"] for case in result["cases"]})
    head = ["kernel", "k", *(f"{count} pictures" for count in pictures)]
    lines = [head, ["---"] * len(head)]
    for kernel, k in dict.fromkeys((case["kernel"], case["k"]) for case in result["cases"]):
        pairs = [(cases[kernel, k, count, "plain"], cases[kernel, k, count, "fused"]) for count in pictures]
        lines.append([kernel, str(k), *(f"{plain:.0f} to {fused:.0f} ({fused / plain:.2f})" for plain, fused in pairs)])
    ceilings = result["ceilings"]
    return "\n".join(
        [
            f"{result['gpu']}; torch {result['torch']}, CUDA {result['cuda']}, Triton {result['triton']}; "
            f"{result['rounds']} interleaved rounds. Measured in the same run: {ceilings['tflops']:.0f} TFLOP/s in a "
            f"large matrix product, {ceilings['tb_per_s']:.2f} TB/s in a large copy.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )


def live_painting(result: Mapping[str, Any]) -> str:
    """From the pointer's release to the picture, its parts, and the engine's own time in the same run."""
    rows = [("release to picture", result["release_to_picture_ms"])]
    rows += [(f"… {name}", part) for name, part in result["parts"].items()]
    rows += [("the engine alone", result["engine_ms"]), ("the SDK's call, steered", result["sdk_steered_ms"])]
    lines = [["", "p50, ms", "p95, ms", "share"], ["---"] * 4]
    for name, part in rows:
        share = f"{part['share']:.0%}" if "share" in part else ""
        lines.append([name, f"{part['p50']:.0f}", f"{part['p95']:.0f}", share])
    load = result["first_load"]
    return "\n".join(
        [
            f"{describe_machine(result['machine'])}; {result['strokes']} strokes, each beside one run of the engine "
            f"and one call of the SDK. The median is {result['ratio_to_engine']:.2f} times the engine's own (aim: at "
            f"most {result['aim']}) and {result['ratio_to_sdk_steered']:.2f} times the SDK's call.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"The first load is {load['compressed_bytes'] / 1000:.0f} kB compressed, interactive after "
            f"{load['interactive_ms']:.0f} ms and first painted after {load['painted_ms']:.0f} ms.",
        ]
    )


def coding(result: Mapping[str, Any]) -> str:
    """Each way to code a picture: how long, and how large."""
    lines = [["pictures", "size", "coded as", "ms each", "kB each"], ["---"] * 5]
    for case in result["cases"]:
        for row in case["rows"]:
            ms, kb = row["median_ms"] / case["of"], case["kb"][row["name"]]
            lines.append([*case["label"].values(), row["name"], f"{ms:.2f}", f"{kb:.1f}"])
    told = f"{describe_machine(result['machine'])}; {result['rounds']} interleaved rounds."
    return "\n".join([told, "", *(f"| {' | '.join(line)} |" for line in lines)])


def stages(result: Mapping[str, Any]) -> str:
    """Milliseconds of each stage, for each number of pictures."""
    cases = [
        (case["label"]["pictures"], {row["name"]: row["median_ms"] for row in case["rows"]}) for case in result["cases"]
    ]
    lines = [["stage, ms", *(f"{pictures} pictures" for pictures, _ in cases)], ["---"] * (1 + len(cases))]
    lines += [[name, *(f"{taken[name]:.1f}" for _, taken in cases)] for name in cases[0][1]]
    told = f"{describe_machine(result['machine'])}; {result['backend']}; {result['rounds']} interleaved rounds."
    return "\n".join([told, "", *(f"| {' | '.join(line)} |" for line in lines)])


def _throughput(case: Mapping[str, Any]) -> str:
    label = ", ".join(f"{value} {name}" for name, value in case["label"].items())
    return f"{label}: " + ", ".join(f"{name} {value:.1f} pictures/s" for name, value in case["pictures_per_s"].items())


def _explained(case: Mapping[str, Any]) -> str:
    label, size, tokens = case["label"], case["size"], case["tokens"]
    each = ", ".join(f"{name} {explained:.3f}" for name, explained in case["explained"].items())
    return (
        f"{label['data']}, {size['d_model']} x {size['d_sae']}, k {size['k']}, batch {size['batch']}, after "
        f"{label['steps']:,} steps on {tokens['training']:,} tokens: explained variance of "
        f"{tokens['held out']:,} held-out tokens {each}"
    )


def _whole_runs(case: Mapping[str, Any]) -> list[str]:
    """A line for each contender: what a million tokens of each block cost, and what was learnt."""
    tokens, lines = case["tokens"], []
    for row in case["rows"]:
        name, millions = row["name"], tokens["round"] / 1e6
        seconds, pictures = row["median_ms"] / 1000 / millions, case["pictures_ms"][name] / 1000 / millions
        explained = ", ".join(f"{block} {found:.3f}" for block, found in case["explained"][name].items())
        lines.append(
            f"{name}: {seconds:,.0f} s ({pictures:,.0f} s of them for pictures) and "
            f"{case['bytes'][name] / 1e9 / (tokens['run'] / 1e6):.2f} GB written for a million tokens of each block; "
            f"explained variance of {tokens['held out']:,} held-out tokens {explained}"
        )
    return lines


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The ratios of a result as points with their intervals, and what each should keep to as a tick."""
    found = [
        (f"{row['name']} / {comparison['against']} ({_short(case['label'])})", comparison)
        for case in result["cases"]
        for row in case["rows"]
        for comparison in row["comparisons"]
    ]
    # Without a salt and a date of its own, the same result would make another file every time.
    with mpl.rc_context({"svg.hashsalt": "turbolens", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(8, 0.9 + 0.26 * len(found)), layout="constrained")
        for at, (_, comparison) in enumerate(found):
            ratio, aim = comparison["ratio"], comparison["aim"]["ratio"]
            color = _COLORS[comparison["verdict"]]
            axes.plot([ratio["low"], ratio["high"]], [at, at], color=color, linewidth=2)
            axes.plot(ratio["median"], at, "o", color=color, markersize=4)
            if aim is not None:
                axes.plot([aim, aim], [at - 0.35, at + 0.35], color="black", linewidth=1)
        axes.axvline(1, color="#bbbbbb", linewidth=1, zorder=0)
        axes.set_yticks(range(len(found)), [name for name, _ in found])
        axes.invert_yaxis()
        axes.set_xlabel("time over the other's time; the black tick is the most that is aimed at")
        with whole_file(path) as file:
            figure.savefig(file, format=path.suffix[1:], metadata={"Date": None})
        plt.close(figure)


def _short(label: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} {name}" for name, value in label.items())


def rewrite(page: str, sections: Mapping[str, str]) -> str:
    """A page with the text between the marks of each result replaced.

    Raises:
        ValueError: a section has no marks on the page.
    """
    if missing := sections.keys() - set(marked(page)):
        raise ValueError(f"the page has no marks for {', '.join(sorted(missing))}")

    def between(found: re.Match[str]) -> str:
        name = found["name"]
        return f"{found[1]}\n{sections[name]}\n\n{found[3]}" if name in sections else found[0]

    return _MARKS.sub(between, page)


def marked(page: str) -> Sequence[str]:
    """The results that a page has marks for, in order."""
    return [found["name"] for found in _MARKS.finditer(page)]


def main() -> None:
    """Rewrite the pages."""
    plots = DOCS / "performance"
    for page in (DOCS / "performance.md", DOCS / "studio.md"):
        text = page.read_text()
        write_file(page, rewrite(text, {name: section(name, RESULTS, plots) for name in marked(text)}))
        print(f"wrote {page}")


if __name__ == "__main__":
    main()
