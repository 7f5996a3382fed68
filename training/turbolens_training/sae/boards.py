"""A run's log on TensorBoard or Weights & Biases too, by their own libraries, which nothing else here needs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Protocol

Kind = Literal["tensorboard", "wandb"]
_LIBRARIES: Final[dict[Kind, tuple[str, str]]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
}
"""Module and package."""


class Board(Protocol):
    """Where numbers of a run are shown."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, by names like `up.0.1/explained`."""
        ...

    def close(self) -> None:
        """What was added is kept."""
        ...


class TensorBoard:
    """Event files in a folder: `tensorboard --logdir FOLDER` shows them."""

    def __init__(self, folder: Path) -> None:
        self._writer = _library(*_LIBRARIES["tensorboard"]).SummaryWriter(str(folder))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run; its project and where it goes are the library's to say (`WANDB_PROJECT`, `WANDB_MODE`)."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = _library(*_LIBRARIES["wandb"]).init(dir=str(folder), config=dict(settings))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def check_board(kind: Kind | None) -> None:
    """Raise ValueError where a board's library is not installed, before the work that it is to show."""
    if kind is not None:
        _library(*_LIBRARIES[kind])


def open_board(kind: Kind, folder: Path, settings: Mapping[str, Any]) -> Board:
    """A board of a run.

    Args:
        kind: whose.
        folder: for what it keeps on this machine.
        settings: of the run.

    Raises:
        ValueError: its library is not installed.
    """
    return TensorBoard(folder) if kind == "tensorboard" else WeightsAndBiases(folder, settings)


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"--board {package}: is not installed ({error}); pip install {package}") from None
