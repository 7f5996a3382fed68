"""What a picture loses when an SAE's reconstruction takes the place of the update."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.engine.engine import Engine
from turbolens_training.activations.taps import Intervention
from turbolens_training.evaluation.config import EvalConfig
from turbolens_training.evaluation.interventions import splice, zero
from turbolens_training.evaluation.sampling import saes_by_block, sample, thumbnails
from turbolens_training.mini.evaluate import HeldOut, psnr, score_attributes
from turbolens_training.mini.report import held_out


def distance(a: Tensor, b: Tensor) -> float:
    """Mean squared error of pictures in [-1, 1]."""
    return (a.double() - b.double()).square().mean().item()


def attributes_right(held: HeldOut, pictures: Tensor) -> float:
    """Share of attributes that are right, mean over attributes."""
    scores = [s.right for s in score_attributes(held.codes, held.noise, pictures).values() if s.count]
    return sum(scores) / len(scores)


def recovered(ablated: float, spliced: float) -> float | None:
    """(d_ablate - d_SAE) / d_ablate: 1 when the reconstruction does all that the update did, 0 when it does no more
    than none; None where leaving the update out changes nothing."""
    return (ablated - spliced) / ablated if ablated > 0 else None


def measure_splice(engine: Engine, config: EvalConfig) -> list[dict[str, object]]:
    """Splice and zero each block, and all of them, on held-out scenes.

    Returns:
        A row for each block and `all`. `psnr`: of the spliced pictures to the model's own, dB; `recovered`: see the
        function; `right`: attributes right in the model's own pictures, spliced and zeroed.
    """
    saes = saes_by_block(engine)
    held, seeds = held_out(engine, config.splice_scenes)
    sites = {**{block: [block] for block in saes}, "all": list(saes)}

    def draw(intervene: Intervention | None = None) -> Tensor:
        parts = []
        for start in range(0, len(seeds), config.batch):
            rows = slice(start, start + config.batch)
            run = sample(engine, held.captions[rows], seeds[rows], config.steps, intervene=intervene)
            parts.append(thumbnails(run.latents))
        return torch.cat(parts)

    own = draw()
    right = attributes_right(held, own)
    rows: list[dict[str, object]] = []
    for name, blocks in tqdm(sites.items(), desc="splice", unit="block"):
        spliced, zeroed = draw(splice({block: saes[block] for block in blocks})), draw(zero(blocks))
        share = recovered(distance(zeroed, own), distance(spliced, own))
        rows.append(
            {
                "block": name,
                "psnr": round(psnr(spliced, own).mean().item(), 2),
                "psnr_zeroed": round(psnr(zeroed, own).mean().item(), 2),
                **({} if share is None else {"recovered": round(share, 4)}),
                "right": round(right, 3),
                "right_spliced": round(attributes_right(held, spliced), 3),
                "right_zeroed": round(attributes_right(held, zeroed), 3),
            }
        )
    return rows
