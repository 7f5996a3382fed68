"""`turbolens catalog build`: what is known of every feature of a bundle, measured and written beside its weights."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from torch import Tensor
from tqdm import tqdm

from turbolens_server.catalog.co_firing import write_co_firing
from turbolens_server.catalog.labels import Example, FeatureLabels, read_labels, write_labels
from turbolens_server.engine.engine import Engine
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.bundle import Bundle, FeatureStats, save_stats
from turbolens_server.sae.formats.read import find_saes, is_bundle
from turbolens_server.sae.sae import Codes, Sae
from turbolens_training.activations.prompt_specs import list_prompts
from turbolens_training.activations.stream import (
    HELD_OUT,
    LABELLING,
    SceneStream,
    Updates,
    prompt_updates,
)
from turbolens_training.catalog.co_firing import MOST, CoFiringCounts
from turbolens_training.catalog.config import BuildConfig
from turbolens_training.catalog.effects import STRENGTH, contrasts, measure_effects, measure_icons
from turbolens_training.catalog.examples import TopExamples
from turbolens_training.catalog.labels import Observations, label_features, summary
from turbolens_training.catalog.zero_shot import Namer, load_namer, without_zero_shot
from turbolens_training.measures.concepts import Concept, check_truth
from turbolens_training.measures.quality import SaeMeasurement
from turbolens_training.measures.report import write_table

_T = TypeVar("_T")
PUBLISHED: Final = "published"
"""Whose the means of a bundle are, where they are not the catalog's own."""


def build(config: BuildConfig) -> None:
    """Write statistics, top examples and labels of every bundle that `config` names.

    Raises:
        LoadError: the model or a bundle cannot be loaded, or they do not belong together.
        ValueError: a folder is no bundle, two bundles share a block, or the prompts, words or encoder cannot be used.
    """
    prompts = None
    if config.prompts is not None:
        prompts, told = list_prompts(config.prompts, config.images)
        print(told, file=sys.stderr)
    namer = None if prompts is None or config.encoder is None else load_namer(config, config.encoder, prompts)
    for folder in find_saes(config.saes) if config.saes.is_dir() else []:
        if not is_bundle(folder):
            raise ValueError(f"{folder} is no bundle; make one of it by turbolens sae import")
    engine = load_engine(
        model=config.model, device=config.device, variant=config.variant, saes=[str(config.saes)],
        force_sae=config.force_sae, max_steps=max(4, *config.steps),
    )  # fmt: skip
    if prompts is None:
        check_truth(engine, "give prompts by --prompts, and an image-text encoder by --encoder for labels")
    device = next(engine.components.unet.parameters()).device
    saes: dict[str, Sae] = {}
    for info in engine.info.saes.values():
        if info.hook_point in saes:
            raise ValueError(f"{config.saes} holds two bundles of {info.hook_point}; build one folder at a time")
        saes[info.hook_point] = Sae(info.bundle, device)
    table: list[dict[str, object]] = []
    contrast: dict[str, dict[Concept, Tensor]] = {}
    for steps in dict.fromkeys(sae.bundle.steps for sae in saes.values()):
        alike = {block: sae for block, sae in saes.items() if sae.bundle.steps == steps}
        if config.co_firing_only:
            _count_alone(config, engine, alike, steps, prompts)
        elif prompts is None:
            rows, found = _from_scenes(config, engine, alike, steps)
            table, contrast = table + rows, contrast | found
        else:
            _from_prompts(config, engine, alike, steps, prompts, namer)
    if table:
        write_table(config.work / "labels", table)
    if (contrast or config.icons) and not config.co_firing_only:
        _write_effects(config, contrast)
    for info in engine.info.saes.values():
        known = read_labels(_folder(info.bundle), info.bundle.d_sae)
        named = sum(bool(feature.label) for feature in known.values())
        what = "what fires together" if config.co_firing_only else "statistics and examples"
        line = f"{_folder(info.bundle)}: {what} of {info.bundle.d_sae} features, {named} of them named"
        config.tell(line, bundle=_folder(info.bundle), features=info.bundle.d_sae, labelled=named)


