"""The VAE: the model's own or another, made to stay finite in the precision it is served in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from turbolens_server.files import first_line
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.half_vae import UnknownDecoder, scale_stream
from turbolens_server.loading.parts import read_part
from turbolens_server.loading.weights import STEMS, find_weights


def load_vae(at: Path | None, own: Any, dtype: torch.dtype) -> Any:
    """The VAE, made to stay finite: models say by `force_upcast` that half precision is not enough for it as it is."""
    if at is None:
        return _fit(own, dtype)
    if at.is_file():
        from turbolens_server.loading.single_file import read_single_vae

        try:
            return _fit(read_single_vae(at, own, dtype), dtype)
        except LoadError as error:
            raise LoadError(f"--vae {error}") from error
    folder = at
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
        loader = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[kind]
        vae = read_part(folder, loader, find_weights(folder, STEMS["vae"], None), dtype)
    except LoadError as error:
        raise LoadError(f"--vae {folder}: {error}") from error
    except Exception as error:
        raise LoadError(
            f"--vae {folder}: not an AutoencoderKL or AutoencoderTiny folder ({first_line(error)})"
        ) from error
    for what, mine, theirs in (
        ("latent channels", vae.config.latent_channels, own.config.latent_channels),
        ("times the latent's size", _upscale(vae), _upscale(own)),
    ):
        if mine != theirs:
            raise LoadError(f"--vae {folder}: {mine} {what}; this model needs {theirs}")
    return _fit(vae, dtype)


def _fit(vae: Any, dtype: torch.dtype) -> Any:
    """A VAE that says that it overflows half precision: with its stream scaled, or in float32 if that is not known."""
    if dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        return vae
    try:
        scale_stream(vae.decoder)
    except UnknownDecoder:
        return vae.float()
    return vae


def _upscale(vae: Any) -> int:
    """Picture pixels for each pixel of a latent, each way."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))
