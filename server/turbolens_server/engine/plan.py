"""What a batch does at each hook point and step: which rows are encoded, which are steered, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from turbolens_server.engine.types import Edit, Job, SparseCodes, Unit
from turbolens_server.sae.sae import Codes, Sae
from turbolens_server.sae.steering import ResolvedEdit, affine, needs_codes, steer
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
        self._timesteps = timesteps
        self._device = device
        self._info = info
        points = {point.name: point for point in info.hook_points}
        self.saes_at: dict[str, list[str]] = {}
        for name, sae in info.saes.items():
            self.saes_at.setdefault(sae.hook_point, []).append(name)
        self.wanted: dict[str, list[int]] = {}
        """Rows whose features are wanted, by SAE."""
        self.runs: dict[str, list[Tensor]] = {}
        """Updates of the wanted rows at the steps so far, by temporal SAE: each [rows, P, d_model]."""
        self._edits: dict[str, dict[int, list[tuple[Edit, Tensor]]]] = {}
        """By SAE and row: the edits that move its features, with their masks on the block's grid."""
        for row, job in enumerate(jobs):
            _check_temporal(job, info)
            for name in job.saes:
                self.wanted.setdefault(name, []).append(row)
            for edit in job.edits:
                for name in dict.fromkeys(feature.sae for feature in edit.features):
                    grid = points[info.saes[name].hook_point].grid(job.height, job.width)
                    mask = np.ones(grid, np.float32) if edit.mask is None else edit.mask.on_grid(*grid)
                    flat = torch.from_numpy(mask).flatten().to(device)
                    self._edits.setdefault(name, {}).setdefault(row, []).append((edit, flat))

    def edits_at(self, sae: str, step: int) -> dict[int, list[ResolvedEdit]]:
        """The edits on one SAE's features at one step, by row, in request order."""
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
            features=torch.tensor([feature.index for feature in features], device=self._device),
            amounts=torch.tensor(amounts, dtype=torch.float32, device=self._device),
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
        steered = list(update.unbind(0))
        edited = False
        for name in self._plan.saes_at[point]:
            sae, edits = self._plan.saes[name], self._edits[name]
            closed = [row for row, row_edits in edits.items() if needs_codes(row_edits)]
            codes = self._codes(name, update, grid, closed)
            for row, row_edits in edits.items():
                steered[row] = steer(steered[row], row_edits, sae.directions(self._step), codes.get(row))
                edited = True
        return torch.stack(steered) if edited else update

    def read(self, point: str, update: Tensor, grid: tuple[int, int]) -> None:
        """Read the update [B, P, d_model] of one hook point."""
        for name in self._plan.saes_at[point]:
            self._codes(name, update, grid, [])

    def affine(self, point: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The edits at a hook point without closed ones: gain [B, 1, h, w] and bias [B, d_model, h, w], float32.

        None where nothing is edited.
        """
        names = [name for name in self._plan.saes_at[point] if self._edits[name]]
        if not names:
            return None
        positions = grid[0] * grid[1]
        rows = []
        for row in range(self._plan.rows):
            gain, bias = affine([], self._plan.saes[names[0]].directions(self._step), positions)
            for name in names:
                directions = self._plan.saes[name].directions(self._step)
                more, shift = affine(self._edits[name].get(row, []), directions, positions)
                gain, bias = more * gain, more * bias + shift
            rows.append((gain, bias))
        gains, biases = (torch.stack(parts).transpose(1, 2) for parts in zip(*rows, strict=True))
        return gains.unflatten(2, grid), biases.unflatten(2, grid)

    def _codes(self, name: str, update: Tensor, grid: tuple[int, int], rows: list[int]) -> dict[int, Codes]:
        """Codes of `rows` by one SAE; those of the rows whose features are wanted are kept for `collect`."""
        wanted = self._plan.wanted.get(name, [])
        if self._plan.saes[name].bundle.steps is not None:
            if wanted:
                self._extend_run(name, update[wanted], grid)  # a copy: a graph may write its next update over this one
            return {}
        encode = sorted({*wanted, *rows})
        codes = self._encode(self._plan.saes[name], update, encode)
        if wanted:
            kept = [encode.index(row) for row in wanted]
            self._read.append((name, grid, wanted, Codes(codes.values[kept], codes.indices[kept])))
        places = {row: encode.index(row) for row in rows}
        return {row: Codes(codes.values[at], codes.indices[at]) for row, at in places.items()}

    def _extend_run(self, name: str, update: Tensor, grid: tuple[int, int]) -> None:
        """Keep the wanted rows' update [rows, P, d_model] for a temporal SAE; the run's last step gives its codes."""
        sae, run = self._plan.saes[name], self._plan.runs.setdefault(name, [])
        run.append(update)
        if len(run) == sae.bundle.steps:
            self._read.append((name, grid, self._plan.wanted[name], sae.encode(side_by_side(run))))

    @staticmethod
    def _encode(sae: Sae, update: Tensor, rows: list[int]) -> Codes:
        """Codes of some rows only: a row that asks for nothing is not encoded."""
        if not rows:
            nothing = update.new_zeros((0, update.shape[1], 1), dtype=torch.float32)
            return Codes(nothing, nothing.long())
        return sae.encode(update if len(rows) == len(update) else update[rows])

    def collect(self) -> Iterator[tuple[int, SparseCodes]]:
        """The wanted features of this step, by row: (row, codes), in order of block."""
        for name, (height, width), rows, codes in self._read:
            values, indices = codes.values.cpu().numpy(), codes.indices.cpu().numpy()
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