class Seen:
    """What the pictures looked at show of one SAE's features: statistics, top examples and what fires together, of the
    same passes."""

    def __init__(self, config: BuildConfig, engine: Engine, sae: Sae) -> None:
        grids = {point.name: point.grid(*engine.info.default_size) for point in engine.info.hook_points}
        self.sae = sae
        self._measured = SaeMeasurement.of(sae)
        self._top = TopExamples(sae.bundle.d_sae, config.examples, grids[sae.bundle.hook_point])
        self.together = _counts(sae)

    def add(self, updates: Updates) -> list[Codes]:
        """Take in a batch's updates; returns their codes, see :meth:`SaeMeasurement.look`."""
        codes = self._measured.look(self.sae, updates)
        self._top.add(updates, codes)
        if self.together is not None:
            self.together.add(codes)
        return codes

    def examples(self) -> list[tuple[Example, ...]]:
        """Of every feature, strongest first."""
        return self._top.examples()

    def stats(self) -> FeatureStats:
        """Means that were published with the SAE stay, as strengths are told in them."""
        measured, known = self._measured.stats(), self.sae.bundle.stats
        return (
            dataclasses.replace(measured, mean=known.mean)
            if known and has_published_means(self.sae.bundle)
            else measured
        )


def has_published_means(bundle: Bundle) -> bool:
    """Whether the means of a bundle are not measured here, now or at an earlier build."""
    if bundle.stats is None:
        return False
    return bundle.measured is None or dict(bundle.provenance.get("catalog") or {}).get("means") == PUBLISHED


def _scenes(config: BuildConfig, engine: Engine, steps: int | None) -> tuple[SceneStream, SceneStream]:
    """Pictures whose captions name every value, for labels, and others of every number of steps."""
    named = SceneStream(
        engine, seed=config.seed, split=LABELLING, images=config.batch, complete=True,
        one_step_share=0.0, multi_steps=(steps or 1,),
    )  # fmt: skip
    mix = config.steps if steps is None else (steps,)
    share, many = mix.count(1) / len(mix), tuple(number for number in mix if number > 1)
    mixed = SceneStream(
        engine, seed=config.seed, split=HELD_OUT, images=config.batch, one_step_share=share, multi_steps=many
    )
    return named, mixed


def _counts(sae: Sae) -> CoFiringCounts | None:
    if sae.bundle.d_sae <= MOST:
        return CoFiringCounts(sae.bundle.d_sae)
    told = (
        f"{sae.bundle.name}: what fires together is not counted; it has {sae.bundle.d_sae} features, more than {MOST}"
    )
    print(told, file=sys.stderr)
    return None


