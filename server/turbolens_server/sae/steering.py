"""The steering algebra at one hook point and step, in delta form.

With x the update at a position, z = SAE(x) and d_j the decoder row of feature j, the steered update is
x + sum_j (z'_j - z_j) d_j. What is not edited cancels exactly: reconstruction error, b_dec, every other feature.

`add` and `replace` need no activation and become `gain * x + bias`; `scale` and `set` need z (the closed loop).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from turbolens_server.sae.sae import Codes


@dataclasses.dataclass(frozen=True)
class ResolvedEdit:
    """One edit at one hook point and step, with units, weights and mask turned into numbers."""

    kind: Literal["add", "scale", "set", "replace"]
    features: Tensor  # [F] int64, distinct
    amounts: Tensor  # [F] float32: what is added, set or swapped in per feature; the factor of `scale`
    mask: Tensor  # [P] float32 in [0, 1]

    @property
    def needs_codes(self) -> bool:
        """Whether it depends on the activations of this pass."""
        return self.kind in ("scale", "set")


def needs_codes(edits: Sequence[ResolvedEdit]) -> bool:
    """Whether any edit needs the activations, so that the update must be encoded."""
    return any(edit.needs_codes for edit in edits)


def steer(x: Tensor, edits: Sequence[ResolvedEdit], W_dec: Tensor, codes: Codes | None) -> Tensor:
    """Steer the update of one picture at one hook point and step.

    Args:
        x: update, [P, d_model], any float type.
        edits: in the request's order; `replace` edits act first, and their masks do not overlap.
        W_dec: [d_sae, d_model] float32.
        codes: activations of x, K per position; None where no edit needs them.

    Returns:
        The steered update, [P, d_model], in x's type.
    """
    if not edits:
        return x
    if not needs_codes(edits):
        gain, delta = affine(edits, W_dec, len(x))
    else:
        if codes is None:
            raise ValueError("scale and set need the activations of this pass")
        gain, delta = affine([edit for edit in edits if edit.kind == "replace"], W_dec, len(x))
        delta = delta + _closed_loop(edits, W_dec, codes, gain)
    return (gain * x.float() + delta).to(x.dtype)


def affine(edits: Sequence[ResolvedEdit], W_dec: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Edits that need no activation (`add`, `replace`) as `gain * x + bias`.

    Args:
        edits: as for :func:`steer`, none of which needs codes.
        W_dec: [d_sae, d_model] float32.
        positions: P, of the grid.

    Returns:
        gain [P, 1] and bias [P, d_model], float32.
    """
    gain = torch.ones(positions, 1, device=W_dec.device)
    bias = torch.zeros(positions, W_dec.shape[1], device=W_dec.device)
    for edit in edits:
        if edit.kind == "replace":
            gain = gain - edit.mask[:, None]
    gain = gain.clamp_min(0)  # masks that share a place out may add up to a grey level more than 1
    for edit in sorted(edits, key=lambda edit: edit.kind != "replace"):  # `replace` first, then in list order
        bias = bias + edit.mask[:, None] * (edit.amounts @ W_dec[edit.features])
    return gain, bias


def _closed_loop(edits: Sequence[ResolvedEdit], W_dec: Tensor, codes: Codes, gain: Tensor) -> Tensor:
    """Sum over features of (z' - z) d_j, following the activation of every edited feature through the list."""
    touched = torch.cat([edit.features for edit in edits]).unique()  # [S], sorted
    z = gain * codes.of(touched)  # [P, S]: what `replace` left of each
    for edit in edits:
        if edit.kind == "replace":
            z[:, torch.searchsorted(touched, edit.features)] += edit.mask[:, None] * edit.amounts
    start = z.clone()
    for edit in edits:
        columns = torch.searchsorted(touched, edit.features)
        mask, old = edit.mask[:, None], z[:, columns]
        if edit.kind == "add":
            z[:, columns] = old + mask * edit.amounts
        elif edit.kind == "scale":
            z[:, columns] = old + mask * (edit.amounts - 1) * old
        elif edit.kind == "set":
            z[:, columns] = (1 - mask) * old + mask * edit.amounts
    return (z - start) @ W_dec[touched]
