"""The slow, readable twin of the steering algebra, for tests: one position and one feature at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from turbolens_server.steering.kinds import KINDS
from turbolens_server.steering.resolve import ResolvedEdit


def move_dense(
    x: Tensor,
    z: Tensor,
    W_dec: Tensor,
    edits: Sequence[ResolvedEdit],
    references: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Steer updates by edits of features of a dictionary, with every activation written out.

    The result is x + sum_j (z'_j - z_j) d_j; `replace` and `patch` swap that share of the whole update instead, and
    leave the swapped-in activations for the edits after them. Several SAEs at one hook point are one dictionary: their
    activations and decoder rows side by side.

    Args:
        x: updates of one picture, [P, d_model].
        z: their activations, [P, d_sae].
        W_dec: [d_sae, d_model].
        edits: in the request's order.
        references: updates and activations of each reference run, as x and z.

    Returns:
        [P, d_model] float32.
    """
    before, z, out = z, z.clone(), x.float().clone()

    def mask_at(edit: ResolvedEdit, position: int) -> float:
        m = float(edit.mask[position])
        if edit.condition is None:
            return m
        there, threshold = float(before[position, edit.condition.feature]), edit.condition.threshold
        shares = {"above": float(there > threshold), "below": float(there < threshold)}
        return m * (
            min(max(there / threshold, 0.0), 1.0) if edit.condition.rule == "map" else shares[edit.condition.rule]
        )

    whole = [edit for edit in edits if KINDS[edit.kind].whole]
    for position in range(len(x)):
        left = max(0.0, 1 - sum(mask_at(edit, position) for edit in whole))
        out[position] *= left
        z[position] *= left
        for edit in whole:
            if edit.kind == "patch":
                update, activations = (references or {})[edit.reference or ""]
                out[position] += mask_at(edit, position) * update[position].float()
                z[position] += mask_at(edit, position) * activations[position]
        for edit in (*whole, *(e for e in edits if not KINDS[e.kind].whole)):
            m = mask_at(edit, position)
            for j, amount in zip(edit.features.tolist(), edit.amounts.tolist(), strict=True):
                old = float(z[position, j])
                there = 1.0 if edit.reference is None else float((references or {})[edit.reference][1][position, j])
                new = {
                    "add": old + amount * m * there,
                    "scale": old + m * (amount - 1) * old,
                    "set": (1 - m) * old + m * amount * there,
                    "transfer": (1 - m) * old + m * amount * there,
                    "replace": old + m * amount,
                }[edit.kind]
                z[position, j] = new
                out[position] += (new - old) * W_dec[j]
    return out


def choose_dense(
    reference: Sequence[Tensor], own: Sequence[Tensor], masks: Sequence[Tensor], own_masks: Sequence[Tensor], n: int
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The choice of a transfer, with every activation written out.

    Args:
        reference: activations of one run at each hook point, [T, P, d_sae]; over the steps to compare.
        own: of the picture's own run.
        masks: where the reference counts, at each hook point [P].
        own_masks: where the own run does.
        n: features to give, and to take, at most.

    Returns:
        Features given and taken, each with its score: places among the features of all hook points in order.
    """

    def shares(run: Sequence[Tensor], where: Sequence[Tensor]) -> list[float]:
        means = []
        for z, m in zip(run, where, strict=True):
            for j in range(z.shape[2]):
                at_step = [
                    sum(float(m[p]) * float(z[t, p, j]) for p in range(len(m))) / float(m.sum()) for t in range(len(z))
                ]
                means.append(sum(at_step) / len(at_step))
        total = sum(means)
        return [mean / total for mean in means]

    scores = [a - b for a, b in zip(shares(reference, masks), shares(own, own_masks), strict=True)]
    order = sorted(enumerate(scores), key=lambda one: -one[1])
    return [one for one in order[:n] if one[1] > 0], [one for one in order[::-1][:n] if one[1] < 0]
