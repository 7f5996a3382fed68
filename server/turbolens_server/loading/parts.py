"""The parts of a model that have weights: which files they are, and loaded whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import transformers

from turbolens_server.files import first_line
from turbolens_server.loading.errors import LoadError

STEMS: Final = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""What the weight files of each part are called."""
_LIBRARIES: Final = {"diffusers": diffusers, "transformers": transformers}
_SHOWN: Final = 3


@dataclasses.dataclass(frozen=True)
class Weights:
    """The files of one part."""

    files: tuple[Path, ...]
    """In order of name."""
    variant: str | None
    """What to ask the library for, so that it loads these."""

    @property
    def name(self) -> str:
        """Of the file, or of the first of several, with the part's folder."""
        more = f" (and {len(self.files) - 1} more)" if len(self.files) > 1 else ""
        return f"{self.files[0].parent.name}/{self.files[0].name}{more}"


def find_weights(folder: Path, stem: str, variant: str | None) -> Weights:
    """The weight files of one part: the variant's where the folder has it, since a pipeline may have it of some only.

    Libraries differ in which they take of several, so that several are refused: what is hashed is what is loaded.

    Raises:
        LoadError: there are none, or both one file and shards.
    """
    for name in dict.fromkeys((variant, None)):
        dot = f".{name}" if name else ""
        single = f"{stem}{dot}.safetensors"
        # The second is how older versions of diffusers named it.
        indices = dict.fromkeys((f"{stem}.safetensors.index{dot}.json", f"{stem}.safetensors{dot}.index.json"))
        found = [file for file in (single, *indices) if (folder / file).is_file()]
        if len(found) > 1:
            raise LoadError(f"{folder}: holds both {' and '.join(found)}; keep the one that is to be loaded")
        if found == [single]:
            return Weights((folder / single,), name)
        if found:
            shards = sorted(set(_weight_map(folder / found[0]).values()))
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise LoadError(f"{folder}: {missing[0]} is missing, which {found[0]} names")
            return Weights(tuple(folder / shard for shard in shards), name)
    raise LoadError(
        f"{folder}: {stem}.safetensors is missing, and pickled weights are not loaded; convert them by save_pretrained"
    )


def read_part(folder: Path, kind: Any, weights: Weights, dtype: torch.dtype) -> Any:
    """One part with every tensor from its files: libraries draw those that are missing at random, or leave them empty.

    Args:
        folder: with its configuration.
        kind: its class.
        weights: its files, in the same folder.
        dtype: of its tensors.

    Raises:
        LoadError: its files cannot be read, or lack tensors; the line names them and the file.
    """
    try:
        with _quiet():
            part, report = kind.from_pretrained(
                folder,
                dtype=dtype,
                variant=weights.variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise LoadError(f"{weights.name} cannot be loaded ({first_line(error)})") from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        raise LoadError(f"{weights.name} lacks {len(missing)} tensor{'s'[: len(missing) > 1]}: {shown}")
    return part


def read_parts(folder: Path, dtype: torch.dtype, variant: str | None) -> dict[str, Any]:
    """Every part of a `diffusers` folder that has weights, by name.

    Raises:
        LoadError: one is not there, or lacks tensors.
    """
    index = folder / "model_index.json"
    try:
        named = json.loads(index.read_text())
        kinds = {part: getattr(_LIBRARIES[named[part][0]], named[part][1]) for part in STEMS}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        wanted = ", ".join(STEMS)
        raise LoadError(f"{index}: does not say what {wanted} are, or of classes unknown ({error!r})") from error
    return {
        part: read_part(folder / part, kind, find_weights(folder / part, STEMS[part], variant), dtype)
        for part, kind in kinds.items()
    }


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor, of an index of shards."""
    try:
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("no files by tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: no index of shards ({first_line(error)})") from error
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' tables of missing tensors: they are told in one line."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
