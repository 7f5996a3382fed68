"""What a batch does at each hook point and step: which rows are encoded, which are steered, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from turbolens_server.engine.types import Edit, Job, SaeOptions, SparseCodes, Unit
from turbolens_server.kernels import ops
from turbolens_server.kernels.edits import PackedEdits, pack_edits
from turbolens_server.sae.sae import Codes, Sae, in_one
from turbolens_server.sae.steering import ResolvedEdit, needs_codes, steer
from turbolens_server.sae.temporal import refuse_edit, refuse_steps, side_by_side

if TYPE_CHECKING:
    from turbolens_server.engine.engine import EngineInfo


class BatchPlan:
    """The edits and wanted features of a batch, resolved once: hook points, grids, masks, units."""

    def __init__(
        self,
        jobs: Sequence[Job],
        info: EngineInfo,
        saes: Mapping[str, Sae],
        device: torch.device,
        timesteps: Sequence[float],
    ) -> None:
        self.saes = saes
        self.rows = len(jobs)
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._timesteps = timesteps
        self._info = info
        points = {point.name: point for point in info.hook_points}
        self.saes_at: dict[str, list[str]] = {}
        for name, sae in info.saes.items():
            self.saes_at.setdefault(sae.hook_point, []).append(name)
        self.wanted: dict[str, list[int]] = {}
        """Rows whose features are wanted, by SAE."""
        self.runs: dict[str, list[Tensor]] = {}
        """Updates of the wanted rows at the steps so far, by temporal SAE: each [rows, P, d_model]."""
        self.options: dict[str, dict[int, SaeOptions]] = {}
        """How a row reads an SAE, by SAE and row; where none is named, at its own k and whole."""
        self._edits: dict[str, dict[int, list[tuple[Edit, Tensor]]]] = {}
        """By SAE and row: the edits that move its features, with their masks on the block's grid."""
        for row, job in enumerate(jobs):
            _check_temporal(job, info)
            for name in job.saes:
                self.wanted.setdefault(name, []).append(row)
            for options in job.sae_options:
                self.options.setdefault(options.sae, {})[row] = options
            for edit in job.edits:
                for name in dict.fromkeys(feature.sae for feature in edit.features):
                    grid = points[info.saes[name].hook_point].grid(job.height, job.width)
                    mask = np.ones(grid, np.float32) if edit.mask is None else edit.mask.on_grid(*grid)
                    flat = torch.from_numpy(mask).flatten()
                    self._edits.setdefault(name, {}).setdefault(row, []).append((edit, flat))

    def edits_at(self, sae: str, step: int) -> dict[int, list[ResolvedEdit]]:
        """The edits on one SAE's features at one step, by row, in request order; on the CPU."""
        resolved: dict[int, list[ResolvedEdit]] = {}
        for row, edits in self._edits.get(sae, {}).items():
            for edit, mask in edits:
                if edit.steps is None or edit.steps[0] <= step < edit.steps[1]:
                    resolved.setdefault(row, []).append(self._resolve(edit, mask, sae, step))
        return resolved

    def _resolve(self, edit: Edit, mask: Tensor, sae: str, step: int) -> ResolvedEdit:
        features = [feature for feature in edit.features if feature.sae == sae]
        amounts = [edit.amount * self._unit(edit, feature.index, sae, step) * feature.weight for feature in features]
        return ResolvedEdit(
            kind=edit.kind,
            features=torch.tensor([feature.index for feature in features]),
            amounts=torch.tensor(amounts, dtype=torch.float32),
            mask=mask,
        )

    def _unit(self, edit: Edit, index: int, sae: str, step: int) -> float:
        if edit.kind == "scale" or edit.unit is Unit.RAW:
            return 1.0
        stats = self._info.saes[sae].bundle.stats
        if stats is None:
            raise ValueError(f"{sae} has no statistics, which unit {edit.unit.value!r} needs")
        return float(stats.mean[index]) if edit.unit is Unit.MEAN else stats.norm_at(self._timesteps[step])


