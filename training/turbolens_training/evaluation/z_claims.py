"""What Kissane et al. (arXiv 2406.17759) claim of SAEs at z, tested on scenes whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from turbolens_server.catalog.labels import read_labels
from turbolens_server.engine.engine import Engine
from turbolens_server.sae.bundle import Bundle
from turbolens_training.activations.taps import Intervention
from turbolens_training.evaluation.interventions import splice, zero
from turbolens_training.evaluation.sampling import sample, thumbnails
from turbolens_training.evaluation.splice import recovered
from turbolens_training.measures.counterfactual import interval
from turbolens_training.mini.report import held_out

_DRAWS: Final = 1000
_EXACT: Final = 1e-4


def judge_claims(
    engine: Engine, name: str, stands_for: Mapping[int, tuple[str, str]], worst: float, positions: int,
    pictures: int, batch: int,
) -> list[dict[str, object]]:  # fmt: skip
    """Each claim, what the paper says, what was found of how many, and whether it holds.

    Args:
        engine: the model with the SAE.
        name: of the SAE.
        stands_for: (attribute, value) of the features that stand for one attribute alone.
        worst: largest error of a sum of contributions.
        positions: of so many sums.
        pictures: to splice.
        batch: pictures of a batch.
    """
    bundle = engine.info.saes[name].bundle
    heads = engine.components.unet.get_submodule(_layer(engine, bundle)).heads
    several = polysemantic(bundle.weights.W_dec, heads, stands_for)
    live, named = labelled(bundle)
    found, low, high = loss_recovered(engine, name, pictures, batch)
    return [
        {
            "claim": "a pre-activation is the sum over heads and sources", "paper": "exactly", "n": positions,
            "here": f"largest error {worst:.1e}", "holds": "yes" if worst <= _EXACT else "no",
        },
        {
            "claim": "heads are polysemantic", "paper": "at least 90 % of GPT-2 small's", "n": heads,
            "here": f"{several} write features of two attributes or more", "holds": _holds(several, heads, 0.9),
        },
        {
            "claim": "most live features mean something", "paper": "often 80 % and more", "n": live,
            "here": _share(named, live) + " have a label by the truth", "holds": _holds(named, live, 0.8),
        },
        {
            "claim": "reconstructions do what z did", "paper": "more than 80 % of the loss, L0 below 20", "n": pictures,
            "here": f"{found:.3f} ({low:.3f} to {high:.3f}) of the picture, L0 {bundle.k}",
            "holds": "yes" if low > 0.8 else "no" if high <= 0.8 else "not told apart",
        },
    ]  # fmt: skip


def polysemantic(W_dec: Tensor, heads: int, stands_for: Mapping[int, tuple[str, str]]) -> int:
    """Heads that write features of two attributes or more; a feature is written by the head with its largest slice of
    the decoder [d_sae, d_model]."""
    writer = W_dec.unflatten(1, (heads, -1)).norm(dim=2).argmax(1).tolist()
    told = {(writer[feature], attribute) for feature, (attribute, _) in stands_for.items()}
    return sum(sum(head == one for one, _ in told) > 1 for head in range(heads))


def labelled(bundle: Bundle) -> tuple[int, int]:
    """Features that are active anywhere in the catalog's pictures, and those of them that have a label."""
    known = read_labels(bundle.folder, bundle.d_sae)
    live = [j for j in range(bundle.d_sae) if bundle.stats is None or bundle.stats.frequency[j] > 0]
    return len(live), sum(bool(known[j].label) for j in live if j in known)


def loss_recovered(engine: Engine, name: str, pictures: int, batch: int) -> tuple[float, float, float]:
    """What the reconstruction does of what z does to pictures in one step (see :func:`recovered`), with its interval at
    95 % by drawing the pictures again."""
    held, seeds = held_out(engine, pictures)
    point = engine.info.saes[name].hook_point

    def draw(intervene: Intervention | None = None) -> Tensor:
        parts = [slice(start, start + batch) for start in range(0, len(seeds), batch)]
        return torch.cat(
            [thumbnails(sample(engine, held.captions[rows], seeds[rows], 1, intervene=intervene).latents)
             for rows in parts]
        )  # fmt: skip

    own = draw()
    spliced, zeroed = (
        (draw(change) - own).double().square().mean((1, 2, 3))
        for change in (splice({point: engine.saes[name]}), zero([point]))
    )
    picks = torch.randint(pictures, (_DRAWS, pictures), generator=torch.Generator().manual_seed(0))
    drawn = 1 - spliced[picks].sum(1) / zeroed[picks].sum(1).clamp(min=1e-12)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return recovered(zeroed.sum().item(), spliced.sum().item()) or 0.0, low, high


def _layer(engine: Engine, bundle: Bundle) -> str:
    """The module of the attention layer that a z is of."""
    (point,) = (point for point in engine.info.hook_points if point.name == bundle.hook_point)
    return point.module.removesuffix(".z")


def _holds(count: int, of: int, bound: float) -> str:
    low, high = interval(count / max(1, of), max(1, of))
    return "yes" if low >= bound else "no" if high < bound else "not told apart"


def _share(count: int, of: int) -> str:
    low, high = interval(count / max(1, of), max(1, of))
    return f"{count / max(1, of):.2f} ({low:.2f} to {high:.2f})"
