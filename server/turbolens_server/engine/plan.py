"""What a batch does at each hook point and step: which rows are encoded, which are steered, and how."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.types import Edit, Job, SaeOptions, SparseCodes, Unit, WeightedFeature
from turbolens_server.kernels import ops
from turbolens_server.kernels.edits import PackedEdits, pack_edits
from turbolens_server.sae.sae import Codes, Sae, in_one
from turbolens_server.sae.steering import ResolvedEdit, needs_codes, steer
from turbolens_server.sae.temporal import refuse_edit, refuse_steps, side_by_side


@dataclasses.dataclass(frozen=True)
class PointEdits:
    """The edits of a batch at one hook point and step.

    The SAEs that they name stand side by side as one dictionary, the features of each after those of the one before.
    So an edit may name features of several, every SAE reads the same update, and `replace` comes first whosever
    features it puts in.
    """

    offset_of: dict[str, int]
    """Where the features of each SAE begin."""
    by_row: dict[int, list[ResolvedEdit]]
    """In the request's order, on the CPU; a row without edits is left out."""

    @property
    def saes(self) -> tuple[str, ...]:
        """The SAEs in the order of the dictionary."""
        return tuple(self.offset_of)

    @property
    def closed(self) -> list[int]:
        """Rows with an edit that depends on the activations of this pass."""
        return [row for row, edits in self.by_row.items() if needs_codes(edits)]


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
        """By hook point and row: the edits that act there, with their masks on the block's grid."""
        for row, job in enumerate(jobs):
            _check_temporal(job, info)
            for name in job.saes:
                self.wanted.setdefault(name, []).append(row)
            for options in job.sae_options:
                self.options.setdefault(options.sae, {})[row] = options
            for edit in job.edits:
                for at in dict.fromkeys(info.saes[feature.sae].hook_point for feature in edit.features):
                    grid = points[at].grid(job.height, job.width)
                    mask = np.ones(grid, np.float32) if edit.mask is None else edit.mask.on_grid(*grid)
                    flat = torch.from_numpy(mask).flatten()
                    self._edits.setdefault(at, {}).setdefault(row, []).append((edit, flat))

    def edits_at(self, point: str, step: int) -> PointEdits:
        """The edits at one hook point and step."""
        acting = {
            row: [(edit, mask) for edit, mask in edits if edit.steps is None or edit.steps[0] <= step < edit.steps[1]]
            for row, edits in self._edits.get(point, {}).items()
        }
        named = {feature.sae for edits in acting.values() for edit, _ in edits for feature in edit.features}
        saes = [name for name in self.saes_at[point] if name in named]
        sizes = [self._info.saes[name].bundle.d_sae for name in saes]
        offsets = dict(zip(saes, itertools.accumulate(sizes, initial=0), strict=False))
        by_row = {
            row: [self._resolve(edit, mask, offsets, step) for edit, mask in edits]
            for row, edits in acting.items()
            if edits
        }
        return PointEdits(offsets, by_row)

    def _resolve(self, edit: Edit, mask: Tensor, offsets: Mapping[str, int], step: int) -> ResolvedEdit:
        """An edit at the hook point whose edited SAEs begin at `offsets`."""
        here = [feature for feature in edit.features if feature.sae in offsets]
        amounts = [edit.amount * self._unit(edit, feature, step) * feature.weight for feature in here]
        return ResolvedEdit(
            kind=edit.kind,
            features=torch.tensor([offsets[feature.sae] + feature.index for feature in here]),
            amounts=torch.tensor(amounts, dtype=torch.float32),
            mask=mask,
        )

    def _unit(self, edit: Edit, feature: WeightedFeature, step: int) -> float:
        if edit.kind == "scale" or edit.unit is Unit.RAW:
            return 1.0
        stats = self._info.saes[feature.sae].bundle.stats
        if stats is None:
            raise ValueError(f"{feature.sae} has no statistics, which unit {edit.unit.value!r} needs")
        return float(stats.mean[feature.index]) if edit.unit is Unit.MEAN else stats.norm_at(self._timesteps[step])

    def directions(self, saes: Sequence[str], step: int) -> Tensor:
        """What one of each feature adds to the update of a step, of SAEs side by side, [sum of d_sae, d_model]."""
        each = [self.saes[name].directions(step) for name in saes]
        return each[0] if len(each) == 1 else torch.cat(each)


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
        self._edits = {point: plan.edits_at(point, step) for point in plan.saes_at}
        self._read: list[tuple[str, tuple[int, int], list[int], Codes]] = []
        self.at = frozenset(
            point
            for point, names in plan.saes_at.items()
            if self._edits[point].by_row or any(plan.wanted.get(name) for name in names)
        )
        """Hook points with something to do; where there is none, the U-Net runs as if it had no taps."""
        self.closed = frozenset(point for point, edits in self._edits.items() if edits.closed)
        """Hook points with an edit that depends on the activations of this pass."""

    def __call__(self, point: str, update: Tensor, grid: tuple[int, int]) -> Tensor:
        """Read and steer the update [B, P, d_model] of one hook point."""
        edits, closed = self._edits[point], self._edits[point].closed
        codes = []  # of the closed rows, by SAE, as features of the whole dictionary
        for name in self._plan.saes_at[point]:
            offset = edits.offset_of.get(name)
            rows, own = self._read_rows(name, update, grid, [] if offset is None else closed)
            # A temporal SAE encodes no rows: none of its edits asks for activations.
            if offset is not None and closed and rows:
                values, indices = own if rows == closed else (part[[rows.index(row) for row in closed]] for part in own)
                codes.append(Codes(values, indices + offset))
        if not edits.by_row:
            return update
        known = Codes(*(torch.cat(parts, -1) for parts in zip(*codes, strict=True))) if codes else None
        # On a GPU all edits of a batch are one launch; on a CPU row by row is faster.
        if self._plan.on_gpu:
            return self._steer_packed(point, update, grid, known)
        steered = list(update.unbind(0))
        directions = self._plan.directions(edits.saes, self._step)
        for row, row_edits in edits.by_row.items():
            of_row = Codes(*(part[closed.index(row)] for part in known)) if known and row in closed else None
            steered[row] = steer(steered[row], row_edits, directions, of_row)
        return torch.stack(steered)

    def read(self, point: str, update: Tensor, grid: tuple[int, int]) -> None:
        """Read the update [B, P, d_model] of one hook point."""
        for name in self._plan.saes_at[point]:
            self._read_rows(name, update, grid, [])

    def affine(self, point: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The edits at a hook point without closed ones: gain [B, 1, h, w] and bias [B, d_model, h, w], float32.

        None where nothing is edited.
        """
        edits = self._edits[point]
        if not edits.by_row:
            return None
        d_model = self._plan.saes[edits.saes[0]].bundle.d_model
        bias = torch.zeros(self._plan.rows, grid[0] * grid[1], d_model, device=self._plan.device)
        packed = self._pack(point, grid)
        bias = self._apply(point, packed, bias, _no_codes(bias))
        return packed.gain.unflatten(1, grid)[:, None], bias.transpose(1, 2).unflatten(2, grid)

    def _pack(self, point: str, grid: tuple[int, int]) -> PackedEdits:
        """All edits at one hook point, on the device.

        Packed where they act and not before the pass, while a GPU is still at work on what comes before.
        """
        by_row = [self._edits[point].by_row.get(row, []) for row in range(self._plan.rows)]
        return pack_edits(by_row, grid[0] * grid[1], torch.device("cpu")).to(self._plan.device)

    def _steer_packed(self, point: str, update: Tensor, grid: tuple[int, int], known: Codes | None) -> Tensor:
        packed = self._pack(point, grid)
        if known is None:
            return self._apply(point, packed, update, _no_codes(update))
        closed = self._edits[point].closed
        if len(closed) < len(update):  # of the other rows no edit asks
            shape = (len(update), *known.values.shape[1:])
            every = Codes(known.values.new_zeros(shape), known.indices.new_zeros(shape))
            every.values[closed], every.indices[closed] = known.values, known.indices
            known = every
        return self._apply(point, packed, update, known)

    def _apply(self, point: str, packed: PackedEdits, update: Tensor, codes: Codes) -> Tensor:
        return ops.apply_edits(
            update, packed.gain, packed.offsets, packed.features, packed.slope, packed.shift,
            self._plan.directions(self._edits[point].saes, self._step), codes.values, codes.indices,
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
