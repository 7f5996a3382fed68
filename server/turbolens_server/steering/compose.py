"""The steering algebra at one hook point and step, in delta form.

With x the update at a position, z = SAE(x) and d_j the decoder row of feature j, the steered update is
x + sum_j (z'_j - z_j) d_j. What is not edited cancels exactly: reconstruction error, b_dec, every other feature.

Every edit moves the activation of a feature by an affine map (see `turbolens_server.steering.kinds`), and affine maps
follow one another as one. So a list of edits of any length is a few numbers for each edited feature and position,
whatever the activations turn out to be:

    x' = gain x + sum_r patches_r x_r + sum_j (slope_j z_j + shift_j + sum_r given_rj z_rj) d_j

with x_r and z_r the update and the activations of a reference run. A condition is a mask that is known in the pass
alone: edits with one are composed again then. The slow twin is `turbolens_server.steering.twin`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from turbolens_server.steering.kinds import KINDS
from turbolens_server.steering.resolve import ResolvedEdit


@dataclasses.dataclass(frozen=True)
class RowEdits:
    """All edits of one row at one hook point and step."""

    gain: Tensor  # [P]: what `replace` and `patch` leave of the update
    features: Tensor  # [S] int64, distinct and rising
    slope: Tensor  # [S, P]
    shift: Tensor  # [S, P]
    patches: Mapping[str, Tensor]
    """How much of each reference run's update is put in, [P]."""
    given: Mapping[str, Tensor]
    """How much of each reference run's activations is put in, [S, P]."""
    reads_own: bool
    """Whether an edit depends on the activations of the pass that it steers."""
    conditional: tuple[ResolvedEdit, ...] = ()
    """The edits themselves, where one has a condition that is still open."""

    @property
    def references(self) -> tuple[str, ...]:
        """The runs that are read."""
        return tuple(dict.fromkeys([*self.patches, *self.given]))

    @property
    def closed(self) -> bool:
        """Whether anything depends on the updates of this pass: otherwise all is known before it."""
        return self.reads_own or bool(self.references)

    def to(self, device: torch.device) -> RowEdits:
        """On a device."""
        if self.gain.device == device:
            return self
        return dataclasses.replace(
            self,
            gain=self.gain.to(device),
            features=self.features.to(device),
            slope=self.slope.to(device),
            shift=self.shift.to(device),
            patches={name: share.to(device) for name, share in self.patches.items()},
            given={name: share.to(device) for name, share in self.given.items()},
        )

    @property
    def asked(self) -> Tensor:
        """The features of open conditions, int64, distinct and rising."""
        asked = {edit.condition.feature for edit in self.conditional if edit.condition}
        return torch.tensor(sorted(asked), dtype=torch.int64)

    def decided(self, activations: Tensor) -> RowEdits:
        """With no condition open, on the CPU: `activations` [C, P] are the row's own of the features `asked`."""
        at = {feature: i for i, feature in enumerate(self.asked.tolist())}
        activations = activations.cpu()
        edits = [
            edit
            if edit.condition is None
            else dataclasses.replace(
                edit, mask=edit.mask * edit.condition.share(activations[at[edit.condition.feature]]), condition=None
            )
            for edit in self.conditional
        ]
        return compose(edits, len(self.gain))

    def filled(self, activations: Mapping[str, Tensor]) -> RowEdits:
        """With the activations of reference runs at the edited features put in, each [S, P]."""
        if not self.given:
            return self
        shift = self.shift + sum(share * activations[name] for name, share in self.given.items())
        return dataclasses.replace(self, shift=shift, given={})


