"""`turbolens train riebench`: edits by feature transfer on any model, by the protocol of RIEBench.

Whole runs of the original and of the edited prompt on the same noise; features chosen at the first step over all
blocks together; their activations transferred at every step. What comes out is compared with both prompts' pictures:
a good edit is near the edited prompt's and not far from the original's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.loading.load import load_engine
from turbolens_server.steering.masks import Mask, read_png
from turbolens_training.evaluation import figures
from turbolens_training.evaluation.config import RieBenchConfig
from turbolens_training.evaluation.edits import (
    NOTHING,
    PROMPT,
    CaptionPairs,
    Method,
    edit_pictures,
    transfer,
    transfer_dense,
    transfer_random,
)
from turbolens_training.evaluation.evaluate import describe_run
from turbolens_training.evaluation.results import Section, write_report
from turbolens_training.evaluation.sampling import decode, device_of, saes_by_block
from turbolens_training.evaluation.scene_edit import Cell, with_series
from turbolens_training.evaluation.similarity import ssim
from turbolens_training.mini.evaluate import psnr

EDIT_TYPES: Final = {
    1: "change object", 2: "add object", 3: "delete object", 4: "change content", 5: "change pose",
    6: "change color", 7: "change material", 8: "change background", 9: "change style",
}  # fmt: skip
_ADD: Final = 2
_DELETE: Final = 3
_TEXTS: Final = ("id", "original_prompt", "editing_prompt")


@dataclasses.dataclass(frozen=True)
class Item:
    """One edit."""

    id: str
    kind: int
    """1 to 9, see `EDIT_TYPES`."""
    original: str
    edited: str


def read_items(path: Path) -> list[Item]:
    """Read the items of a JSON file; square brackets, which mark the words that differ, are no part of a prompt.

    Raises:
        ValueError: the file is no list of items; the text says which item and field.
    """
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"items {path}: cannot be read as JSON ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"items {path}: a list of items is expected")
    return [_item(f"items {path}, item {number}", row) for number, row in enumerate(rows)]


def _item(where: str, row: Any) -> Item:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: an object is expected")
    for field in _TEXTS:
        if not isinstance(row.get(field), str):
            raise ValueError(f"{where}: {field} must be a text")
    kind = str(row.get("editing_type_id"))
    if kind not in map(str, EDIT_TYPES):
        raise ValueError(f"{where}: editing_type_id is {row.get('editing_type_id')!r}; allowed are 1 to 9")
    return Item(row["id"], int(kind), _unmarked(row["original_prompt"]), _unmarked(row["editing_prompt"]))


def _unmarked(prompt: str) -> str:
    return prompt.replace("[", "").replace("]", "")


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items of each edit type, in order; all for None."""
    counts: dict[int, int] = {}
    kept = []
    for item in items:
        counts[item.kind] = counts.get(item.kind, 0) + 1
        if limit is None or counts[item.kind] <= limit:
            kept.append(item)
    return kept


def read_masks(folder: Path, items: Sequence[Item]) -> list[tuple[Mask, Mask]]:
    """For every item the masks of its original and of its edited picture.

    An object is added where it is in the edited picture, and deleted where it is in the original: there one mask
    serves both pictures, as in the published runs, and the other is not looked for.

    Raises:
        ValueError: a mask is missing, unreadable, or black all over.
    """

    def read(item: Item, which: str) -> Mask:
        path = folder / f"{item.id}_{which}.png"
        try:
            mask = read_png(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"masks: {path.name} of item {item.id} cannot be read ({error})") from error
        if not mask.weights.any():
            raise ValueError(f"masks: {path.name} is black all over, so nothing of item {item.id} could be edited")
        return mask

    sides = {_ADD: ("edited",) * 2, _DELETE: ("original",) * 2}
    return [(read(item, before), read(item, after)) for item in items
            for before, after in [sides.get(item.kind, ("original", "edited"))]]  # fmt: skip


def grid(config: RieBenchConfig) -> dict[Cell, Method]:
    """Every setting of every method."""
    cells: dict[Cell, Method] = {}
    for n in config.features:
        for multiplier in config.multipliers:
            cells[Cell("transfer", n, multiplier)] = transfer(n, multiplier)
        cells[Cell("random features", n, 1.0)] = transfer_random(n, 1.0, config.seed)
    for multiplier in config.dense_multipliers:
        cells[Cell("dense transfer", None, multiplier)] = transfer_dense(multiplier)
    return cells


