"""sdxl-unbox (`config.json`, `state_dict.pth`, `mean.pt`) and OpenAI's sparse_autoencoder (`state_dict.pt`).

Both keep the same tensors: `encoder.weight [d_sae, d_in]`, `latent_bias`, `decoder.weight [d_in, d_sae]`, `pre_bias`.
The authors of arXiv 2410.22366 put k into `config.json` and call a run's folder after its block
("unet.down_blocks.2.attentions.1_k10_hidden5120_.../final"); OpenAI's library puts the activation into the state, and
of tied weights `decoder.linear.weight`, which is the encoder's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from turbolens_server.sae.bundle import BundleError, FeatureStats, SaeWeights
from turbolens_server.sae.formats.common import (
    ForeignSae,
    check_settings,
    check_size,
    plain_relu,
    read_json,
    read_pickle,
    take,
    transposed,
    whole_number,
)

STATE_FILES: Final = ("state_dict.pth", "state_dict.pt")
_NAMES: Final = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
_COUNTERS: Final = frozenset({"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"})
_ACTIVATION: Final = frozenset({"activation", "activation_state_dict", "activation.k", "activation.postact_fn"})
_KNOWN: Final = "n_dirs_local d_model k auxk auxk_coef dead_steps_threshold"


def read_sdxl_unbox(folder: Path) -> ForeignSae:
    """Read one published SAE for SDXL Turbo."""
    path, settings = state_file(folder), folder / "config.json"
    config = read_json(settings)
    check_settings(config, settings, known=_KNOWN, only={})
    state, k = _state(path), whole_number(config, "k", settings)
    weights = _weights(state, path)
    for name, value, expected in (
        ("activation", state.get("activation"), "TopK"),
        ("activation.postact_fn", state.get("activation.postact_fn"), "ReLU"),
        ("activation.k", state.get("activation.k"), k),
    ):
        if value not in (None, expected):
            raise BundleError(f"{path}: {name} is {value!r}, expected {expected!r}")
    check_size(config, "n_dirs_local", weights.b_enc.shape[0], settings)
    check_size(config, "d_model", weights.b_dec.shape[0], settings)
    return ForeignSae(
        architecture="topk",
        k=k,
        weights=weights,
        weights_file=path,
        config=config,
        stats=_read_mean(folder / "mean.pt", weights.b_enc.shape[0]),
    )


def read_openai(folder: Path) -> ForeignSae:
    """Read an SAE that OpenAI's library saved.

    Raises:
        BundleError: it is a TopK SAE: their library normalises every token before it, which weights cannot express.
    """
    path = state_file(folder)
    state = _state(path)
    weights = _weights(state, path)
    activation = state.get("activation", "ReLU")
    if activation == "TopK":
        raise BundleError(
            f"{path}: activation TopK is not supported: OpenAI's library normalises each token (mean 0, standard "
            "deviation 1) for it, which no weights can express; one trained without that is --format sdxl-unbox, with "
            "k in a config.json"
        )
    if activation != "ReLU":
        raise BundleError(f"{path}: activation {activation!r} is not supported; supported is ReLU")
    return ForeignSae(
        architecture="jumprelu",
        k=None,
        weights=plain_relu(weights),
        weights_file=path,
        config={"activation": activation},
        folded=("ReLU as JumpReLU with thresholds of 0",),
    )


def _weights(state: dict[str, Any], path: Path) -> SaeWeights:
    beside = _COUNTERS | _ACTIVATION
    if "decoder.linear.weight" not in state:
        return transposed(take(state, _NAMES, path, beside=beside))
    tied = take(state, {**_NAMES, "W_dec": "decoder.linear.weight"}, path, beside=beside)
    if not torch.equal(tied.W_enc, tied.W_dec):
        raise BundleError(f"{path}: decoder.linear.weight differs from encoder.weight, which it is tied to")
    return dataclasses.replace(tied, W_enc=tied.W_enc.T.contiguous())


def state_file(folder: Path) -> Path:
    """The one state file of a folder.

    Raises:
        BundleError: there is none, or there are two.
    """
    found = [folder / name for name in STATE_FILES if (folder / name).is_file()]
    if len(found) != 1:
        raise BundleError(f"{folder}: expected one of {' and '.join(STATE_FILES)}, found {len(found)}")
    return found[0]


def _state(path: Path) -> dict[str, Any]:
    checkpoint = read_pickle(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state, dict):
        raise BundleError(f"{path}: holds a {type(state).__name__}, expected tensors by name")
    return state


def _read_mean(path: Path, d_sae: int) -> FeatureStats | None:
    """Their `mean.pt` is the mean over active positions; they publish no frequency, maximum or update norm."""
    if not path.exists():
        return None
    mean = read_pickle(path)
    if not isinstance(mean, torch.Tensor) or mean.shape != (d_sae,) or not torch.isfinite(mean).all():
        raise BundleError(f"{path}: expected {d_sae} finite means")
    return FeatureStats(
        mean=mean.float().numpy(),
        max=np.zeros(d_sae, np.float32),
        frequency=np.zeros(d_sae, np.float32),
        timesteps=np.zeros(0, np.int64),
        update_rms=np.zeros(0, np.float32),
    )
