"""Several passes of a graph with steering as inputs are one pass with steering in the middle of it."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.unet.backend import PREDICTION, steered_passes, to_grid, to_tokens, update_name

GRIDS = {"a": (4, 6), "b": (2, 3), "c": (2, 3), "d": (4, 6)}
BATCH, D_MODEL = 2, 3


def block(point: str, hidden: torch.Tensor) -> torch.Tensor:
    """A block's update [B, P, d] for a hidden state on the fine grid: bounded, and never the same for two points."""
    turn = torch.linspace(-1, 1, D_MODEL * D_MODEL).reshape(D_MODEL, D_MODEL) + "abcd".index(point)
    return torch.sin(to_tokens(torch.nn.functional.adaptive_avg_pool2d(hidden, GRIDS[point])) @ turn)


def walk(hidden: torch.Tensor, steer) -> torch.Tensor:
    """The toy network: every point adds its steered update to the hidden state [B, d, 4, 6]."""
    for point, grid in GRIDS.items():
        added = to_grid(steer(point, block(point, hidden)), grid)
        hidden = hidden + torch.nn.functional.interpolate(added, hidden.shape[-2:])
    return hidden


@dataclasses.dataclass
class ToyTap:
    """Edits of the form gain * x + bias, and closed ones that look at the update first."""

    at: frozenset[str]
    closed: frozenset[str]
    open_edits: frozenset[str]
    seen: list[tuple[str, torch.Tensor]] = dataclasses.field(default_factory=list)

    def read(self, point, update, grid):
        self.seen.append((point, update))

    def affine(self, point, grid):
        assert point not in self.closed
        if point not in self.open_edits:
            return None
        rows = torch.arange(1.0, BATCH + 1)[:, None, None, None]
        return rows.expand(BATCH, 1, *grid) / 2, rows.expand(BATCH, D_MODEL, *grid) - 1

    def __call__(self, point, update, grid):
        self.read(point, update, grid)
        if point in self.closed:
            return torch.where(update > update.mean(), -2 * update, update)
        if (pair := self.affine(point, grid)) is None:
            return update
        gain, bias = map(to_tokens, pair)
        return gain * update + bias


points = st.frozensets(st.sampled_from(sorted(GRIDS)))


@given(points, points, points, st.integers(0, 20))
def test_passes_equal_the_single_pass(closed, open_edits, read_only, seed):
    def tap():
        return ToyTap(closed | open_edits | read_only, closed, open_edits - closed)

    hidden = torch.randn(BATCH, D_MODEL, 4, 6, generator=torch.Generator().manual_seed(seed))
    single, several = tap(), tap()
    expected = walk(hidden, lambda point, x: single(point, x, GRIDS[point]) if point in single.at else x)
    asked = []

    def run(steering, wanted):
        asked.append(wanted)
        updates = {}

        def steer(point, update):
            updates[update_name(point)] = update
            if point not in steering:
                return update
            gain, bias = map(to_tokens, steering[point])
            return gain * update + bias

        outputs = {PREDICTION: walk(hidden, steer)} | updates
        return {name: outputs[name] for name in wanted}

    assert torch.allclose(steered_passes(run, GRIDS, several, [PREDICTION])[PREDICTION], expected, atol=1e-5)
    assert len(asked) == 1 + len(closed)
    assert [PREDICTION in wanted for wanted in asked] == [False] * len(closed) + [True]
    assert [point for point, _ in several.seen] == [point for point in GRIDS if point in several.at]
    for (_, once), (_, final) in zip(single.seen, several.seen, strict=True):
        assert torch.allclose(once, final, atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_tokens_and_grids_are_each_others_inverse(batch, rows, columns):
    grid = torch.randn(batch, D_MODEL, rows, columns)
    assert torch.equal(to_grid(to_tokens(grid), (rows, columns)), grid)
    assert torch.equal(to_tokens(grid)[:, columns * (rows - 1)], grid[:, :, rows - 1, 0])
