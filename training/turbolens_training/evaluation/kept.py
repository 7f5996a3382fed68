"""Batches of a long evaluation, kept as they end: a run that is cut short goes on where it was."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from turbolens_server.files import whole_folder


class KeptBatches:
    """Results by batch, of one run alone."""

    def __init__(self, folder: Path, what: str) -> None:
        """Where they are kept; `what` names all that they depend on: those of another run are not looked at."""
        self._folder = folder
        self._run = hashlib.sha256(what.encode()).hexdigest()[:16]

    def get(self, start: int) -> dict[str, Tensor] | None:
        """What was made of the batch that begins at a row; None: nothing yet."""
        file = self._batch(start) / "batch.safetensors"
        return load_file(file) if file.exists() else None

    def put(self, start: int, made: Mapping[str, Tensor]) -> None:
        """Keep what was made."""
        with whole_folder(self._batch(start), replace=True) as folder:
            save_file({name: value.contiguous() for name, value in made.items()}, folder / "batch.safetensors")

    def drop(self) -> None:
        """All was made: nothing of it is needed any more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _batch(self, start: int) -> Path:
        return self._folder / f"{self._run}-{start:06d}"