def compose(edits: Sequence[ResolvedEdit], positions: int) -> RowEdits:
    """All edits of one row as one.

    Args:
        edits: in the request's order; those that act on the whole update act first, and their masks do not overlap.
        positions: P, of the grid.
    """
    features = torch.cat([torch.zeros(0, dtype=torch.int64), *(edit.features for edit in edits)]).unique()
    whole = [edit for edit in edits if KINDS[edit.kind].whole]
    conditional = any(edit.condition for edit in edits)
    shape = (len(features), positions)
    gain, start = torch.ones(positions), torch.zeros(shape)
    patches: dict[str, Tensor] = {}
    for edit in whole:
        gain = gain - edit.mask
        if edit.kind == "patch":
            patches[_named(edit)] = patches.get(_named(edit), 0) + edit.mask
        else:
            start[torch.searchsorted(features, edit.features)] += edit.amounts[:, None] * edit.mask
    gain = gain.clamp_min(0)  # masks that share a place out may add up to a grey level more than 1
    slope, shift = torch.zeros(shape), torch.zeros(shape)
    given: dict[str, Tensor] = {}
    for edit in edits:
        kind = KINDS[edit.kind]
        if kind.whole:
            continue
        at = torch.searchsorted(features, edit.features)
        put = kind.put(edit.amounts)[:, None] * edit.mask  # [F, P]
        if kind.reads_own:
            own = kind.own(edit.amounts)[:, None] * edit.mask
            slope[at] += own + slope[at] * own
            shift[at] += own * shift[at]
            for share in given.values():
                share[at] += own * share[at]
        if edit.reference is None:
            shift[at] += put
        else:
            given.setdefault(edit.reference, torch.zeros(shape))[at] += put
    # The whole kinds come first: the rest sees gain z + start + sum_r patches_r z_r, of which the update holds all but
    # `start`, which it has to be given besides.
    for name, share in patches.items():
        if any(KINDS[edit.kind].reads_own for edit in edits):
            given[name] = given.get(name, 0) + slope * share
    return RowEdits(
        gain=gain,
        features=features,
        slope=slope * gain,
        shift=start + slope * start + shift,
        patches=patches,
        given=given,
        reads_own=conditional or any(KINDS[edit.kind].reads_own for edit in edits),
        conditional=tuple(edits) if conditional else (),
    )


def _named(edit: ResolvedEdit) -> str:
    if edit.reference is None:
        raise ValueError(f"{edit.kind} needs a reference run")
    return edit.reference


@dataclasses.dataclass(frozen=True)
class PackedEdits:
    """The edits of a batch, the entries of one row after those of another: what `kernels.ops.apply_edits` takes."""

    gain: Tensor  # [B, P] float32
    offsets: Tensor  # [B + 1] int32: the entries of row b are offsets[b] to offsets[b + 1]
    features: Tensor  # [E] int64, distinct and rising in a row
    slope: Tensor  # [E, P] float32
    shift: Tensor  # [E, P] float32

    def to(self, device: torch.device) -> PackedEdits:
        """On a device; the host does not wait for the copies to a GPU."""
        if self.gain.device == device:
            return self

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.numel() and not tensor.is_cuda:
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        fields = {field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return PackedEdits(**fields)


def pack(rows: Sequence[RowEdits | None], positions: int) -> PackedEdits:
    """Pack the edits of each row of a batch, all on one device; None: a row without edits."""
    present = [row for row in rows if row is not None]
    if len(rows) == len(present) == 1:  # a picture alone in its batch: nothing to join
        (row,) = present
        offsets = torch.tensor([0, len(row.features)], dtype=torch.int32, device=row.gain.device)
        return PackedEdits(row.gain[None], offsets, row.features, row.slope, row.shift)
    device = present[0].gain.device if present else torch.device("cpu")
    untouched, nothing = torch.ones(positions, device=device), torch.zeros(0, positions, device=device)
    ends = [0, *itertools.accumulate(0 if row is None else len(row.features) for row in rows)]
    return PackedEdits(
        gain=torch.stack([untouched if row is None else row.gain for row in rows]),
        offsets=torch.tensor(ends, dtype=torch.int32, device=device),
        features=torch.cat([nothing[:, 0].long(), *(row.features for row in present)]),
        slope=torch.cat([nothing, *(row.slope for row in present)]),
        shift=torch.cat([nothing, *(row.shift for row in present)]),
    )
