"""How well SAEs reconstruct what they never saw, and what their features do: sums in float64, one pass over the data.

Explained variance has one definition here: 1 - SSE / SST over all tokens of a split, with SST about their mean.
Not a mean of ratios of batches, and not about zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from turbolens_server.sae.bundle import FeatureStats
from turbolens_server.sae.sae import Codes, Sae
from turbolens_server.sae.temporal import by_step, side_by_side
from turbolens_training.activations.stream import StepUpdates


@dataclasses.dataclass
class VarianceSums:
    """Sums over tokens, enough for explained variance and the norm of updates."""

    count: int = 0
    total: Tensor | None = None
    """[d_model] float64, sum of tokens."""
    squares: float = 0.0
    error: float = 0.0
    """Sum of squared errors."""

    def add(self, x: Tensor, reconstruction: Tensor) -> None:
        """Take in tokens [N, d_model] and what became of them."""
        exact = x.double()
        self.count += len(x)
        self.total = exact.sum(0) + (0 if self.total is None else self.total)
        self.squares += exact.square().sum().item()
        self.error += (exact - reconstruction.double()).square().sum().item()

    @property
    def explained(self) -> float:
        """Explained variance: 1 - SSE / SST."""
        if self.total is None:
            return float("nan")
        spread = self.squares - self.total.square().sum().item() / self.count
        return 1 - self.error / spread if spread > 0 else float("nan")

    @property
    def rms(self) -> float:
        """Root mean square of the tokens' norms."""
        return float((self.squares / self.count) ** 0.5)

    def __add__(self, other: VarianceSums) -> VarianceSums:
        totals = [sums.total for sums in (self, other) if sums.total is not None]
        return VarianceSums(
            self.count + other.count,
            torch.stack(totals).sum(0) if totals else None,
            self.squares + other.squares,
            self.error + other.error,
        )


