"""Attribution on ground truth: of the words of a caption, is it the right one that made a feature fire?"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Attribute, Attribution, Job
from turbolens_server.loading.load import load_engine
from turbolens_server.unet.points import hears_text, is_z
from turbolens_training.evaluation.config import WordsConfig
from turbolens_training.measures.concepts import check_truth
from turbolens_training.measures.counterfactual import interval
from turbolens_training.measures.report import markdown_table, write_table
from turbolens_training.mini.captions import plain_caption
from turbolens_training.mini.scenes import COUNT, Scene, decode_scenes, sample_codes

_LEAST: Final = 5
"""Scenes with a value in which a feature must be active, of those that say what it stands for."""
_SELECTIVE: Final = 0.9
"""Least share of a feature's activation in scenes with its value, those with and without it weighted alike."""
_OTHER: Final = 0.8
"""Most that the same may be for a value of another attribute: a feature of one attribute."""
_EXACT: Final = 1e-4
_END: Final = "</w>"
Floats = npt.NDArray[np.float64]
Said = tuple[str, str]
"""(attribute, value)."""


def measure_words(config: WordsConfig) -> None:
    """See :class:`WordsConfig`; writes the table and tells where."""
    engine = load_engine(model=config.model, saes=[str(config.saes)], device=config.device)
    check_truth(engine, "attribution itself needs no truth: `turbolens attribute`")
    names = [name for name, sae in engine.info.saes.items() if is_z(sae.hook_point) and hears_text(sae.hook_point)]
    if not names:
        raise ValueError(f"--saes {config.saes}: no SAE at the z of a cross-attention; there are {[*engine.info.saes]}")
    scenes = list(_scenes(2 * config.scenes, config.seed))
    rows = [row for name in names for row in _rows(engine, name, scenes, config)]
    write_table(config.out / "words", rows)
    print(markdown_table(rows))
    config.tell(config.out / "words.md", report=config.out / "words.md")


def _scenes(n: int, seed: int) -> Iterator[Scene]:
    codes = sample_codes(6 * n, torch.Generator().manual_seed(seed))
    yield from decode_scenes(codes[codes[:, COUNT] == 1][:n])


def said(scene: Scene) -> dict[str, str]:
    """What a scene's plain caption says by a word of its own, by attribute."""
    (thing,) = scene.things
    every = {
        "color": thing.color, "shape": thing.shape, "size": thing.size, "texture": thing.texture,
        "place": scene.layout, "background": scene.background, "style": scene.style,
    }  # fmt: skip
    return {attribute: value for attribute, value in every.items() if value not in ("plain", "flat")}


def meanings(active: Floats, scenes: Sequence[Scene]) -> dict[int, Said]:
    """What features stand for, of those that stand for one attribute alone.

    Args:
        active: mean activation of each feature in each scene, [scenes, d_sae].
        scenes: what was drawn.
    """
    every = [said(scene) for scene in scenes]
    found: dict[int, Said] = {}
    pairs = sorted({pair for one in every for pair in one.items()})
    shares, firing = [], []
    for attribute, value in pairs:
        has = np.array([one.get(attribute) == value for one in every])
        inside, outside = active[has].mean(0), active[~has].mean(0)
        shares.append(inside / np.maximum(inside + outside, 1e-9))
        firing.append((active[has] > 0).sum(0))
    table = np.stack(shares)
    for feature in range(active.shape[1]):
        best = int(table[:, feature].argmax())
        others = [at for at, pair in enumerate(pairs) if pair[0] != pairs[best][0]]
        alone = table[others, feature].max() < _OTHER
        if table[best, feature] >= _SELECTIVE and alone and firing[best][feature] >= _LEAST:
            found[feature] = pairs[best]
    return found