def _check_temporal(job: Job, info: EngineInfo) -> None:
    """Raise ValueError where a temporal SAE cannot do what a job asks of it."""
    edited = [(feature.sae, edit.kind) for edit in job.edits for feature in edit.features]
    refusals = [refuse_steps(info.saes[name].bundle, job.steps) for name in (*job.saes, *(sae for sae, _ in edited))]
    refusals += [refuse_edit(info.saes[name].bundle, kind) for name, kind in edited]
    if reason := next(filter(None, refusals), None):
        raise ValueError(reason)


class StepTap:
    """The tap of one step: lives for one pass of the U-Net, reads and steers updates, and is then collected."""

    def __init__(self, plan: BatchPlan, step: int) -> None:
        self._plan = plan
        self._step = step
        self._edits = {name: plan.edits_at(name, step) for name in plan.saes}
        self._read: list[tuple[str, tuple[int, int], list[int], Codes]] = []
        self.at = frozenset(
            point for point, names in plan.saes_at.items() if any(plan.wanted.get(n) or self._edits[n] for n in names)
        )
        """Hook points with something to do; where there is none, the U-Net runs as if it had no taps."""
        self.closed = frozenset(
            point
            for point, names in plan.saes_at.items()
            if any(needs_codes(edits) for n in names for edits in self._edits[n].values())
        )
        """Hook points with an edit that depends on the activations of this pass."""

    def __call__(self, point: str, update: Tensor, grid: tuple[int, int]) -> Tensor:
        """Read and steer the update [B, P, d_model] of one hook point."""
        steered = update
        for name in self._plan.saes_at[point]:
            edits = self._edits[name]
            rows, codes = self._read_rows(name, update, grid, [row for row in edits if needs_codes(edits[row])])
            # On a GPU all edits of a batch are one launch; on a CPU row by row is faster.
            if edits and self._plan.on_gpu:
                steered = self._steer_packed(name, steered, rows, codes)
            elif edits:
                by_row = list(steered.unbind(0))
                directions = self._plan.saes[name].directions(self._step)
                for row, row_edits in edits.items():
                    own = Codes(*(part[rows.index(row)] for part in codes)) if needs_codes(row_edits) else None
                    by_row[row] = steer(by_row[row], row_edits, directions, own)
                steered = torch.stack(by_row)
        return steered

    def read(self, point: str, update: Tensor, grid: tuple[int, int]) -> None:
        """Read the update [B, P, d_model] of one hook point."""
        for name in self._plan.saes_at[point]:
            self._read_rows(name, update, grid, [])

    def affine(self, point: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The edits at a hook point without closed ones: gain [B, 1, h, w] and bias [B, d_model, h, w], float32.

        None where nothing is edited.
        """
        names = [name for name in self._plan.saes_at[point] if self._edits[name]]
        if not names:
            return None
        rows, positions, device = self._plan.rows, grid[0] * grid[1], self._plan.device
        d_model = self._plan.saes[names[0]].bundle.d_model
        gain = torch.ones(rows, positions, device=device)
        bias = torch.zeros(rows, positions, d_model, device=device)
        for name in names:
            packed = self._pack(name)
            gain, bias = packed.gain * gain, self._apply(name, packed, bias, _no_codes(bias))
        return gain.unflatten(1, grid)[:, None], bias.transpose(1, 2).unflatten(2, grid)

    def _pack(self, name: str) -> PackedEdits:
        """All edits on one SAE's features, on the device.

        Packed where they act and not before the pass, while a GPU is still at work on what comes before.
        """
        edits = self._edits[name]
        positions = next(len(edit.mask) for row_edits in edits.values() for edit in row_edits)
        by_row = [edits.get(row, []) for row in range(self._plan.rows)]
        return pack_edits(by_row, positions, torch.device("cpu")).to(self._plan.device)

    def _steer_packed(self, name: str, update: Tensor, rows: list[int], codes: Codes) -> Tensor:
        packed = self._pack(name)
        if not packed.needs_codes:
            return self._apply(name, packed, update, _no_codes(update))
        if len(rows) < len(update):  # of the other rows no edit asks
            shape = (len(update), *codes.values.shape[1:])
            every = Codes(codes.values.new_zeros(shape), codes.indices.new_zeros(shape))
            every.values[rows], every.indices[rows] = codes.values, codes.indices
            codes = every
        return self._apply(name, packed, update, codes)

    def _apply(self, name: str, packed: PackedEdits, update: Tensor, codes: Codes) -> Tensor:
        return ops.apply_edits(
            update, packed.gain, packed.offsets, packed.features, packed.slope, packed.shift,
            self._plan.saes[name].directions(self._step), codes.values, codes.indices,
        )  # fmt: skip

    def _read_rows(
        self, name: str, update: Tensor, grid: tuple[int, int], edited: list[int]
    ) -> tuple[list[int], Codes]:
        """Rows that one SAE encodes, and their codes: of `edited` and of those whose features are wanted.

        A row that asks for nothing is not encoded. What is wanted is kept for `collect`.
        """
        wanted = self._plan.wanted.get(name, [])
        if self._plan.saes[name].bundle.steps is not None:
            if wanted:
                self._extend_run(name, update[wanted], grid)  # a copy: a graph may write its next update over this one
            return [], _no_codes(update[:0])
        rows = sorted({*wanted, *edited})
        if not rows:
            return rows, _no_codes(update[:0])
        codes = self._encode(name, update, rows)
        if wanted:
            kept = [rows.index(row) for row in wanted]
            whole = len(kept) == len(rows)
            self._read.append((name, grid, wanted, codes if whole else Codes(*(part[kept] for part in codes))))
        return rows, codes

    def _extend_run(self, name: str, update: Tensor, grid: tuple[int, int]) -> None:
        """Keep the wanted rows' update [rows, P, d_model] for a temporal SAE; the run's last step gives its codes."""
        sae, run = self._plan.saes[name], self._plan.runs.setdefault(name, [])
        run.append(update)
        if len(run) == sae.bundle.steps:
            self._read.append((name, grid, self._plan.wanted[name], sae.encode(side_by_side(run))))

    def _encode(self, name: str, update: Tensor, rows: list[int]) -> Codes:
        """Codes of some rows only, each at its own k and prefix: a row that asks for nothing is not encoded."""
        sae, options = self._plan.saes[name], self._plan.options.get(name, {})
        alike: dict[SaeOptions, list[int]] = {}  # places in `rows`
        for place, row in enumerate(rows):
            alike.setdefault(options.get(row, SaeOptions(name)), []).append(place)
        if len(alike) == 1:
            (asked,) = alike
            return sae.encode(update if len(rows) == len(update) else update[rows], k=asked.k, prefix=asked.prefix)
        return in_one(
            [
                (places, sae.encode(update[[rows[place] for place in places]], k=asked.k, prefix=asked.prefix))
                for asked, places in alike.items()
            ]
        )

    def collect(self) -> Iterator[tuple[int, SparseCodes]]:
        """The wanted features of this step, by row: (row, codes), in order of block."""
        # All copies first, then one wait for the device instead of one each.
        on_host = [[part.to("cpu", non_blocking=True) for part in codes] for *_, codes in self._read]
        if self._plan.on_gpu:
            torch.cuda.current_stream(self._plan.device).synchronize()
        for (name, (height, width), rows, _), parts in zip(self._read, on_host, strict=True):
            values, indices = (part.numpy() for part in parts)
            for at, row in enumerate(rows):
                active = values[at] > 0  # [P, K]
                yield (
                    row,
                    SparseCodes(
                        sae=name,
                        step=self._step,
                        height=height,
                        width=width,
                        d_sae=self._plan.saes[name].W_dec.shape[0],
                        counts=active.sum(-1).astype(np.uint16),
                        indices=indices[at][active].astype(np.int32),
                        values=values[at][active].astype(np.float32),
                    ),
                )


def _no_codes(update: Tensor) -> Codes:
    """No activation at any position of updates [B, P, d_model]."""
    nothing = torch.zeros(*update.shape[:2], 0, device=update.device)
    return Codes(nothing, nothing.long())
