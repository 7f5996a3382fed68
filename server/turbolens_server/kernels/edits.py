"""Edits of a whole batch at one hook point, packed into a few tensors for `turbolens_server.kernels.ops.apply_edits`.

Every edit moves the activation of a feature by an affine map: z' = z + e z + c, with e and c by the mask m.

    add a       e = 0           c = m a
    scale a     e = m (a - 1)   c = 0
    set a       e = -m          c = m a
    replace a   e = -m          c = m a, and the update itself shrinks by the same e

Affine maps follow one another as one affine map, z' - z = slope z + shift, so a list of edits of any length is two
numbers for each edited feature and position, whatever the activations turn out to be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from turbolens_server.sae.steering import ResolvedEdit


@dataclasses.dataclass(frozen=True)
class PackedEdits:
    """The edits of a batch; the rows' entries stand one row after the other."""

    gain: Tensor  # [B, P] float32: what `replace` leaves of the update
    offsets: Tensor  # [B + 1] int32: the entries of row b are offsets[b] to offsets[b + 1]
    features: Tensor  # [E] int64, distinct and rising in a row
    slope: Tensor  # [E, P] float32
    shift: Tensor  # [E, P] float32
    needs_codes: bool
    """Whether anything depends on the activations of this pass."""

    def to(self, device: torch.device) -> PackedEdits:
        """On a device; the host does not wait for the copies to a GPU."""

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.numel():
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return PackedEdits(
            gain=move(self.gain),
            offsets=move(self.offsets),
            features=move(self.features),
            slope=move(self.slope),
            shift=move(self.shift),
            needs_codes=self.needs_codes,
        )


def pack_edits(edits: Sequence[Sequence[ResolvedEdit]], positions: int, device: torch.device) -> PackedEdits:
    """Pack the edits of each row of a batch; a row may have none.

    On a GPU this waits for the device, to learn how many distinct features there are: pack before the pass.

    Args:
        edits: by row, in the request's order; `replace` edits act first, and their masks do not overlap.
        positions: P.
        device: of the edits' tensors.
    """
    rows = [_compose(row, positions, device) for row in edits]
    ends = torch.tensor([0, *(len(row.features) for row in rows)], device=device).cumsum(0)
    return PackedEdits(
        gain=torch.stack([row.gain for row in rows]),
        offsets=ends.int(),
        features=torch.cat([row.features for row in rows]),
        slope=torch.cat([row.slope for row in rows]),
        shift=torch.cat([row.shift for row in rows]),
        needs_codes=any(edit.needs_codes for row in edits for edit in row),
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    """The edits of one row."""

    gain: Tensor  # [P]
    features: Tensor  # [S]
    slope: Tensor  # [S, P]
    shift: Tensor  # [S, P]


def _compose(edits: Sequence[ResolvedEdit], positions: int, device: torch.device) -> _Row:
    """All edits of one row as one affine map for each edited feature and position."""
    gain = torch.ones(positions, device=device)
    if not edits:
        nothing = torch.zeros(0, positions, device=device)
        return _Row(gain, torch.zeros(0, dtype=torch.int64, device=device), nothing, nothing)
    features = torch.cat([edit.features for edit in edits]).unique()  # [S], sorted
    swapped = torch.zeros(len(features), positions, device=device)  # what `replace` puts in
    for edit in edits:
        if edit.kind == "replace":
            gain = gain - edit.mask
            swapped[torch.searchsorted(features, edit.features)] += edit.amounts[:, None] * edit.mask
    gain = gain.clamp_min(0)  # masks that share a place out may add up to a grey level more than 1
    slope = torch.zeros_like(swapped)
    shift = torch.zeros_like(swapped)
    for edit in edits:
        if edit.kind == "replace":
            continue
        at = torch.searchsorted(features, edit.features)
        amounts, mask = edit.amounts[:, None], edit.mask  # [F, 1], [P]
        if edit.kind == "add":
            shift[at] += amounts * mask
        else:
            e = (amounts - 1) * mask if edit.kind == "scale" else -mask
            slope[at] += e + slope[at] * e
            shift[at] += e * shift[at]
            if edit.kind == "set":
                shift[at] += amounts * mask
    # `replace` comes first: the rest sees gain z + swapped, of which the update holds gain z and has to be given both.
    return _Row(gain, features, slope * gain, swapped + slope * swapped + shift)
