"""What runs the U-Net, behind one interface, and the exact way to steer a network that was compiled ahead of time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from turbolens_server.files import first_line
from turbolens_server.unet.conditions import Conditions

PREDICTION: Final = "prediction"
"""Name of a compiled graph's first output; the others are the updates, named by :func:`update_name`."""

Affine = tuple[Tensor, Tensor]
"""Open-loop steering of one hook point, `gain * update + bias`: gain [B, 1, h, w], bias [B, d_model, h, w], float32."""

GraphPass = Callable[[Mapping[str, Affine], Sequence[str]], dict[str, Tensor]]
"""(steering by hook point, where there is any; names of the outputs wanted) -> those outputs, by name."""


OnUpdate = Callable[[str, Tensor, tuple[int, int]], Tensor]
"""(hook point, update [B, height * width, d_model], (height, width)) -> the update to add instead."""


class BackendError(RuntimeError):
    """A backend cannot run; the text is one line that says why and what to do."""


class Tap(Protocol):
    """What a batch reads and steers in one pass of the U-Net."""

    at: frozenset[str]
    """Hook points that are read or steered; where there is none, the U-Net runs as if it had no taps."""
    closed: frozenset[str]
    """Of these, the ones with an edit that depends on the activations of this pass."""

    def __call__(self, point: str, update: Tensor, grid: tuple[int, int]) -> Tensor:
        """Read features of the update [B, h * w, d_model] and steer it."""
        ...

    def read(self, point: str, update: Tensor, grid: tuple[int, int]) -> None:
        """Read features of the update [B, h * w, d_model] only."""
        ...

    def affine(self, point: str, grid: tuple[int, int]) -> Affine | None:
        """The edits of a point that is not closed; None where there is none."""
        ...


class UNetBackend(Protocol):
    """One pass of the U-Net, read and steered at its hook points."""

    @property
    def name(self) -> str:
        """`torch`, `onnx` or `tensorrt`, with what it runs on."""
        ...

    @property
    def takes_bias(self) -> bool:
        """Whether conditions may have a bias, and any number of tokens."""
        ...

    def predict(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> Tensor:
        """The prediction [B, C, h, w].

        Args:
            sample: scaled latents [B, C, h, w].
            timestep: [].
            conditions: what the U-Net hears.
            tap: what to read and steer.
        """
        ...

    def read(self, sample: Tensor, timestep: Tensor, conditions: Conditions, tap: Tap) -> None:
        """Show the tap its hook points, where nobody wants the prediction: the pass ends where the backend can."""
        ...


def need(module: str, extra: str) -> Any:
    """Import a package that an extra of this one brings.

    Raises:
        BackendError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise BackendError(
            f"{module} cannot be imported ({first_line(error)}); pip install 'turbolens[{extra}]'"
        ) from error


def update_name(point: str) -> str:
    """A graph's output that holds the update of a hook point, [B, h * w, d_model], before steering."""
    return f"update.{point}"


def to_tokens(grid: Tensor) -> Tensor:
    """[B, d, h, w] as [B, h * w, d]."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h * w, d] as [B, d, h, w]."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def steered_passes(
    run: GraphPass, grids: Mapping[str, tuple[int, int]], tap: Tap, wanted: Sequence[str]
) -> dict[str, Tensor]:
    """Run a graph whose steering is an input until every closed edit has seen the activations it depends on.

    Open edits are known before the pass, so a batch that holds no other takes one. A closed edit takes the pass that
    ends with its point's update: nothing after a point reaches back, so that update is already final, and from the
    next pass on the point adds what the edit made of it. One pass more for each closed point, and exact.

    Args:
        run: one pass.
        grids: (rows, columns) by hook point, in order of execution.
        tap: what to read and steer; sees every point once, in order of execution.
        wanted: names of outputs of the last pass; where there are none, it is left out once every point is seen.

    Returns:
        The outputs wanted, by name.
    """
    waiting = [point for point in grids if point in tap.at]
    steering = {}
    for point in waiting:
        if point not in tap.closed and (affine := tap.affine(point, grids[point])) is not None:
            steering[point] = affine
    while closed := next((point for point in waiting if point in tap.closed), None):
        final, waiting = _split_after(waiting, closed)
        updates = run(steering, [update_name(point) for point in final])
        for point in final[:-1]:
            tap.read(point, updates[update_name(point)], grids[point])
        steered = to_grid(tap(closed, updates[update_name(closed)], grids[closed]).float(), grids[closed])
        steering[closed] = (torch.zeros_like(steered[:, :1]), steered)
    names = [*wanted, *(update_name(point) for point in waiting)]
    outputs = run(steering, names) if names else {}
    for point in waiting:
        tap.read(point, outputs[update_name(point)], grids[point])
    return {name: outputs[name] for name in wanted}


def _split_after(points: list[str], last: str) -> tuple[list[str], list[str]]:
    at = points.index(last) + 1
    return points[:at], points[at:]
