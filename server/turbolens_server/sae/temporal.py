"""What a temporal SAE reads and writes: the updates of all steps of one run at a position, as one vector.

With x_1 ... x_T the updates of the T steps, it encodes what changed since the step before, each step in a unit of its
own, y_t = (x_t - x_{t-1}) / s_t with x_0 = 0, and decodes the changes, of which an update is the sum so far:

    z = ReLU(TopK(sum_t W_enc[t] (y_t - b_dec[t]) + b_enc)),   x_t ~ sum_{r <= t} s_r (sum_j z_j W_dec[j, r] + b_dec[r])

So z_j stands for one direction a step: at step t, sum_{r <= t} s_r W_dec[j, r].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.steering.kinds import KINDS, EditKind


def refuse_steps(bundle: Bundle, steps: int) -> str | None:
    """Why an SAE cannot serve a run of so many steps; None where it can."""
    if bundle.steps in (None, steps):
        return None
    return f"the temporal SAE {bundle.name} serves runs of {bundle.steps} steps alone"


def refuse_edit(bundle: Bundle, kind: EditKind, reference: str | None = None) -> str | None:
    """Why an SAE cannot serve an edit of some kind, which may read a reference run; None where it can."""
    if bundle.steps is None or not (KINDS[kind].reads_own or KINDS[kind].reference or reference):
        return None
    taken = [name for name, other in KINDS.items() if not other.reads_own and not other.reference]
    return (
        f"{kind} needs activations while the picture is made, and those of the temporal SAE {bundle.name} are known "
        f"after the last step; it takes {' and '.join(taken)}"
    )


def side_by_side(updates: Iterable[Tensor]) -> Tensor:
    """T updates [..., d_model] as what a temporal SAE reads, [..., T * d_model] float32."""
    return torch.cat([update.float() for update in updates], -1)


def by_step(x: Tensor, steps: int) -> Tensor:
    """The inverse: [..., T * d_model] -> [T, ..., d_model]."""
    at_steps: Tensor = x.unflatten(-1, (steps, -1))
    return at_steps.movedim(-2, 0)


def changes(x: Tensor, scales: Tensor) -> Tensor:
    """The y of updates x, both [..., T * d_model]: what changed since the step before, in units of scales [T]."""
    at_steps: Tensor = x.unflatten(-1, (len(scales), -1))
    before = functional.pad(at_steps[..., :-1, :], (0, 0, 1, 0))
    return ((at_steps - before) / scales[:, None]).flatten(-2)


def directions(weights: SaeWeights) -> tuple[Tensor, Tensor]:
    """Decoder and bias that give updates instead of their changes: [d_sae, T * d_model] and [T * d_model].

    Raises:
        ValueError: they are not the weights of a temporal SAE.
    """
    if weights.scales is None:
        raise ValueError("only a temporal SAE has scales")
    rows = torch.cat([weights.W_dec, weights.b_dec[None]]).unflatten(-1, (len(weights.scales), -1))
    summed = (rows * weights.scales[:, None]).cumsum(-2).flatten(-2)
    return summed[:-1], summed[-1]
