"""What a temporal SAE reads and writes: the updates of all steps of one run at a position, as one vector.

With x_1 ... x_T the updates of the T steps, it encodes what each step's update is beside what the step before lets
expect, in a unit of its own, y_t = (x_t - x_{t-1} P_t) / s_t with x_0 = 0, and decodes step upon step:

    z = ReLU(TopK(sum_t W_enc[t] (y_t - b_dec[t]) + b_enc))
    x_t ~ x_{t-1} P_t + s_t (sum_j z_j W_dec[j, t] + b_dec[t])

P_t is the identity where the bundle has no predictors: then y_t is what changed. So z_j stands for one direction a
step: v_t = v_{t-1} P_t + s_t W_dec[j, t].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.steering.kinds import KINDS, EditKind


def refuse_steps(bundle: Bundle, steps: int, skipped: int = 0) -> str | None:
    """Why an SAE cannot serve a run of so many steps, with so many skipped before them; None where it can."""
    if bundle.steps is None or (bundle.steps == steps and not skipped):
        return None
    whole = ", from the first on; those of a strength below 1 begin later" if skipped else ""
    return f"the temporal SAE {bundle.name} serves runs of {bundle.steps} steps alone{whole}"


def refuse_edit(bundle: Bundle, kind: EditKind, reference: str | None = None) -> str | None:
    """Why an SAE cannot serve an edit of some kind, which may read a reference run; None where it can."""
    if bundle.steps is None or not (KINDS[kind].reads_own or KINDS[kind].reference or reference):
        return None
    taken = [name for name, other in KINDS.items() if not other.reads_own and not other.reference]
    said = f"{kind} in the unit of a reference" if reference and not KINDS[kind].reference else kind
    return (
        f"{said} needs activations while the picture is made, and those of the temporal SAE {bundle.name} are known "
        f"after the last step; it takes {' and '.join(taken)}"
    )


def side_by_side(updates: Iterable[Tensor]) -> Tensor:
    """T updates [..., d_model] as what a temporal SAE reads, [..., T * d_model] float32."""
    return torch.cat([update.float() for update in updates], -1)


def by_step(x: Tensor, steps: int) -> Tensor:
    """The inverse: [..., T * d_model] -> [T, ..., d_model]."""
    at_steps: Tensor = x.unflatten(-1, (steps, -1))
    return at_steps.movedim(-2, 0)


def changes(x: Tensor, scales: Tensor, predictors: Tensor | None = None) -> Tensor:
    """The y of updates x, both [..., T * d_model]: what the step before did not let expect, in units of scales [T].

    Args:
        x: updates of all steps side by side.
        scales: unit of each step.
        predictors: [T - 1, d_model, d_model], row vectors from the right; None: as the step before.
    """
    at_steps: Tensor = x.unflatten(-1, (len(scales), -1))
    before = at_steps[..., :-1, :]
    if predictors is not None:
        before = torch.einsum("...td,tde->...te", before, predictors)
    before = functional.pad(before, (0, 0, 1, 0))
    return ((at_steps - before) / scales[:, None]).flatten(-2)


def directions(weights: SaeWeights) -> tuple[Tensor, Tensor]:
    """Decoder and bias that give updates instead of their changes: [d_sae, T * d_model] and [T * d_model].

    Raises:
        ValueError: they are not the weights of a temporal SAE.
    """
    if weights.scales is None:
        raise ValueError("only a temporal SAE has scales")
    rows = torch.cat([weights.W_dec, weights.b_dec[None]]).unflatten(-1, (len(weights.scales), -1))
    rows = rows * weights.scales[:, None]
    if weights.predictors is None:
        summed = rows.cumsum(-2).flatten(-2)
    else:
        steps = [rows[:, 0]]
        for row, predictor in zip(rows[:, 1:].unbind(1), weights.predictors, strict=True):
            steps.append(steps[-1] @ predictor + row)
        summed = torch.stack(steps, 1).flatten(-2)
    return summed[:-1], summed[-1]
