"""The parts of a model that have weights, loaded whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import transformers

from turbolens_server.files import first_line
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.weights import STEMS, Weights, find_weights

_LIBRARIES: Final = {"diffusers": diffusers, "transformers": transformers}
_SHOWN: Final = 3


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


def check_finite(parts: Mapping[str, Any]) -> None:
    """Raise LoadError where a weight of a part of a model is not finite: what comes of it would not be, either.

    A start from kept compiled code does not come here: that was made of weights which did, and is found by the hash of
    their files, so that damage since then is another hash and reads the model.
    """
    for part, module in parts.items():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
                continue
            if not all(bound.isfinite() for bound in tensor.detach().aminmax()):  # one pass, no copy; NaN is both
                kind = str(tensor.dtype).removeprefix("torch.")
                past = "" if tensor.dtype == torch.float32 else f", or is past {kind} (try --dtype float32)"
                raise LoadError(f"{part}: {name} holds values that are not finite; its file is damaged{past}")


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
