"""A model as `diffusers` loads it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline

from turbolens_server.files import first_line
from turbolens_server.loading.checks import check_folder
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hashes import hash_unet
from turbolens_server.loading.hub import model_folder
from turbolens_server.loading.parts import read_parts
from turbolens_server.loading.places import EMBEDDED, is_random


def load_pipeline(
    model: str, device: torch.device, dtype: torch.dtype, variant: str | None = None
) -> tuple[StableDiffusionXLPipeline, str]:
    """A model as `diffusers` loads it, and the hash of its U-Net's weights; random weights are made on `device`.

    Raises:
        LoadError: with one clear line.
    """
    return read_pipeline(model, folder_of(model, variant), device, dtype, variant)


def folder_of(model: str, variant: str | None) -> Path | None:
    """Where a model is; None for random weights, which are nowhere.

    Raises:
        LoadError: it is nowhere to be found.
    """
    if is_random(model):
        if variant is not None:
            raise LoadError(f"--variant {variant}: {model} has no weight files")
        return None
    return model_folder(model, variant)


def read_pipeline(
    model: str,
    folder: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None,
    unet_hash: str | None = None,
) -> tuple[StableDiffusionXLPipeline, str]:
    """As `load_pipeline`, from where the model is; `unet_hash` where it is known already.

    Raises:
        LoadError: with one clear line.
    """
    if folder is None:
        from turbolens_server.loading.random_sdxl import random_pipeline

        try:
            return random_pipeline(model, device, dtype)
        except ValueError as error:
            raise LoadError(f"--model {error}") from error
    check_folder(folder, variant)
    try:
        with _quiet(model == EMBEDDED):
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                folder, **read_parts(folder, dtype, variant), dtype=dtype, local_files_only=True
            )
    except LoadError as error:
        raise LoadError(f"{model}: {error}") from error
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise LoadError(f"{model}: cannot be loaded as an SDXL pipeline ({first_line(error)})") from error
    return pipeline, unet_hash or hash_unet(folder, variant)


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Load without progress bars: a model of some megabytes is there before one can be read."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries if quiet else ():
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was in zip(libraries, shown, strict=True):
            if quiet and was:
                library.enable_progress_bar()