def _count_alone(
    config: BuildConfig, engine: Engine, saes: dict[str, Sae], steps: int | None, prompts: list[str] | None
) -> None:
    """Count what fires together on the pictures that the whole catalog is made of, and write nothing else."""
    counts = {block: found for block, sae in saes.items() if (found := _counts(sae)) is not None}
    if prompts is None:
        each = range(-(-config.images // config.batch))
        batches, pictures = 2 * len(each), 2 * len(each) * config.batch
        looks = itertools.product(_scenes(config, engine, steps), each)
        data: Iterable[Updates] = itertools.starmap(SceneStream.updates, looks)
    else:
        batches, pictures = -(-len(prompts) // config.batch), len(prompts)
        mix = config.steps if steps is None else (steps,)
        data = prompt_updates(engine, prompts, seed=config.seed, images=config.batch, steps=mix)
    for updates in _progress(data, "pictures", batches):
        for block, one in counts.items():
            one.add(SaeMeasurement.of(saes[block]).look(saes[block], updates))
    for block, one in counts.items():
        write_co_firing(_folder(saes[block].bundle), one.most(), **_made(config, pictures))


def _made(config: BuildConfig, pictures: int) -> dict[str, object]:
    made_from = "captioned scenes" if config.prompts is None else Path(config.prompts).name
    return {"prompts": made_from, "pictures": pictures, "seed": config.seed}


def _from_scenes(
    config: BuildConfig, engine: Engine, saes: dict[str, Sae], steps: int | None
) -> tuple[list[dict[str, object]], dict[str, dict[Concept, Tensor]]]:
    """Look at pictures whose captions name every value, then at others of every number of steps.

    Args:
        config: the settings.
        engine: the model.
        saes: by hook point, all alike in their steps.
        steps: of the runs that they read, if they are temporal; others are labelled by one-step pictures.

    Returns:
        The rows of the table of what was labelled, and by SAE the contrasts by which effects are looked for.
    """
    stream, mixed = _scenes(config, engine, steps)
    batches = -(-config.images // config.batch)
    truths = Observations()
    seen = {block: Seen(config, engine, sae) for block, sae in saes.items()}
    for chunk in _progress((stream.chunk(index) for index in range(batches)), "labels", batches):
        truths.add(chunk, {block: one.add(chunk.updates)[0] for block, one in seen.items()})
    for updates in _progress((mixed.chunk(index).updates for index in range(batches)), "pictures", batches):
        for one in seen.values():
            one.add(updates)
    table, found = [], {}
    for point in engine.info.hook_points:
        if point.name not in saes:
            continue
        truth, active = truths.truth(point.grid(*engine.info.default_size)), truths.active(point.name)
        d_sae = saes[point.name].bundle.d_sae
        rows = label_features(active, truth, d_sae, config)
        if steps is None and config.effect_scenes:
            found[saes[point.name].bundle.name] = contrasts(active, truth, d_sae, Concept.all())
        gone = {"labels": None, "zero_shot": None}  # those of others
        _write(config, engine, seen[point.name], rows, 2 * batches * config.batch, gone)
        table.append(summary(point.name, rows))
    return table, found


def _from_prompts(
    config: BuildConfig, engine: Engine, saes: dict[str, Sae], steps: int | None, prompts: list[str],
    namer: Namer | None,
) -> None:  # fmt: skip
    """Look at the prompts' pictures at every step, once."""
    mix = config.steps if steps is None else (steps,)
    batches = -(-len(prompts) // config.batch)
    seen = {block: Seen(config, engine, sae) for block, sae in saes.items()}
    data = prompt_updates(engine, prompts, seed=config.seed, images=config.batch, steps=mix)
    for updates in _progress(data, "pictures", batches):
        for one in seen.values():
            one.add(updates)
    named = {} if namer is None else namer.name(engine, {block: one.examples() for block, one in seen.items()})
    for block, sae in saes.items():
        known = read_labels(sae.bundle.folder, sae.bundle.d_sae)
        if namer is not None:
            known = {**without_zero_shot(known), **named[block]}
        rows = [known.get(index, FeatureLabels(index, "", 0.0, ())) for index in range(sae.bundle.d_sae)]
        new = {} if namer is None else {"zero_shot": {**namer.provenance, "labelled": len(named[block])}}
        _write(config, engine, seen[block], rows, len(prompts), new)


def _write(
    config: BuildConfig, engine: Engine, seen: Seen, rows: list[FeatureLabels], pictures: int,
    entries: Mapping[str, object | None],
) -> None:  # fmt: skip
    bundle, examples = seen.sae.bundle, seen.examples()
    made = _made(config, pictures)
    if has_published_means(bundle):
        made["means"] = PUBLISHED
    if engine.info.saes[bundle.name].forced:
        made["forced_on"] = engine.info.model_hash
    shown = [dataclasses.replace(row, examples=examples[row.index]) for row in rows]
    save_stats(_folder(bundle), seen.stats())
    write_labels(_folder(bundle), shown, catalog=made, **entries)
    if seen.together is not None:
        write_co_firing(_folder(bundle), seen.together.most(), **_made(config, pictures))


def _write_effects(config: BuildConfig, contrast: Mapping[str, Mapping[Concept, Tensor]]) -> None:
    """Measure what features do to pictures, in the means that were just written, and write it beside their labels."""
    engine = load_engine(
        model=config.model, device=config.device, variant=config.variant, saes=[str(config.saes)],
        force_sae=config.force_sae,
    )  # fmt: skip
    concepts = list(Concept.all())
    effects = measure_effects(
        engine, contrast, concepts, scenes=config.effect_scenes, batch=config.batch, seed=config.seed
    )
    for name, info in engine.info.saes.items():
        if info.bundle.steps is not None:
            continue  # of whole runs: not steered at one step
        made = dict(info.bundle.provenance["catalog"])
        if name in effects:
            attributes = list(dict.fromkeys(concept.attribute for concept in concepts))
            made["effects"] = {"scenes": config.effect_scenes, "strength": STRENGTH, "attributes": attributes}
        icons = measure_icons(engine, name, config.batch) if config.icons else {}
        rows = [
            dataclasses.replace(
                row, effects=tuple(effects.get(name, {}).get(row.index, ())), icon_strength=icons.get(row.index)
            )
            for row in read_labels(info.bundle.folder, info.bundle.d_sae).values()
        ]
        write_labels(_folder(info.bundle), rows, catalog=made)


def _folder(bundle: Bundle) -> Path:
    if bundle.folder is None:
        raise AssertionError("a bundle that was loaded has a folder")
    return bundle.folder


def _progress(items: Iterable[_T], what: str, total: int) -> Iterable[_T]:
    bar: Iterable[_T] = tqdm(items, desc=what, unit="batch", total=total)
    return bar
