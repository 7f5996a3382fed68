"""Dose and response: does steering by a concept's features move that attribute, more with strength, and it alone?

The judge is the counterfactual test: the scene rendered with every value of the attribute, same jitter. Features and
strength are chosen on scenes of their own, by a trial of what the catalog knows to move pictures and of what is
labelled; curve and table are of scenes that took no part in the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from turbolens_server.catalog.catalog import Catalog, measured_attributes
from turbolens_server.catalog.labels import read_labels
from turbolens_server.catalog.search import commonness
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.info import SaeInfo
from turbolens_server.engine.types import Job
from turbolens_server.loading.load import load_engine
from turbolens_server.steering.edits import Edit, WeightedFeature
from turbolens_training.evaluation.config import DoseConfig
from turbolens_training.evaluation.plots import contact_strip, plot_curves
from turbolens_training.measures.concepts import Concept, check_truth, draw_scenes, generate, pick_concepts
from turbolens_training.measures.counterfactual import Effect, Sheet, interval
from turbolens_training.measures.report import write_table

GROUP: Final = 5
"""Features of a group of labelled ones."""
RECIPE: Final = (4, 4.0)
"""The README's: so many features that search finds, each added at this strength."""
_FINALISTS: Final = 2
"""Steerings that are tried at every strength."""


@dataclasses.dataclass(frozen=True)
class Steering:
    """Features of one block to add together."""

    block: str
    features: tuple[int, ...]
    weight: float = 1.0
    """Of each. 1/sqrt(n) keeps the push of n features about as long as that of one: their decoder rows are nearly
    orthogonal. A group that was grown at full strength has 1."""

    def edit(self, strength: float) -> Edit:
        features = tuple(WeightedFeature(self.block, index, self.weight) for index in self.features)
        return Edit("add", features, strength)

    def call(self, strength: float) -> str:
        """The SDK's call of the same edit."""
        names = [f'"{self.block}/{index}"' for index in self.features]
        if self.weight != 1:
            weighted = ", ".join(f"{name}: {self.weight:.4g}" for name in names)
            return f"tl.add({{{weighted}}}, {strength:g})"
        return f"tl.add({names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}, {strength:g})"


def read_labelled(info: SaeInfo, folder: Path) -> list[dict[str, Any]]:
    """The label rows of an SAE's features, each with its `sureness`, in [0, 1): how common it is."""
    if info.bundle.measured is None:
        raise ValueError(f"{info.name} has no measured statistics; turbolens catalog build makes them")
    common = commonness(info.bundle.measured.frequency)
    known = read_labels(folder, info.bundle.d_sae)
    return [{**dataclasses.asdict(row), "sureness": float(common[index])} for index, row in known.items()]


def labelled_features(rows: list[dict[str, Any]], concept: Concept, n: int) -> list[int]:
    """The features labelled with this concept, by score times sureness, best first."""
    best: dict[int, float] = {}
    for row in rows:
        for label in row["labels"]:
            if (label["attribute"], label["value"]) == (concept.attribute, concept.value):
                best[row["index"]] = max(label["score"] * row["sureness"], best.get(row["index"], 0.0))
    return sorted(best, key=lambda index: -best[index])[:n]


def grown_group(rows: list[dict[str, Any]], concept: Concept) -> tuple[int, ...]:
    """The group that the catalog knows to move pictures to this concept, in its order; empty where it knows none."""
    ranks = {
        effect["rank"]: row["index"]
        for row in rows
        for effect in row.get("effects", ())
        if (effect["attribute"], effect["value"]) == (concept.attribute, concept.value)
    }
    return tuple(ranks[rank] for rank in sorted(ranks))