class SaeMeasurement:
    """What one SAE does on a split, collected batch by batch."""

    def __init__(self, d_sae: int, k: int) -> None:
        self.variance: dict[int, VarianceSums] = {}
        """By timestep."""
        self.l0: dict[int, Tensor] = {}
        """By timestep: positions with 0, 1, ... k active features, [k + 1] int64."""
        self.positions = 0
        """That were encoded: each step's, or of a temporal SAE each run's."""
        self.active = torch.zeros(d_sae, dtype=torch.int64)
        """Of these, those at which each feature is active."""
        self._k = k
        self._sum = torch.zeros(d_sae, dtype=torch.float64)
        self._max = torch.zeros(d_sae)

    @classmethod
    def of(cls, sae: Sae) -> SaeMeasurement:
        """Of a served SAE, with nothing seen yet."""
        return cls(sae.W_dec.shape[0], sae.bundle.k or sae.W_dec.shape[0])

    @torch.inference_mode()
    def look(self, sae: Sae, updates: StepUpdates) -> list[Codes]:
        """Take in a batch's updates; returns their codes [N, P, K] of each step, or of a temporal SAE once, of all.

        Raises:
            ValueError: the updates of a temporal SAE are of another number of steps.
            AssertionError: a TopK SAE has more than k features active, so it was not loaded as one.
        """
        shape = updates.by_block[sae.bundle.hook_point][0].shape[:2]
        x = [u.flatten(0, 1).to(sae.W_dec.device, torch.float32) for u in updates.by_block[sae.bundle.hook_point]]
        if sae.bundle.steps is not None:
            found = [_encode(sae, side_by_side(x))]
            self.add_run(updates.timesteps, x, found[0], by_step(sae.decode(found[0]), len(x)))
        else:
            found = [_encode(sae, update) for update in x]
            for timestep, update, codes in zip(updates.timesteps, x, found, strict=True):
                self.add(timestep, update, codes, sae.decode(codes))
        return [Codes(codes.values.unflatten(0, shape), codes.indices.unflatten(0, shape)) for codes in found]

    def add(self, timestep: int, x: Tensor, codes: Codes, reconstruction: Tensor) -> None:
        """Take in the updates x [N, d_model] of one timestep, their codes and their reconstruction."""
        self.add_run([timestep], [x], codes, [reconstruction])

    def add_run(
        self, timesteps: Sequence[int], x: Sequence[Tensor], codes: Codes, reconstruction: Sequence[Tensor] | Tensor
    ) -> None:
        """Take in the updates x, T of [N, d_model], of timesteps that have their codes in common."""
        values, indices = codes.values.cpu(), codes.indices.cpu()  # [N, K]
        active = values > 0
        counts = torch.bincount(active.sum(1), minlength=self._k + 1)
        for timestep, update, made in zip(timesteps, x, reconstruction, strict=True):
            self.variance.setdefault(timestep, VarianceSums()).add(update, made)
            self.l0[timestep] = self.l0.get(timestep, torch.zeros_like(counts)) + counts
        self.positions += len(values)
        features, strengths = indices[active], values[active]
        self.active += torch.bincount(features, minlength=len(self.active))
        self._sum.index_add_(0, features, strengths.double())
        self._max.scatter_reduce_(0, features, strengths, "amax")

    @property
    def explained_variance(self) -> float:
        """Of all timesteps together."""
        return sum(self.variance.values(), VarianceSums()).explained

    @property
    def l0_most(self) -> int:
        """Most features active at one position."""
        return int(torch.stack(list(self.l0.values())).sum(0).nonzero().max())

    @property
    def l0_mean(self) -> float:
        """Features active at a position, on average."""
        return _mean_count(torch.stack(list(self.l0.values())).sum(0))

    def stats(self) -> FeatureStats:
        """The statistics that a bundle carries."""
        timesteps = sorted(self.variance, reverse=True)
        return FeatureStats(
            mean=(self._sum / self.active.clamp(min=1)).float().numpy(),
            max=self._max.numpy(),
            frequency=(self.active.double() / self.positions).float().numpy(),
            timesteps=np.array(timesteps, np.int64),
            update_rms=np.array([self.variance[t].rms for t in timesteps], np.float32),
        )

    def rows(self, block: str, **shares: float) -> list[dict[str, str | float]]:
        """The quality table's rows of this block: all timesteps together, with `shares` of its features, then each."""
        splits: list[tuple[str, list[int]]] = [("all", sorted(self.variance, reverse=True))]
        splits += [(str(t), [t]) for t in splits[0][1]]
        rows: list[dict[str, str | float]] = []
        for name, timesteps in splits:
            variance = sum((self.variance[t] for t in timesteps), VarianceSums())
            counts = torch.stack([self.l0[t] for t in timesteps]).sum(0)
            share = counts.cumsum(0) / counts.sum()
            row: dict[str, str | float] = {"block": block, "timestep": name}
            row["explained_variance"] = round(variance.explained, 4)
            row["l0_mean"] = round(_mean_count(counts), 3)
            row["l0_p99"] = int((share >= 0.99).int().argmax())
            if name == "all":
                row |= {share: round(value, 4) for share, value in shares.items()}
            rows.append(row)
        return rows


def _mean_count(counts: Tensor) -> float:
    """Mean of what was counted: `counts` are the positions with 0, 1, ... of it."""
    return float((counts * torch.arange(len(counts))).sum().item() / counts.sum().item())


@torch.inference_mode()
def measure(saes: Mapping[str, Sae], data: Iterable[StepUpdates]) -> dict[str, SaeMeasurement]:
    """Run served SAEs, by hook point, over the updates of held-out data.

    Raises:
        ValueError: the data of a temporal SAE is of another number of steps.
        AssertionError: a TopK SAE has more than k features active, so it was not loaded as one.
    """
    found = {name: SaeMeasurement.of(sae) for name, sae in saes.items()}
    for updates in data:
        for name, sae in saes.items():
            found[name].look(sae, updates)
    return found


def _encode(sae: Sae, x: Tensor) -> Codes:
    codes = sae.encode(x)
    if sae.bundle.k is not None and int((codes.values > 0).sum(1).max()) > sae.bundle.k:
        raise AssertionError(f"{sae.bundle.name}: more than k={sae.bundle.k} features are active")
    return codes
