from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from turbolens_server.engine.engine import Engine
from turbolens_training import cli
from turbolens_training.evaluation.edits import NOTHING, PROMPT
from turbolens_training.evaluation.pairs import caption_pairs, draw_pairs
from turbolens_training.evaluation.riebench import Item, limited, read_items, read_masks, score_rows
from turbolens_training.evaluation.scene_edit import Cell
from turbolens_training.evaluation.similarity import ssim
from turbolens_training.measures.concepts import pick_concepts
from turbolens_training.mini.evaluate import psnr

KINDS = {"shape": 1, "color": 6, "texture": 7, "background": 8, "style": 9}
GOOD = {"id": "1", "editing_type_id": "6", "original_prompt": "a [red] star", "editing_prompt": "a [blue] star"}


def write(path: Path, items: object) -> Path:
    path.write_text(json.dumps(items))
    return path


def test_prompts_are_read_without_their_marks(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "id": "2", "editing_type_id": 9, "edit_target": "ignored"}]
    assert read_items(write(tmp_path / "a.json", rows)) == [
        Item("1", 6, "a red star", "a blue star"),
        Item("2", 9, "a red star", "a blue star"),
    ]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "a list of items is expected"),
        ({"items": []}, "a list of items is expected"),
        ([GOOD, "x"], "item 1: an object is expected"),
        ([{**GOOD, "id": 3}], "item 0: id must be a text"),
        ([{k: v for k, v in GOOD.items() if k != "editing_prompt"}], "item 0: editing_prompt must be a text"),
        ([{**GOOD, "editing_type_id": "10"}], "editing_type_id is '10'; allowed are 1 to 9"),
        ([{**GOOD, "editing_type_id": None}], "editing_type_id is None; allowed are 1 to 9"),
    ],
)
def test_bad_items_are_named(tmp_path: Path, items: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_items(write(tmp_path / "a.json", items))


def test_files_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff[")
    for path in (tmp_path / "a.json", tmp_path / "none.json"):
        with pytest.raises(ValueError, match="cannot be read as JSON"):
            read_items(path)


def test_masks_are_found_by_name_and_must_show_something(tmp_path: Path) -> None:
    item = Item("7", 1, "a", "b")
    pixels = np.zeros((8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"7_original\.png of item 7 cannot be read"):
        read_masks(tmp_path, [item])
    Image.fromarray(pixels).save(tmp_path / "7_edited.png")
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "7_original.png")
    with pytest.raises(ValueError, match=r"7_edited\.png is black all over"):
        read_masks(tmp_path, [item])
    Image.fromarray(pixels.T.copy()).save(tmp_path / "7_edited.png")
    ((original, edited),) = read_masks(tmp_path, [item])
    assert original.on_grid(2, 2).tolist() == [[1, 0], [1, 0]]
    assert edited.on_grid(2, 2).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(("kind", "which"), [(2, "edited"), (3, "original")])
def test_an_object_is_added_and_deleted_by_one_mask_for_both_pictures(tmp_path: Path, kind: int, which: str) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    Image.fromarray(pixels).save(tmp_path / f"7_{which}.png")
    ((original, edited),) = read_masks(tmp_path, [Item("7", kind, "a", "b")])
    assert original.on_grid(2, 2).tolist() == edited.on_grid(2, 2).tolist() == [[1, 1], [0, 0]]


def test_a_limit_counts_by_edit_type() -> None:
    items = [Item(str(i), kind, "a", "b") for i, kind in enumerate((1, 1, 9, 1, 9, 2))]
    assert [item.id for item in limited(items, 1)] == ["0", "2", "5"]
    assert limited(items, None) == items


def test_scores_are_means_by_edit_type() -> None:
    g = torch.Generator().manual_seed(0)
    pictures = {name: torch.rand(3, 3, 12, 12, generator=g) * 2 - 1 for name in (NOTHING, PROMPT, "patch")}
    items = [Item("0", 1, "a", "b"), Item("1", 6, "a", "b"), Item("2", 6, "a", "b")]
    rows = score_rows([Cell(NOTHING), Cell("patch")], pictures, items)
    assert [(row["method"], row["edit"], row["items"]) for row in rows[3:]] == [
        ("patch", "all", 3),
        ("patch", "change object", 1),
        ("patch", "change color", 2),
    ]
    assert rows[5]["ssim_edited"] == pytest.approx(
        ssim(pictures["patch"], pictures[PROMPT])[1:].mean().item(), abs=1e-4
    )
    assert rows[3]["psnr_original"] == pytest.approx(psnr(pictures["patch"], pictures[NOTHING]).mean().item(), abs=1e-4)
    assert "psnr_original" not in rows[0]
    assert "psnr_edited" in rows[0]


def test_scene_edits_in_its_format_run_from_the_command_line(
    tiny_engine: Engine, tiny_folder: Path, random_saes: Path, tmp_path: Path
) -> None:
    names = ("color=blue", "background=night", "style=neon")
    groups = draw_pairs(tiny_engine, pick_concepts(names), 2, "riebench")
    pairs = caption_pairs(groups)
    kinds = [KINDS[group.concept.attribute] for group in groups for _ in group.scenes.seeds]
    prompts = zip(kinds, pairs.captions, pairs.edited, strict=True)
    items = [
        {"id": str(i), "editing_type_id": str(kind), "original_prompt": before, "editing_prompt": after}
        for i, (kind, before, after) in enumerate(prompts)
    ]
    masks = tmp_path / "masks"
    masks.mkdir()
    for item in items:
        for which in ("original", "edited"):
            Image.new("L", (16, 16), 255).save(masks / f"{item['id']}_{which}.png")
    common = ["riebench", "--items", str(write(tmp_path / "items.json", items)), "--model", str(tiny_folder)]
    common += ["--saes", str(random_saes), "--device", "cpu", "--steps", "2", "--limit", "1", "--multipliers", "1"]
    common += ["--features", "4", "--dense-multipliers", "0.5", "--examples", "2"]
    cli.main([*common, "--out", str(tmp_path / "whole")])
    cli.main([*common, "--out", str(tmp_path / "masked"), "--masks", str(masks)])

    rows = json.loads((tmp_path / "whole" / "riebench.json").read_text())
    assert rows == json.loads((tmp_path / "masked" / "riebench.json").read_text())  # the masks are white all over
    assert {row["method"] for row in rows} == {NOTHING, PROMPT, "transfer", "random features", "dense transfer"}
    assert {row["edit"]: row["items"] for row in rows} == {
        "all": 3,
        "change color": 1,
        "change background": 1,
        "change style": 1,
    }
    page = (tmp_path / "whole" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert str(tmp_path) not in page
