"""`turbolens train eval`: SAEs and steering against the truth, part by part, into one folder."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.info import EngineInfo
from turbolens_server.files import write_file
from turbolens_server.loading.device import versions
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.formats.read import is_bundle
from turbolens_training.activations.config import SCENES, prompt_set
from turbolens_training.activations.prompt_specs import open_prompts
from turbolens_training.activations.stream import HELD_OUT, PromptStream
from turbolens_training.evaluation import figures
from turbolens_training.evaluation.blocks import measure_blocks
from turbolens_training.evaluation.config import EvalConfig
from turbolens_training.evaluation.locality import measure_locality
from turbolens_training.evaluation.probes import measure_probes
from turbolens_training.evaluation.results import Section, write_report
from turbolens_training.evaluation.sampling import saes_by_block
from turbolens_training.evaluation.scene_edit import example_pictures, measure_scene_edit, with_series
from turbolens_training.evaluation.splice import measure_splice
from turbolens_training.evaluation.stability import measure_stability
from turbolens_training.measures.concepts import check_truth, pick_concepts
from turbolens_training.measures.quality import SaeMeasurement, measure

DENSE: Final = 0.1
"""A feature is dense when it is active at more than this share of positions."""


def quality_rows(block: str, measurement: SaeMeasurement) -> list[dict[str, object]]:
    """A block's rows of the quality table: those of `SaeMeasurement`, with the fraction of variance unexplained and
    the shares of features that were never active, and of dense ones."""
    frequency = measurement.active.double() / measurement.positions
    rows: list[dict[str, object]] = []
    for row in measurement.rows(block, never_active=(frequency == 0).double().mean().item()):
        rows.append({**row, "fvu": round(1 - float(row["explained_variance"]), 4)})
    rows[0]["dense"] = round((frequency > DENSE).double().mean().item(), 4)
    return rows


def _quality(engine: Engine, config: EvalConfig) -> Section:
    saes = saes_by_block(engine, temporal=True)
    prompts, named = open_prompts(config.prompts, seed=config.seed), prompt_set(config.prompts)
    measured: dict[str, SaeMeasurement] = {}
    for steps in {sae.bundle.steps for sae in saes.values()}:
        share, many = (0.5, (2, 3, 4)) if steps is None else (0.0, (steps,))
        stream = PromptStream(
            engine, prompts, seed=config.seed, split=HELD_OUT, images=config.batch, one_step_share=share,
            multi_steps=many,
        )  # fmt: skip
        chunks = range(-(-config.quality_pictures // config.batch))
        alike = {block: sae for block, sae in saes.items() if sae.bundle.steps == steps}
        measured |= measure(alike, map(stream.updates, chunks))
    measured = {block: measured[block] for block in saes}
    rows = [
        {"block": block, "prompts": named, **row}
        for block, measurement in measured.items()
        for row in quality_rows(block, measurement)
    ]
    frequencies = {block: (m.active.double() / m.positions).numpy() for block, m in measured.items()}
    figures.density_histograms(config.out / "density.png", frequencies)
    return Section(
        "Reconstruction and sparsity",
        f"On held-out pictures of {named}. "
        "Explained variance is 1 - SSE / total variance around the mean, summed in float64; "
        "fvu is the rest. L0 is the number of active features at a position. never_active is the share of features "
        "that no position here lifts: of so few pictures, rare features may be among them that are not dead. dense is "
        f"the share active at more than {DENSE:.0%} of positions. A temporal SAE has one code for all steps of a run: "
        "its L0 is that code's at every step.",
        {"quality": rows},
        ["density.png"],
    )


def _stability(engine: Engine, config: EvalConfig) -> Section:
    title = "Stability over seeds"
    if not config.seeds:
        return Section(title, "Not measured: name folders of bundles trained from other seeds with --seeds.")
    rows = measure_stability([config.saes, *config.seeds], list(saes_by_block(engine, temporal=True)))
    return Section(
        title,
        "Decoder rows of the features of two SAEs that their statistics saw active, matched one to one so that the "
        "sum of cosines is largest. Chance is what as many random directions get by the same matching.",
        {"stability": rows},
    )


def _splice(engine: Engine, config: EvalConfig) -> Section:
    return Section(
        "Reconstructions in the update's place",
        "The SAE's reconstruction takes the place of the update at one block, or at all. psnr is to the model's own "
        "picture. recovered is (d_ablate - d_SAE) / d_ablate, with d the mean squared distance to it when the update "
        "is left out and when it is reconstructed. right is the share of attributes that are right.",
        {"splice": measure_splice(engine, config)},
    )


def _probes(engine: Engine, config: EvalConfig) -> Section:
    probes, detectors = measure_probes(engine, config)
    figures.heat_maps(
        config.out / "probes.png",
        [{**row, "what": f"{row['attribute']} ({row['region']})"} for row in probes],
        down="what",
        across="block",
        values={"auroc": "best single feature, AUROC"},
    )
    section = Section(
        "What single features tell",
        "For every attribute value the feature with the best AUROC on one half of held-out pictures, scored on the "
        "other half; 0.5 is chance. And each labelled feature as a detector of its label, which says yes where it is "
        "active: sensitivity is the share of things (or backgrounds, or pictures) with the value where it is, "
        "specificity the share of those without where it is not. other_values is its balanced accuracy for the "
        "attribute's other values, on average: what a wrong label would get.",
        {"probes": probes, "detectors": detectors},
        ["probes.png"],
        frozenset({"probes", "detectors"}),
    )
    if not detectors:
        return section
    figures.scatter(
        config.out / "detectors.png", detectors, x="sensitivity", y="specificity", by="block", limits=(-0.03, 1.03)
    )
    means = mean_rows(detectors, "block", ("sensitivity", "specificity", "balanced_accuracy", "other_values"))
    tables = {"detectors_by_block": means, **section.tables}
    return dataclasses.replace(section, tables=tables, figures=["probes.png", "detectors.png"])


def mean_rows(rows: list[dict[str, Any]], by: str, columns: tuple[str, ...]) -> list[dict[str, object]]:
    """Means of columns over the rows of each value of `by`; rows that lack a column do not count in it."""
    means: list[dict[str, object]] = []
    for name in dict.fromkeys(row[by] for row in rows):
        some = [row for row in rows if row[by] == name]
        mean: dict[str, object] = {by: name, "rows": len(some)}
        for column in columns:
            values = [float(row[column]) for row in some if column in row]
            mean |= {column: round(sum(values) / len(values), 4)} if values else {}
        means.append(mean)
    return means


def _blocks(engine: Engine, config: EvalConfig) -> Section:
    rows = measure_blocks(engine, config)
    figures.heat_maps(
        config.out / "blocks.png",
        rows,
        down="attribute",
        across="block",
        values={"patched": "nearer to the edited scene: patched", "zeroed": "attribute no longer right: zeroed"},
    )
    return Section(
        "Which block carries what",
        "Pairs of captions that differ in one attribute, on the same noise. patched: the block's update is that of "
        "the edited caption's run; share of pictures then nearer to the edited scene, and of other attributes that "
        "are right. zeroed: the block adds nothing; share of pictures whose attribute is no longer right, and that "
        "are nearer to the edited scene. none is the picture untouched, prompt the edited caption's own.",
        {"blocks": rows},
        ["blocks.png"],
    )


def _edits(engine: Engine, config: EvalConfig) -> Section:
    result = measure_scene_edit(engine, config)
    rows = result.rows()
    overall = [row for row in rows if row["attribute"] == "all"]
    figures.curves(config.out / "scene_edit.png", with_series(overall), x="progress", y="others_right", by="series")
    best = {str(cell) for cell in result.best().values()}
    chosen = [
        {**row, "cell": str(cell)}
        for cell, some in zip(result.scores, _by_cell(rows, len(result.scores)), strict=True)
        for row in some
        if str(cell) in best
    ]
    figures.heat_maps(
        config.out / "scene_edit_attributes.png",
        chosen,
        down="cell",
        across="attribute",
        values={"nearer": "nearer to the edited scene", "others_right": "other attributes right"},
    )
    figures.error_bars(
        config.out / "scene_edit_intervals.png", chosen, x="nearer", y="others_right", by="cell", across="attribute"
    )
    names, columns, pictures = example_pictures(engine, result)
    figures.picture_sheet(config.out / "scene_edit_examples.png", pictures, names, columns)
    return Section(
        "SceneEdit",
        "The same kind of pairs, edited by every method without changing the prompt. progress is how far the picture "
        "went from the exact picture of the scene (0) to that of the edited scene (1); nearer the share nearer to the "
        "latter; psnr is to it; others_right the share of other attributes that are right. nothing is the floor, "
        "prompt change the ceiling. low and high bound nearer and others_right at 95 % (Wilson). A method's best "
        "setting is that with the largest nearer x others_right over all attributes, on these same pairs.",
        {"scene_edit_all": overall, "scene_edit": rows},
        ["scene_edit.png", "scene_edit_intervals.png", "scene_edit_attributes.png", "scene_edit_examples.png"],
        frozenset({"scene_edit"}),
    )


def _by_cell(rows: list[dict[str, object]], cells: int) -> list[list[dict[str, object]]]:
    size = len(rows) // cells
    return [rows[i * size : (i + 1) * size] for i in range(cells)]


def _locality(engine: Engine, config: EvalConfig) -> Section:
    rows = measure_locality(engine, config)
    figures.scatter(config.out / "locality.png", rows, x="color", y="texture", by="block")
    return Section(
        "Where and what an edit changes",
        "Random features that the statistics saw active, added to the left half at "
        f"{config.locality_strength:g} of the update's usual norm. "
        "inside is the share of the squared change that stays in that half; 0.5 is not local at all. The change there "
        "is split into its mean over a neighbourhood (color) and the rest (texture), root mean square.",
        {"locality_by_block": mean_rows(rows, "block", ("inside", "color", "texture")), "locality": rows},
        ["locality.png"],
        frozenset({"locality"}),
    )


PARTS: Final[dict[str, Callable[[Engine, EvalConfig], Section]]] = {
    "quality": _quality,
    "stability": _stability,
    "splice": _splice,
    "probes": _probes,
    "blocks": _blocks,
    "edits": _edits,
    "locality": _locality,
}


WITHOUT_TRUTH: Final = ("quality", "stability")
"""Parts that need no ground truth."""
OF_RUNS: Final = ("quality", "stability", "blocks")
"""Parts that do not read features step by step, and so take temporal SAEs too."""


def describe_run(info: EngineInfo) -> dict[str, str]:
    """What was measured, for the head of a report."""
    facts = {"model": f"{Path(info.model).name} ({info.model_hash[:12]}), {info.dtype} on {info.device}"}
    facts |= {f"SAE {name}": sae.bundle.hash[:12] for name, sae in info.saes.items()}
    return facts | {"versions": ", ".join(f"{name} {number}" for name, number in versions().items())}


def evaluate(config: EvalConfig) -> None:
    """Measure every part and write the folder.

    Raises:
        ValueError: a part is not known or not for temporal SAEs, or the bundles lack what one needs.
    """
    if unknown := [part for part in config.parts if part not in PARTS]:
        raise ValueError(f"parts: no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if config.prompts != SCENES and (others := [part for part in config.parts if part not in WITHOUT_TRUTH]):
        raise ValueError(
            f"parts: {', '.join(others)} need scenes whose truth is known, and {prompt_set(config.prompts)} has none; "
            f"--parts {' '.join(WITHOUT_TRUTH)}"
        )
    open_prompts(config.prompts, seed=config.seed)
    pick_concepts(config.concepts)
    engine = load_engine(
        model=config.model,
        device=config.device,
        variant=config.variant,
        saes=[str(config.saes)],
        force_sae=config.force_sae,
        max_steps=max(4, config.steps),
    )
    if any(part not in WITHOUT_TRUTH for part in config.parts):
        check_truth(engine, f"--parts {' '.join(WITHOUT_TRUTH)}, with prompts of your own by --prompts")
    temporal = [name for name, sae in engine.saes.items() if sae.bundle.steps is not None]
    if temporal and (others := [part for part in config.parts if part not in OF_RUNS]):
        raise ValueError(
            f"parts: {', '.join(others)} read features step by step, and those of {', '.join(temporal)} are of a whole "
            f"run; --parts {' '.join(OF_RUNS)}"
        )
    for folder in config.seeds:
        if lacking := [block for block in saes_by_block(engine, temporal=True) if not is_bundle(folder / block)]:
            raise ValueError(f"seeds: {folder} has no bundle of {', '.join(lacking)}")
    config.out.mkdir(parents=True, exist_ok=True)
    facts = describe_run(engine.info) | {"seed": str(config.seed)}
    settings = {name: _plain(value) for name, value in dataclasses.asdict(config).items() if name != "json"}
    sections: list[Section] = []
    seconds: dict[str, float] = {}
    for part in config.parts:
        began = time.perf_counter()
        sections.append(PARTS[part](engine, config))
        seconds[part] = round(time.perf_counter() - began, 1)
        # After every part: a run that is cut short leaves what it has measured.
        write_report(config.out, "SAEs and steering against the truth", facts, sections)
        run = {**facts, "settings": settings, "seconds": seconds}
        write_file(config.out / "run.json", json.dumps(run, indent=1) + "\n")
    config.tell(config.out / "report.html", report=config.out / "report.html", seconds=seconds)


def _plain(value: Any) -> Any:
    """A setting as JSON: paths by name only, which says enough and nothing of the machine."""
    if isinstance(value, Path):
        return value.name
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
