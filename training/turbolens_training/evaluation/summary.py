"""The account of the SAEs that ship: tables and pictures of a rebuild, put together for people and for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from turbolens_server.files import write_files
from turbolens_training.measures.report import markdown_table

_PICTURES: Final = ("dose.png", "strips.png")
_TABLES: Final = ("quality", "labels", "dose/dose", "dose/blocks")


def best_curves(dose: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each concept's best curve: the one whose best strength moves most and breaks least, as one row.

    `moved` is the share of pictures nearer to the wanted value, at strength 0 and at the best one; `others_right` is
    the share of the other attributes that are still right, likewise.
    """
    curves: dict[tuple[str, str], dict[tuple[str, str], list[Mapping[str, Any]]]] = {}
    for row in dose:
        steering = (row["block"], row["features"])
        curves.setdefault((row["attribute"], row["value"]), {}).setdefault(steering, []).append(row)

    def score(row: Mapping[str, Any]) -> float:
        return float(row["moved"]) * float(row["others_right"])

    table = []
    for (attribute, value), tried in curves.items():
        (block, features), rows = max(tried.items(), key=lambda item: max(map(score, item[1])))
        start = next(row for row in rows if row["strength"] == 0)
        best = max(rows, key=score)
        table.append(
            {
                "attribute": attribute,
                "value": value,
                "block": block,
                "features": features,
                "strength": best["strength"],
                "moved at 0": start["moved"],
                "moved": best["moved"],
                "others right at 0": start["others_right"],
                "others right": best["others_right"],
            }
        )
    return sorted(table, key=lambda row: (row["attribute"], -row["moved"] * row["others right"]))


def summarize(work: Path, folder: Path) -> None:
    """Write `folder`/README.md, its JSON tables and its pictures from what a rebuild left in `work`."""
    tables: dict[str, list[dict[str, Any]]] = {}
    files: dict[str, bytes | str] = {}
    for name in _TABLES:
        files[f"{Path(name).name}.json"] = content = (work / f"{name}.json").read_bytes()
        tables[Path(name).name] = json.loads(content)
    files |= {name: (work / "dose" / name).read_bytes() for name in _PICTURES}
    concepts = best_curves(tables["dose"])
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
        "For each concept, features are chosen by their labels and by a trial on scenes of their own, and added to "
        "held-out scenes whose own value is another. *moved* is the share of pictures that the counterfactual test "
        "finds nearer to the wanted value; *others right* is the share of all other attributes that are still right. "
        "The best curve of each concept, whose best strength is among those tried:\n",
        markdown_table(concepts),
        "![Curves](dose.png)\n",
        "![One scene of each attribute at every strength](strips.png)\n",
        "## Which block carries what\n",
        "The best effect (moved x others right) of any candidate in each block, mean over an attribute's values, on "
        "the scenes of the choice.\n",
        markdown_table(tables["blocks"]),
    ]
    files["README.md"] = "\n".join(sections)
    write_files({folder / name: content for name, content in files.items()})
