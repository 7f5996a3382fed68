"""Attribution on ground truth: of the words of a caption, is it the right one that made a feature fire?

At the token where it stands, or at all: a text encoder hands each word on to the tokens after it, so where the U-Net
listens there, the words' own tokens have said little. What leaving a word out of the prompt takes away tells the two
apart.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Attribute, Attribution, Job
from turbolens_server.loading.load import load_engine
from turbolens_server.unet.points import hears_text, is_z
from turbolens_training.evaluation.config import WordsConfig
from turbolens_training.evaluation.z_claims import judge_claims
from turbolens_training.measures.concepts import check_truth
from turbolens_training.measures.counterfactual import interval
from turbolens_training.measures.report import fill, markdown_table, write_table
from turbolens_training.mini.captions import plain_caption
from turbolens_training.mini.scenes import COUNT, Scene, decode_scenes, sample_codes

_LEAST: Final = 5
"""Scenes with a value in which a feature must be active, of those that say what it stands for."""
_SELECTIVE: Final = 0.9
"""Least share of a feature's activation in scenes with its value, those with and without it weighted alike."""
_OTHER: Final = 0.8
"""Most that the same may be for a value of another attribute: a feature of one attribute."""
_EXACT: Final = 1e-4
_RIGHT: Final = 0.95
"""Share of cases in which the right word should win."""
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
    rows: list[dict[str, object]] = []
    claims: list[dict[str, object]] = []
    for name in names:
        asked, found = _measure(engine, name, scenes, config)
        rows, claims = rows + asked, claims + [{"SAE": name, **claim} for claim in found]
    write_table(config.out / "words", rows)
    write_table(config.out / "claims", claims)
    page = config.out.parent / f"{config.out.name}.md"
    fill(page, "words", markdown_table(rows))
    fill(page, "claims", markdown_table(claims))
    config.tell(
        f"{markdown_table(rows)}\n{markdown_table(claims)}\n{config.out / 'words.md'}", report=config.out / "words.md",
        rows=rows, claims=claims,
    )  # fmt: skip


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


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What was found of one feature in one scene."""

    attribute: str
    first: bool
    """Of the words, the right one contributes most."""
    first_of_all: bool
    """Of all sources, the markers and the padding included."""
    at_end: float
    """Share of what speaks for the feature that the end marker and the padding say."""
    by_leaving_out: bool
    """Of the words, leaving out the right one lowers the pre-activation most."""


def left_out(prompt: str) -> dict[str, str]:
    """The prompt without each of its words."""
    words = dict.fromkeys(re.findall(r"\w+", prompt))
    return {word: re.sub(rf"\b{word}\b ?", "", prompt, count=1) for word in words}


def _ask(engine: Engine, sae: str, feature: int, scene: Scene, right: Said, seed: int) -> tuple[_Answer | None, float]:
    """The answer, None where the feature is nowhere active, and the largest error of a sum."""
    size, prompt = engine.info.default_size, plain_caption(scene)
    without = left_out(prompt)
    asked = Attribute(sae, feature, 0)
    jobs = [Job(text, seed, 1, *size, picture=False, attribute=asked) for text in (prompt, *without.values())]
    own, *others = (result.attribution for result in engine.run(jobs) if result is not None)
    if own is None:
        raise AssertionError("what was asked for is attributed")
    error = float(np.abs(own.by_source.sum(1) + own.bias - own.pre).max())
    active = own.activation > 0
    if not active.any():
        return None, error
    sums = word_sums(own)
    words = {word: value for word, value in sums.items() if not word.startswith("<")}
    drops = {
        word: float((own.pre - other.pre)[active].mean())
        for word, other in zip(without, others, strict=True)
        if other is not None
    }
    attribute, value = right
    spoke_for = sum(max(one, 0.0) for one in sums.values())
    answer = _Answer(
        attribute,
        max(words, key=words.__getitem__) == value,
        max(sums, key=sums.__getitem__) == value,
        max(sums["<end>"], 0.0) / spoke_for if spoke_for else 0.0,
        max(drops, key=drops.__getitem__) == value,
    )
    return answer, error


def _measure(
    engine: Engine, sae: str, scenes: Sequence[Scene], config: WordsConfig
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """The table of one SAE, and the claims.

    Raises:
        ArithmeticError: a sum of contributions is not the pre-activation.
    """
    told, tried = scenes[: config.scenes], scenes[config.scenes :]
    stands_for = meanings(_means(engine, sae, told, config.batch), told)
    cases = [
        (feature, scene, pair)
        for feature, pair in stands_for.items()
        for scene in tried
        if said(scene).get(pair[0]) == pair[1]
    ]
    random.Random(config.seed).shuffle(cases)
    answers: list[_Answer] = []
    worst, positions = 0.0, 0
    rows, columns = next(p for p in engine.info.hook_points if p.name == engine.info.saes[sae].hook_point).grid(
        *engine.info.default_size
    )
    for seed, (feature, scene, pair) in enumerate(tqdm(cases[: config.cases], desc=sae, unit="case")):
        answer, error = _ask(engine, sae, feature, scene, pair, seed)
        worst, positions = max(worst, error), positions + rows * columns
        answers += [] if answer is None else [answer]
    if worst > _EXACT:
        raise ArithmeticError(f"{sae}: a sum of contributions is off by {worst:.1e}, more than {_EXACT}")
    table: list[dict[str, object]] = []
    for attribute in [*sorted({answer.attribute for answer in answers}), "all"]:
        some = [answer for answer in answers if attribute in (answer.attribute, "all")]
        if not some:
            continue
        table.append(
            {
                "SAE": sae,
                "attribute": attribute,
                "features": sum(attribute in (pair[0], "all") for pair in stands_for.values()),
                "n": len(some),
                "right word first": _share([answer.first for answer in some]),
                "first of all sources": _share([answer.first_of_all for answer in some]),
                "said by end and padding": f"{np.mean([answer.at_end for answer in some]):.2f}",
                "right by leaving out": _share([answer.by_leaving_out for answer in some]),
                "largest error of a sum": f"{worst:.1e} of {positions:,}" if attribute == "all" else "",
            }
        )
    claims = judge_claims(engine, sae, stands_for, worst, positions, config.scenes, config.batch)
    for text, right in (
        ("the right word contributes most", [answer.first_of_all for answer in answers]),
        ("leaving the right word out takes most away", [answer.by_leaving_out for answer in answers]),
    ):
        if answers:
            low, high = interval(float(np.mean(right)), len(right))
            holds = "yes" if low >= _RIGHT else "no" if high < _RIGHT else "not told apart"
            claims.append(
                {"claim": text, "paper": f"not asked; aim {_RIGHT:.0%}", "n": len(right), "here": _share(right),
                 "holds": holds}
            )  # fmt: skip
    return table, claims


def _share(right: Sequence[bool]) -> str:
    share = float(np.mean(right))
    low, high = interval(share, len(right))
    return f"{share:.2f} ({low:.2f} to {high:.2f})"


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