def word_sums(found: Attribution) -> dict[str, float]:
    """Contribution of each word of a prompt, mean over the positions where the feature is active; the markers and the
    padding as "<start>" and "<end>"."""
    mean = found.by_source[found.activation > 0].mean(0)
    sums: dict[str, float] = {}
    word, ended = "", False
    for place, token in enumerate(found.tokens):
        ended = ended or (token.startswith("<|") and place > 0)
        name = "<end>" if ended else "<start>" if place == 0 else word + token.removesuffix(_END)
        sums[name] = sums.get(name, 0.0) + float(mean[place]) + (sums.pop(word, 0.0) if word else 0.0)
        word = name if not ended and place and not token.endswith(_END) else ""
    return sums


def _rows(engine: Engine, sae: str, scenes: Sequence[Scene], config: WordsConfig) -> Iterator[Mapping[str, object]]:
    told, tried = scenes[: config.scenes], scenes[config.scenes :]
    stands_for = meanings(_means(engine, sae, told, config.batch), told)
    rng = random.Random(config.seed)
    cases = [
        (feature, scene, pair)
        for feature, pair in stands_for.items()
        for scene in rng.sample(tried, len(tried))
        if said(scene).get(pair[0]) == pair[1]
    ]
    rng.shuffle(cases)
    size = engine.info.default_size
    by_attribute: dict[str, list[tuple[bool, bool, float]]] = {}
    exact = 0.0
    count = 0
    for start in range(0, min(len(cases), config.cases), config.batch):
        some = cases[start : start + config.batch]
        jobs = [
            Job(plain_caption(scene), start + at, 1, *size, picture=False, attribute=Attribute(sae, feature, 0))
            for at, (feature, scene, _) in enumerate(some)
        ]
        for (_, _, (attribute, value)), result in zip(some, engine.run(jobs), strict=True):
            found = None if result is None else result.attribution
            if found is None:
                continue
            exact = max(exact, float(np.abs(found.by_source.sum(1) + found.bias - found.pre).max()))
            count += found.pre.size
            if not (found.activation > 0).any():
                continue
            sums = word_sums(found)
            words = {word: value for word, value in sums.items() if not word.startswith("<")}
            share = max(sums[value], 0.0) / sum(max(one, 0.0) for one in sums.values()) if any(sums.values()) else 0.0
            right = max(words, key=words.__getitem__) == value
            by_attribute.setdefault(attribute, []).append((right, max(sums, key=sums.__getitem__) == value, share))
    features = {name: sum(pair[0] == name for pair in stands_for.values()) for name in by_attribute}
    everything = [one for some in by_attribute.values() for one in some]
    for attribute, some in [*sorted(by_attribute.items()), ("all", everything)]:
        n = len(some)
        if not n:
            continue
        rights = [float(np.mean([one[which] for one in some])) for which in (0, 1)]
        low, high = interval(rights[0], n)
        yield {
            "SAE": sae,
            "attribute": attribute,
            "features": features.get(attribute, len(stands_for)),
            "cases": n,
            "right word first": f"{rights[0]:.3f} ({low:.3f} to {high:.3f})",
            "first of all sources": f"{rights[1]:.3f}",
            "its share": f"{np.mean([one[2] for one in some]):.2f}",
            "largest error of a sum": f"{exact:.1e} of {count:,}" if attribute == "all" else "",
        }
    if exact > _EXACT:
        raise ArithmeticError(f"{sae}: a sum of contributions is off by {exact:.1e}, more than {_EXACT}")


def _means(engine: Engine, sae: str, scenes: Sequence[Scene], batch: int) -> Floats:
    """Mean activation of each feature in each scene, in one step, [scenes, d_sae]."""
    size, d_sae = engine.info.default_size, engine.info.saes[sae].bundle.d_sae
    means = np.zeros((len(scenes), d_sae))
    for start in range(0, len(scenes), batch):
        captions = [plain_caption(scene) for scene in scenes[start : start + batch]]
        jobs = [Job(text, start + at, 1, *size, picture=False, saes=(sae,)) for at, text in enumerate(captions)]
        for at, result in enumerate(engine.run(jobs)):
            if result is not None:
                (codes,) = result.features
                means[start + at] = np.bincount(codes.indices, codes.values, d_sae) / len(codes.counts)
    return means
