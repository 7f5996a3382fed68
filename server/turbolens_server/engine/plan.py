"""What a batch does at each hook point and step: which rows are encoded, which are steered, and how."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.types import Attribute, Job, SaeOptions
from turbolens_server.kernels.select import Pick
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.temporal import refuse_edit, refuse_steps
from turbolens_server.steering.compose import RowEdits, compose
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.resolve import ResolvedEdit, resolve


@dataclasses.dataclass(frozen=True)
class PointEdits:
    """The edits of a batch at one hook point and step.

    The SAEs that a batch's edits name at a hook point stand side by side as one dictionary, the features of each after
    those of the one before. So an edit may name features of several, every SAE reads the same update, and `replace`
    comes first whosever features it puts in.
    """

    first_of: dict[str, int]
    """Where the features of each SAE begin in the dictionary."""
    by_row: dict[int, RowEdits]
    """On the CPU; a row without edits is left out."""
    encoded: tuple[int, ...]
    """Rows whose activations the edits read: their own, and those of reference runs."""

    @property
    def closed(self) -> bool:
        """Whether an edit depends on the updates of this pass."""
        return any(row.closed for row in self.by_row.values())


class BatchPlan:
    """The edits and wanted features of a batch; edits become numbers once, not once a row and step."""

    def __init__(
        self,
        jobs: Sequence[Job],
        lanes: Lanes,
        info: EngineInfo,
        saes: Mapping[str, Sae],
        device: torch.device,
        timesteps: Sequence[float],
        pick: Pick | None = None,
    ) -> None:
        """`pick` selects features on a CPU; None: NumPy."""
        self.saes = saes
        self.pick = pick
        self.lanes = lanes
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.wanted: dict[str, list[int]] = {}
        """Rows whose features are wanted, by SAE."""
        self.runs: dict[str, list[Tensor]] = {}
        """Updates of the wanted rows at the steps so far, by temporal SAE: each [rows, P, d_model]."""
        self.options: dict[str, dict[int, SaeOptions]] = {}
        """How a row reads an SAE, by SAE and row; where none is named, at its own k and whole."""
        self.attributed: dict[tuple[str, int], list[tuple[int, Attribute]]] = {}
        """What to attribute by hook point and step: rows and features."""
        self._info = info
        self._timesteps = timesteps
        self._points = {point.name: point for point in info.hook_points}
        self._size = (jobs[0].height, jobs[0].width)
        self._edits: dict[str, dict[int, list[Edit]]] = {}
        """By hook point and row: the edits that act there at some step."""
        self._masks: dict[tuple[int, tuple[int, int]], Tensor] = {}
        self._resolved: dict[tuple[int, str, int], ResolvedEdit] = {}
        self._composed: dict[tuple[object, ...], RowEdits] = {}
        self._opposites: dict[int, Edit] = {}
        for row, job in enumerate(jobs):
            _check_temporal(job, info)
            for name in job.saes:
                self.wanted.setdefault(name, []).append(row)
            if (asked := job.attribute) is not None:
                where = (info.saes[asked.sae].hook_point, asked.step)
                self.attributed.setdefault(where, []).append((row, asked))
            for options in job.sae_options:
                for lane in self.lanes.rows_of(row):
                    self.options.setdefault(options.sae, {})[lane] = options
            for lane, edit in self._sided(row, job):
                for at in dict.fromkeys([*edit.points, *(info.saes[f.sae].hook_point for f in edit.features)]):
                    self._edits.setdefault(at, {}).setdefault(lane, []).append(edit)
        self.saes_at: dict[str, list[str]] = {point: [] for point in self._edits}
        for name, sae in info.saes.items():
            self.saes_at.setdefault(sae.hook_point, []).append(name)
        self._first_of = {point: self._dictionary(point) for point in self._edits}

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.lanes)

    def edits_at(self, point: str, step: int) -> PointEdits:
        """The edits at one hook point and step."""
        by_row = {
            row: self._compose(point, step, acting)
            for row, edits in self._edits.get(point, {}).items()
            if (acting := [edit for edit in edits if edit.acts_at(step)])
        }
        encoded = {row for row, edits in by_row.items() if edits.reads_own}
        encoded |= {self.lanes.read_by(row)[name] for row, edits in by_row.items() for name in edits.given}
        return PointEdits(self._first_of.get(point, {}), by_row, tuple(sorted(encoded)))

    def directions(self, point: str, step: int) -> Tensor:
        """What one of each feature of a point's dictionary adds to the update of a step, [sum of d_sae, d_model]."""
        each = [self.saes[name].directions(step) for name in self._first_of[point]]
        if not each:
            return torch.zeros(0, self._points[point].d_model, device=self.device)
        return each[0] if len(each) == 1 else torch.cat(each)

    def _sided(self, row: int, job: Job) -> Iterator[tuple[int, Edit]]:
        """The edits of a job with the lanes that they act on."""
        for edit in job.edits:
            yield row, edit
            if edit.side == "both":
                yield self.lanes.second[row], edit
            elif edit.side == "contrast":
                yield self.lanes.second[row], self._opposites.setdefault(id(edit), edit.opposite())

    def _dictionary(self, point: str) -> dict[str, int]:
        """Where each SAE's features begin, of those that any edit of the batch names at a hook point."""
        named = {feature.sae for edits in self._edits[point].values() for edit in edits for feature in edit.features}
        named |= {
            edit.condition.feature.sae for edits in self._edits[point].values() for edit in edits if edit.condition
        }
        saes = [name for name in self.saes_at[point] if name in named]
        sizes = [self._info.saes[name].bundle.d_sae for name in saes]
        return dict(zip(saes, itertools.accumulate(sizes, initial=0), strict=False))

    def _compose(self, point: str, step: int, edits: Sequence[Edit]) -> RowEdits:
        """Edits at a hook point as one; those of several rows and steps that are the same are composed once."""
        resolved = [self._resolve(edit, point, step) for edit in edits]
        key = (point, *map(id, resolved))
        if key not in self._composed:
            rows, columns = self._points[point].grid(*self._size)
            self._composed[key] = compose(resolved, rows * columns)
        return self._composed[key]

    def _resolve(self, edit: Edit, point: str, step: int) -> ResolvedEdit:
        # Only the norm of the update differs from step to step.
        key = (id(edit), point, step if edit.unit is Unit.NORM else 0)
        if key not in self._resolved:
            grid = self._points[point].grid(*self._size)
            self._resolved[key] = resolve(
                edit,
                self._mask(edit, grid),
                self._first_of[point],
                lambda feature, unit: self._unit(feature, unit, step),
            )
        return self._resolved[key]

    def _mask(self, edit: Edit, grid: tuple[int, int]) -> Tensor:
        key = (id(edit.mask), grid)
        if key not in self._masks:
            mask = np.ones(grid, np.float32) if edit.mask is None else edit.mask.on_grid(*grid)
            self._masks[key] = torch.from_numpy(mask).flatten()
        return self._masks[key]

    def _unit(self, feature: WeightedFeature, unit: Unit, step: int) -> float:
        stats = self._info.saes[feature.sae].bundle.stats
        if stats is None:
            raise ValueError(f"{feature.sae} has no statistics, which unit {unit.value!r} needs")
        return float(stats.mean[feature.index]) if unit is Unit.MEAN else stats.norm_at(self._timesteps[step])


def _check_temporal(job: Job, info: EngineInfo) -> None:
    """Raise ValueError where a temporal SAE cannot do what a job asks of it."""
    edited = {(feature.sae, edit.kind, edit.reference) for edit in job.edits for feature in edit.features}
    used = {*job.saes, *(sae for sae, *_ in edited)}
    refusals = [refuse_steps(info.saes[name].bundle, job.steps, job.skipped) for name in used]
    refusals += [refuse_edit(info.saes[name].bundle, kind, reference) for name, kind, reference in edited]
    if reason := next(filter(None, refusals), None):
        raise ValueError(reason)