def candidates(labels: Mapping[str, list[dict[str, Any]]], concept: Concept, singles: int) -> list[Steering]:
    """What is tried for a concept: in each block the best-labelled features alone and the best few together, and the
    group that the catalog knows to move pictures, whole and its first alone."""
    found = []
    for block, rows in labels.items():
        best = labelled_features(rows, concept, max(singles, GROUP))
        found += [Steering(block, (index,)) for index in best[:singles]]
        if len(best) > 1:
            together = tuple(best[:GROUP])
            found.append(Steering(block, together, len(together) ** -0.5))
        if group := grown_group(rows, concept):
            found += [Steering(block, group), Steering(block, group[:1])]
    return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Judge:
    """Scenes of a concept, on which steerings are tried."""

    engine: Engine
    concept: Concept
    sheet: Sheet
    batch: int

    @classmethod
    def draw(cls, engine: Engine, concept: Concept, scenes: int, key: str, batch: int) -> Judge:
        drawn = draw_scenes(engine, concept, scenes, key)
        return cls(engine, concept, Sheet(drawn, engine.info.default_size[0] // engine.components.vae_downscale), batch)

    def __call__(self, edit: Edit) -> Effect:
        """What the edit comes to in one-step pictures."""
        return self.sheet.judge(self.concept, generate(self.engine, self.sheet.scenes, edit, self.batch))


@dataclasses.dataclass(frozen=True)
class Trial:
    """A steering with its effect on the scenes of the choice, at the strength that is best there."""

    steering: Steering
    strength: float
    effect: Effect


def choose(judge: Judge, tried: Iterable[Steering], strengths: Iterable[float]) -> list[Trial]:
    """Every steering at its best strength, best first.

    Where none moves a picture all the way, the one that comes closest is best. All are tried at one strength, and at
    the others the few that are best there.
    """
    first, *others = sorted(strengths, key=lambda strength: abs(strength - RECIPE[1]))

    def order(trial: Trial) -> tuple[float, float]:
        return -trial.effect.score, -trial.effect.margin

    trials = sorted((Trial(s, first, judge(s.edit(first))) for s in tried), key=order)
    for at, trial in enumerate(trials[:_FINALISTS]):
        again = (Trial(trial.steering, strength, judge(trial.steering.edit(strength))) for strength in others)
        trials[at] = min([trial, *again], key=order)
    return sorted(trials, key=order)


def row(concept: Concept, effect: Effect, **more: object) -> dict[str, object]:
    """A row of a table: both tests, with their intervals, and what else changed."""
    shares: dict[str, object] = {}
    for name, share in (("moved", effect.moved), ("nearest", effect.nearest)):
        shares |= {name: round(share, 3), f"{name}_95": [round(end, 2) for end in interval(share, effect.count)]}
    known: dict[str, object] = {"attribute": concept.attribute, "value": concept.value, **more, "n": effect.count}
    return known | shares | {"margin": round(effect.margin, 3), "others_right": round(effect.others, 3)}


def block_table(trials: list[tuple[Concept, Trial]]) -> list[dict[str, object]]:
    """Which block carries which attribute: each block's best effect on a value, mean over the attribute's values."""
    best: dict[str, dict[str, dict[str, float]]] = {}
    for concept, trial in trials:
        values = best.setdefault(concept.attribute, {}).setdefault(trial.steering.block, {})
        values[concept.value] = max(trial.effect.score, values.get(concept.value, 0.0))
    rows: list[dict[str, object]] = []
    for attribute, blocks in best.items():
        tried = {value for values in blocks.values() for value in values}  # a block without a candidate moves nothing
        means = {block: round(sum(values.values()) / len(tried), 3) for block, values in blocks.items()}
        rows.append({"attribute": attribute, **means, "best": max(means, key=lambda block: means[block])})
    return rows


def _without_effects(info: SaeInfo) -> SaeInfo:
    """The SAE as it was before anybody measured what its features move."""
    made = {k: v for k, v in dict(info.bundle.provenance.get("catalog") or {}).items() if k != "effects"}
    provenance = {**info.bundle.provenance, "catalog": made}
    return dataclasses.replace(info, bundle=dataclasses.replace(info.bundle, provenance=provenance))


class Recipe:
    """The README's recipe, by what search finds, and by the labels alone in the same block."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._search = Catalog(engine.info.saes, engine.embed_text)
        without = {name: _without_effects(info) for name, info in engine.info.saes.items()}
        self._labels = Catalog(without, engine.embed_text)

    def edits(self, concept: Concept) -> dict[str, Edit | None]:
        """By `by_label` and `by_search`; None: nothing is found."""
        words = concept.value
        embedded = self._engine.embed_text([words])[0]
        count, strength = RECIPE
        found = self._search.search(words, (), count, embedded)
        blocks = tuple(dict.fromkeys(match.feature.sae for match in found[:1]))
        labelled = [m for m in self._labels.search(words, blocks, 100, embedded) if words in m.feature.label]
        return {
            name: Edit("add", tuple(WeightedFeature(m.feature.sae, m.feature.index) for m in matches), strength)
            if matches
            else None
            for name, matches in (("by_label", labelled[:count]), ("by_search", found))
        }

    def row(self, judge: Judge) -> dict[str, object]:
        """What both come to on scenes of a concept."""
        found: dict[str, object] = {"attribute": judge.concept.attribute, "value": judge.concept.value}
        for name, edit in self.edits(judge.concept).items():
            effect = judge(edit) if edit else None
            found |= {f"{name}_features": " ".join(f"{f.sae}/{f.index}" for f in edit.features) if edit else "none"}
            for measure in ("moved", "nearest", "others"):
                found[f"{name}_{measure}"] = round(getattr(effect, measure), 3) if effect else ""
            found["n"] = effect.count if effect else found.get("n", 0)
        return found


def measure_dose(config: DoseConfig) -> None:
    """Choose features for every concept, draw the dose-response curves, write tables and pictures."""
    concepts = pick_concepts(config.concepts)
    sources = [str(config.saes)]
    engine = load_engine(
        model=config.model, device=config.device, variant=config.variant, saes=sources, force_sae=config.force_sae
    )
    check_truth(engine, "turbolens train riebench measures edits of any model")
    labels = {name: read_labelled(info, config.saes / info.hook_point) for name, info in engine.info.saes.items()}
    recipe = Recipe(engine) if any(measured_attributes(info) for info in engine.info.saes.values()) else None
    trials, curves, chosen, recipes = [], [], [], []
    for concept in tqdm(concepts, desc="dose", unit="concept"):
        choice = Judge.draw(engine, concept, config.choice_scenes, f"{config.seed}/choice", config.batch)
        tried = choose(choice, candidates(labels, concept, config.singles), [s for s in config.strengths if s > 0])
        trials += [(concept, trial) for trial in tried]
        judge = Judge.draw(engine, concept, config.scenes, f"{config.seed}/curve", config.batch)
        for best in tried[:1]:
            steering = best.steering
            for strength in config.strengths:
                effect = judge(steering.edit(strength))
                curves.append(
                    row(
                        concept, effect, block=steering.block, features=" ".join(map(str, steering.features)),
                        strength=strength, chosen=strength == best.strength, call=steering.call(strength),
                    )
                )  # fmt: skip
            chosen.append((best.effect.score, concept, steering))
        if recipe is not None:
            recipes.append(recipe.row(judge))
    write_table(config.out / "dose", curves)
    write_table(config.out / "blocks", block_table(trials))
    write_table(config.out / "recipe", recipes)
    plot_curves(config.out / "dose.png", curves)
    if chosen:
        draw_strips(engine, config, chosen)
    config.tell(config.out / "dose.md", table=config.out / "dose.md", curves=curves)


def draw_strips(engine: Engine, config: DoseConfig, chosen: list[tuple[float, Concept, Steering]]) -> None:
    """One scene of each attribute at every strength, steered to the value that moves best."""
    best: dict[str, tuple[float, Concept, Steering]] = {}
    for entry in chosen:
        attribute = entry[1].attribute
        if attribute not in best or entry[0] > best[attribute][0]:
            best[attribute] = entry
    strips = []
    height, width = engine.info.default_size
    for _, concept, steering in best.values():
        scene = draw_scenes(engine, concept, 1, f"{config.seed}/curve")
        jobs = [
            Job(scene.prompts[0], scene.seeds[0], 1, height, width, (steering.edit(strength),))
            for strength in config.strengths
        ]
        pictures = [result.picture for result in engine.run(jobs) if result and result.picture is not None]
        name = "+".join(map(str, steering.features))
        strips.append((f"{concept}\n{steering.block}/{name}", scene.prompts[0], pictures))
    contact_strip(config.out / "strips.png", strips, config.strengths)
