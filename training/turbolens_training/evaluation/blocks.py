"""Which block carries which attribute, by intervention: without the block's update, and with another run's."""

from __future__ import annotations

from turbolens_server.engine.engine import Engine
from turbolens_training.evaluation.config import EvalConfig
from turbolens_training.evaluation.edits import NOTHING, PROMPT, Method, edit_pictures, patch
from turbolens_training.evaluation.interventions import zero
from turbolens_training.evaluation.pairs import caption_pairs, draw_pairs, score_edits, split
from turbolens_training.evaluation.sampling import saes_by_block, thumbnails
from turbolens_training.measures.concepts import pick_concepts
from turbolens_training.mini.evaluate import score_attributes

ALL = "all"


def _zero(blocks: list[str]) -> Method:
    return lambda _: zero(blocks)


def measure_blocks(engine: Engine, config: EvalConfig) -> list[dict[str, object]]:
    """Patch and zero every block, and all of them, in pictures whose captions should become others.

    Returns:
        A row for each attribute and block. `patched`: share of pictures that the update of the edited caption's run
        brings nearer to the edited scene; `patched_others`: share of the other attributes that are then right;
        `zeroed`: share of pictures whose attribute is no longer right (nearest of all its values) without the update;
        `zeroed_flip`: share that are then nearer to the edited scene. Block `none` is the untouched picture, block
        `prompt` that of the edited caption.
    """
    saes = saes_by_block(engine, temporal=True)
    groups = draw_pairs(engine, pick_concepts(config.concepts), config.pairs, f"{config.seed}/blocks")
    sites = {**{block: [block] for block in saes}, ALL: list(saes)}
    methods = {f"patch {name}": patch(blocks) for name, blocks in sites.items()}
    methods |= {f"zero {name}": _zero(blocks) for name, blocks in sites.items()}
    pairs = caption_pairs(groups)
    found = edit_pictures(engine, saes, pairs, methods, steps=config.steps, batch=config.batch, title="blocks")
    pictures = {name: thumbnails(latents) for name, latents in found.items()}
    scores = {name: score_edits(groups, drawn) for name, drawn in pictures.items()}

    lost: dict[str, dict[str, list[float]]] = {}
    for name in (NOTHING, *(f"zero {site}" for site in sites)):
        for group, some in split(groups, pictures[name]):
            attribute = group.concept.attribute
            right = score_attributes(group.scenes.codes, group.scenes.noise, some)[attribute].right
            lost.setdefault(name, {}).setdefault(attribute, []).append(1 - right)

    rows: list[dict[str, object]] = []
    for attribute in lost[NOTHING]:
        for site, patched, zeroed in (
            ("none", NOTHING, NOTHING),
            *((site, f"patch {site}", f"zero {site}") for site in sites),
        ):
            values = lost[zeroed][attribute]
            rows.append(
                {
                    "attribute": attribute,
                    "block": site,
                    "patched": round(scores[patched][attribute].nearer, 3),
                    "patched_others": round(scores[patched][attribute].others, 3),
                    "zeroed": round(sum(values) / len(values), 3),
                    "zeroed_flip": round(scores[zeroed][attribute].nearer, 3),
                }
            )
        ceiling = scores[PROMPT][attribute]
        rows.append(
            {
                "attribute": attribute,
                "block": "prompt",
                "patched": round(ceiling.nearer, 3),
                "patched_others": round(ceiling.others, 3),
            }
        )
    return rows
