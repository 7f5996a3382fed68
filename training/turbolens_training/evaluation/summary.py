"""The account of the SAEs that ship: tables and pictures of a rebuild, put together for people and for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from turbolens_server.files import write_files
from turbolens_training.measures.report import markdown_table

_PICTURES: Final = ("dose.png", "strips.png")
_TABLES: Final = ("quality", "labels", "dose/dose", "dose/blocks", "dose/recipe")


_STEERS: Final = 0.5
"""Share of pictures, nearest of all values, below which a table says that a concept does not steer."""


def chosen_rows(dose: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each concept's curve the row of the strength that was chosen on other scenes, beside what is so unsteered.

    `nearer` and `nearest`: shares of pictures nearer to the wanted value than to their own, and nearest to it of all
    values; with intervals of 95 %.
    """
    start = {(row["attribute"], row["value"]): row for row in dose if row["strength"] == 0}
    table = []
    for row in dose:
        if not row["chosen"]:
            continue
        unsteered = start[row["attribute"], row["value"]]
        table.append(
            {
                "attribute": row["attribute"],
                "value": row["value"],
                "call": f"`{row['call']}`",
                "n": row["n"],
                "nearer": _share(row, "moved"),
                "nearest": _share(row, "nearest"),
                "others right": row["others_right"],
                "others right unsteered": unsteered["others_right"],
            }
        )
    order = {(row["attribute"], row["value"]): row["nearest"] * row["others_right"] for row in dose if row["chosen"]}
    return sorted(table, key=lambda row: (row["attribute"], -order[row["attribute"], row["value"]]))


def _share(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_95"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def recipe_rows(recipe: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The README's recipe before and after search knew what moves pictures, on the same scenes."""
    return [
        {
            "attribute": row["attribute"],
            "value": row["value"],
            "n": row["n"],
            **{
                f"{how}: {told}": row[f"{by}_{name}"]
                for by, how in (("by_label", "by label"), ("by_search", "by search"))
                for name, told in (("moved", "nearer"), ("nearest", "nearest"), ("others", "others right"))
            },
            "search finds": row["by_search_features"],
        }
        for row in recipe
    ]


def unsteered(dose: Sequence[Mapping[str, Any]]) -> str:
    """Which concepts do not steer, in a sentence."""
    weak = [f"{row['attribute']}={row['value']} ({row['nearest']:.2f})" for row in dose
            if row["chosen"] and row["nearest"] < _STEERS]  # fmt: skip
    if not weak:
        return "Every value can be steered to: at least half of the pictures are nearest to it, of all values."
    return f"Not steered by what was tried, less than half of the pictures nearest of all values: {', '.join(weak)}."


def summarize(work: Path, folder: Path) -> None:
    """Write `folder`/README.md, its JSON tables and its pictures from what a rebuild left in `work`."""
    tables: dict[str, list[dict[str, Any]]] = {}
    files: dict[str, bytes | str] = {}
    for name in _TABLES:
        files[f"{Path(name).name}.json"] = content = (work / f"{name}.json").read_bytes()
        tables[Path(name).name] = json.loads(content)
    files |= {name: (work / "dose" / name).read_bytes() for name in _PICTURES}
    concepts = chosen_rows(tables["dose"])
    files["concepts.json"] = json.dumps(concepts, indent=1) + "\n"
    sections = [
        "# The SAEs of `mini`\n",
        "Made by `turbolens train rebuild`; every number is measured on scenes that took no part in training.\n",
        "## Quality\n",
        "Explained variance is 1 - SSE / total variance around the mean, summed in float64 over the held-out set; L0 "
        "is the mean number of active features at a position; a [dead](../training.md#dead-features) feature was "
        "active neither there nor in the last stretch of training.\n",
        markdown_table(tables["quality"]),
        "## Labels\n",
        "A feature's label is the attribute value of the scene of which its activation tells the most bits. Its score "
        "is its selectivity, of which 0.5 is chance ([`FeatureLabel.score`](../../proto/turbolens/v1/"
        "feature_service.proto) says what it is); a label below 0.6 is not given, and a score near that says the label "
        "is weak.\n",
        markdown_table(tables["labels"]),
        "## Dose and response\n",
        "For each concept, features and strength are chosen on 12 scenes, by a trial of what the catalog measured to "
        "move pictures and of what is labelled; the table is of other scenes, whose own value is another. *nearer* is "
        "the share of pictures nearer to the wanted value than to their own, a test of two; *nearest* is the share "
        "nearest to it of all values that the attribute has; both with intervals of 95 % of n. *others right* is the "
        "share of all other attributes that are still right. *call* is the SDK's edit of the row. Features that are "
        "tried together because of their labels have the weight 1/sqrt(n) each, which keeps their push as long as "
        "that of one: it is written in the call, and n features at weight 1 would push sqrt(n) times harder. Groups "
        "that the catalog grew have weight 1.\n",
        markdown_table(concepts),
        unsteered(tables["dose"]) + "\n",
        "![Curves](dose.png)\n",
        "![One scene of each attribute at every strength](strips.png)\n",
        "## The recipe: four features by a word\n",
        "`tl.add(lens.search_features(VALUE)[:4], 4)` on the scenes of the table above. *by label* is the recipe with "
        "the four features whose label fits best, in the same block: how search ranked before it was measured what "
        "moves pictures. *by search* is as search ranks now.\n",
        markdown_table(recipe_rows(tables["recipe"])),
        "## Which block carries what\n",
        "The best effect (nearest x others right) of any candidate in each block, mean over an attribute's values, on "
        "the scenes of the choice.\n",
        markdown_table(tables["blocks"]),
    ]
    files["README.md"] = "\n".join(sections)
    write_files({folder / name: content for name, content in files.items()})