def score_rows(cells: Sequence[Cell], pictures: Mapping[str, Tensor], items: Sequence[Item]) -> list[dict[str, object]]:
    """A row for each setting and edit type, and for all items together: PSNR and SSIM to both prompts' pictures.

    A setting without a value of its own, such as the untouched picture to itself, has no PSNR in that cell.
    """
    kinds = torch.tensor([item.kind for item in items])
    names = {0: "all", **{kind: name for kind, name in EDIT_TYPES.items() if (kinds == kind).any()}}
    rows: list[dict[str, object]] = []
    for cell in cells:
        drawn = pictures[str(cell)]
        found = {
            f"{measure}_{side}": function(drawn, pictures[other])
            for measure, function in (("psnr", psnr), ("ssim", ssim))
            for side, other in (("original", NOTHING), ("edited", PROMPT))
            if str(cell) != other
        }
        for kind, name in names.items():
            some = kinds == kind if kind else kinds > 0
            row: dict[str, object] = {
                "method": cell.method,
                "features": "" if cell.features is None else cell.features,
                "multiplier": "" if cell.multiplier is None else cell.multiplier,
                "edit": name,
                "items": int(some.sum()),
            }
            rows.append({**row, **{column: round(values[some].mean().item(), 4) for column, values in found.items()}})
    return rows


def _decode_all(engine: Engine, latents: Tensor, batch: int) -> Tensor:
    return torch.cat([decode(engine, part.to(device_of(engine))) for part in latents.split(batch)])


def run_riebench(config: RieBenchConfig) -> None:
    """Run the grid over all items and write the folder.

    Raises:
        ValueError: an item, a mask or a setting cannot be used.
    """
    items = limited(read_items(config.items), config.limit)
    masks = None if config.masks is None else read_masks(config.masks, items)
    saes = list(config.saes) or None
    engine = load_engine(
        model=config.model,
        device=config.device,
        dtype=config.dtype,
        variant=config.variant,
        saes=saes,
        force_sae=config.force_sae,
        max_steps=max(4, config.steps),
    )
    pairs = CaptionPairs(
        [item.original for item in items], [item.edited for item in items], [config.seed] * len(items), masks
    )
    methods = grid(config)
    named = {str(cell): method for cell, method in methods.items()}
    latents = edit_pictures(
        engine, saes_by_block(engine), pairs, named, steps=config.steps, batch=config.batch, title="riebench"
    )
    pictures = {name: _decode_all(engine, x, config.batch) for name, x in latents.items()}
    cells = [Cell(NOTHING), *methods, Cell(PROMPT)]
    rows = score_rows(cells, pictures, items)
    overall = [row for row in rows if row["edit"] == "all"]

    config.out.mkdir(parents=True, exist_ok=True)
    edited = [row for row in overall if row["method"] not in (NOTHING, PROMPT)]
    figures.curves(config.out / "riebench.png", with_series(edited), x="ssim_original", y="ssim_edited", by="series")
    shown = _spread(items, config.examples)
    sheet = torch.stack([pictures[str(cell)][shown] for cell in cells], 1)
    figures.picture_sheet(
        config.out / "riebench_examples.png",
        sheet,
        [f"{EDIT_TYPES[items[i].kind]}: {items[i].edited}" for i in shown],
        [str(cell) for cell in cells],
    )
    section = Section(
        "Edits by transfer",
        "Pictures of the original prompt, edited towards the edited one by transferring features or dense updates, "
        "beside both prompts' own pictures (nothing, prompt change). A good edit is near the edited picture while it "
        "stays near the original. PSNR in dB and SSIM of brightness compare pixels, so they punish an edit that "
        "draws the right thing elsewhere.",
        {"riebench_all": overall, "riebench": rows},
        ["riebench.png", "riebench_examples.png"],
        frozenset({"riebench"}),
    )
    facts = describe_run(engine.info) | {
        "items": f"{len(items)} of {config.items.name}",
        "steps": str(config.steps),
        "seed": str(config.seed),
        "masks": "whole picture" if masks is None else "given",
    }
    write_report(config.out, "Edits by feature transfer", facts, [section])
    config.tell(config.out / "report.html", report=config.out / "report.html", rows=overall)


def _spread(items: Sequence[Item], n: int) -> list[int]:
    """Indices of up to n items, the first of each edit type first."""
    seen: dict[int, int] = {}
    order = []
    for index, item in enumerate(items):
        order.append((seen.get(item.kind, 0), index))
        seen[item.kind] = seen.get(item.kind, 0) + 1
    return [index for _, index in sorted(order)[:n]]
