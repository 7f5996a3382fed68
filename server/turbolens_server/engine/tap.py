"""What a batch of jobs reads and steers in one pass of the U-Net."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turbolens_server.engine.plan import BatchPlan
from turbolens_server.engine.types import Attribute, Attribution, SaeOptions, SparseCodes
from turbolens_server.kernels import ops
from turbolens_server.sae.attribution import contributions
from turbolens_server.sae.sae import Codes, in_one
from turbolens_server.sae.temporal import side_by_side
from turbolens_server.steering.compose import PackedEdits, RowEdits, pack
from turbolens_server.unet.points import inner_names, layer_of, pattern_name, values_name


class StepTap:
    """The tap of one step: lives for one pass of the U-Net, reads and steers updates, and is then collected."""

    def __init__(self, plan: BatchPlan, step: int) -> None:
        self._plan = plan
        self._step = step
        self._edits = {point: plan.edits_at(point, step) for point in plan.saes_at}
        self._read: list[tuple[str, tuple[int, int], list[int], Codes]] = []
        attributed = {point: [row for row, _ in asked] for (point, at), asked in plan.attributed.items() if at == step}
        self._inner = {name: rows for point, rows in attributed.items() for name in inner_names(layer_of(point))}
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._attributions: list[tuple[int, Attribution]] = []
        self.at = frozenset(
            point
            for point, names in plan.saes_at.items()
            if self._edits[point].by_row or any(plan.wanted.get(name) for name in names) or point in attributed
        ) | frozenset(self._inner)
        """Hook points with something to do; where there is none, the U-Net runs as if it had no taps."""
        self.closed = frozenset(point for point, edits in self._edits.items() if edits.closed)
        """Hook points with an edit that depends on the updates of this pass."""
        self.times: list[tuple[str, float, float]] = []
        """What was done: hook point, start and end by `time.monotonic`."""

    def __call__(self, point: str, update: Tensor, grid: tuple[int, int]) -> Tensor:
        """Read and steer the update [B, P, d_model] of one hook point; keep what is within an attention layer."""
        if point in self._inner:
            rows = self._inner[point]
            self._seen |= {(point, row): own for row, own in zip(rows, update[rows], strict=True)}  # of those alone
            return update
        with self._timed(point):
            for row, asked in self._plan.attributed.get((point, self._step), ()):
                self._attributions.append((row, self._attribute(point, update, grid, row, asked)))
            return self._read_and_steer(point, update, grid)

    def _read_and_steer(self, point: str, update: Tensor, grid: tuple[int, int]) -> Tensor:
        edits = self._edits[point]
        codes = []  # of the encoded rows, by SAE, as features of the whole dictionary
        for name in self._plan.saes_at[point]:
            first = edits.first_of.get(name)
            needed = [] if first is None else list(edits.encoded)
            rows, own = self._read_rows(name, update, grid, needed)
            # A temporal SAE encodes no rows: none of its edits asks for activations.
            if first is not None and needed and rows:
                values, indices = own if rows == needed else (part[[rows.index(row) for row in needed]] for part in own)
                codes.append(Codes(values, indices + first))
        if not edits.by_row:
            return update
        known = Codes(*(torch.cat(parts, -1) for parts in zip(*codes, strict=True))) if codes else None
        return self._steer(point, update, known)

    def read(self, point: str, update: Tensor, grid: tuple[int, int]) -> None:
        """Read the update [B, P, d_model] of one hook point."""
        with self._timed(point):
            for name in self._plan.saes_at[point]:
                self._read_rows(name, update, grid, [])

    def _attribute(self, point: str, update: Tensor, grid: tuple[int, int], row: int, asked: Attribute) -> Attribution:
        """What made a feature fire in a row's z, of the update [B, P, d_model]."""
        sae, layer = self._plan.saes[asked.sae], layer_of(point)
        weights = sae.bundle.weights
        column, b_dec = (part.to(update.device) for part in (weights.W_enc[:, asked.index], weights.b_dec))
        pattern, values = self._seen[pattern_name(layer), row], self._seen[values_name(layer), row]
        parts = contributions(pattern, values, column, b_dec)  # [heads, P, sources]
        bias = float(weights.b_enc[asked.index])
        pre = (update[row].float() - b_dec) @ column + bias
        active = self._encode(asked.sae, update, [row]).of(torch.tensor([asked.index], device=update.device))[0, :, 0]
        return Attribution(
            *grid, _on_host(pre), _on_host(active), bias, _on_host(parts.sum(0)), _on_host(parts.sum(2).T.contiguous())
        )

    def attributions(self) -> list[tuple[int, Attribution]]:
        """What was attributed in this step, by row; without the sources' names."""
        return self._attributions

    @contextlib.contextmanager
    def _timed(self, point: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.times.append((point, started, time.monotonic()))

    def affine(self, point: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The edits at a hook point without closed ones: gain [B, 1, h, w] and bias [B, d_model, h, w], float32.

        None where nothing is edited.
        """
        if not self._edits[point].by_row:
            return None
        packed = self._pack(point, grid[0] * grid[1], self._edits[point].by_row)
        directions = self._plan.directions(point, self._step)
        bias = torch.zeros(self._plan.rows, grid[0] * grid[1], directions.shape[1], device=self._plan.device)
        bias = _apply(packed, bias, directions, _no_codes(bias))
        return packed.gain.unflatten(1, grid)[:, None], bias.transpose(1, 2).unflatten(2, grid)

    def _steer(self, point: str, update: Tensor, known: Codes | None) -> Tensor:
        """Apply the edits of one hook point; `known` are the activations of the rows that are encoded for them."""
        edits = self._edits[point]
        place = {row: at for at, row in enumerate(edits.encoded)}
        by_row = {
            row: self._filled(row, _decided(row, row_edits, known, place), known, place)
            for row, row_edits in edits.by_row.items()
        }
        own = _no_codes(update)
        if known is not None and (reading := [row for row, row_edits in by_row.items() if row_edits.reads_own]):
            shape = (len(update), *known.values.shape[1:])
            own = Codes(known.values.new_zeros(shape), known.indices.new_zeros(shape))
            places = [place[row] for row in reading]
            own.values[reading], own.indices[reading] = known.values[places], known.indices[places]
        packed = self._pack(point, update.shape[1], by_row)
        steered = _apply(packed, update, self._plan.directions(point, self._step), own)
        return self._patched(steered, update, by_row)

    def _filled(self, row: int, edits: RowEdits, known: Codes | None, place: dict[int, int]) -> RowEdits:
        """A row's edits with the activations of its reference runs put in."""
        if not edits.given or known is None:
            return edits
        edits = edits.to(known.values.device)
        lanes = self._plan.lanes.read_by(row)
        activations = {}
        for name in edits.given:
            at = place[lanes[name]]
            activations[name] = Codes(known.values[at], known.indices[at]).of(edits.features).T  # [S, P]
        return edits.filled(activations)

    def _patched(self, steered: Tensor, update: Tensor, by_row: dict[int, RowEdits]) -> Tensor:
        """With the updates of reference runs put in where a row is patched."""
        patches = [(row, name, share) for row, edits in by_row.items() for name, share in edits.patches.items()]
        if not patches:
            return steered
        out = steered.float()
        for row, name, share in patches:
            out[row] += share.to(out.device)[:, None] * update[self._plan.lanes.read_by(row)[name]].float()
        return out.to(update.dtype)

    def _pack(self, point: str, positions: int, by_row: dict[int, RowEdits]) -> PackedEdits:
        """All edits at one hook point, on the device.

        Packed where they act and not before the pass, while a GPU is still at work on what comes before.
        """
        if any(edits.gain.device != self._plan.device for edits in by_row.values()) and any(
            edits.gain.device == self._plan.device for edits in by_row.values()
        ):
            by_row = {row: edits.to(self._plan.device) for row, edits in by_row.items()}
        return pack([by_row.get(row) for row in range(self._plan.rows)], positions).to(self._plan.device)

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
            self._read.append(
                (name, grid, self._plan.wanted[name], sae.encode(side_by_side(run), pick=self._plan.pick))
            )

    def _encode(self, name: str, update: Tensor, rows: list[int]) -> Codes:
        """Codes of some rows only, each at its own k and prefix: a row that asks for nothing is not encoded."""
        plan = self._plan
        sae, options = plan.saes[name], plan.options.get(name, {})
        alike: dict[SaeOptions, list[int]] = {}  # places in `rows`
        for place, row in enumerate(rows):
            alike.setdefault(options.get(row, SaeOptions(name)), []).append(place)
        if len(alike) == 1:
            (asked,) = alike
            own = update if len(rows) == len(update) else update[rows]
            return sae.encode(own, k=asked.k, prefix=asked.prefix, pick=plan.pick)
        return in_one(
            [
                (
                    places,
                    sae.encode(update[[rows[at] for at in places]], k=asked.k, prefix=asked.prefix, pick=plan.pick),
                )
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
            active = values > 0  # [rows, P, K]
            counts = active.sum(-1, dtype=np.uint16)
            ends = counts.sum(-1, dtype=np.int64).cumsum()[:-1]
            kept = (np.split(indices[active].astype(np.int32), ends), np.split(values[active], ends))
            for row, own_counts, own_indices, own_values in zip(rows, counts, *kept, strict=True):
                # Copies: a row is a view of its whole batch, which it would keep for as long as itself.
                yield (
                    row,
                    SparseCodes(
                        sae=name,
                        step=self._step,
                        height=height,
                        width=width,
                        d_sae=self._plan.saes[name].W_dec.shape[0],
                        counts=own_counts.copy(),
                        indices=own_indices.copy(),
                        values=own_values.copy(),
                    ),
                )


def _decided(row: int, edits: RowEdits, known: Codes | None, place: dict[int, int]) -> RowEdits:
    """A row's edits with their conditions answered by its own activations."""
    if not edits.conditional or known is None:
        return edits
    own = Codes(known.values[place[row]], known.indices[place[row]])
    return edits.decided(own.of(edits.asked.to(own.indices.device)).T)


def _apply(packed: PackedEdits, update: Tensor, directions: Tensor, codes: Codes) -> Tensor:
    return ops.apply_edits(
        update, packed.gain, packed.offsets, packed.features, packed.slope, packed.shift,
        directions, codes.values, codes.indices,
    )  # fmt: skip


def _on_host(values: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = values.cpu().numpy()
    return array


def _no_codes(update: Tensor) -> Codes:
    """No activation at any position of updates [B, P, d_model]."""
    nothing = torch.zeros(*update.shape[:2], 0, device=update.device)
    return Codes(nothing, nothing.long())
