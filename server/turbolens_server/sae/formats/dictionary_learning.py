"""dictionary_learning: `ae.pt` and the `config.json` of its trainer, which says what kind of dictionary it is.

Its TopK and BatchTopK dictionaries hold the same tensors, so the configuration is needed to tell them apart. BatchTopK
ones encode with a threshold when they serve, as JumpReLU with one threshold for all; so do we. What is computed is what
its `load_dictionary` gives in version 0.1: a plain dictionary's decoder rows are normalised on loading, and a
JumpReLU's activations are no longer multiplied by their row's norm, as they were before 2025.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from turbolens_server.sae.bundle import BundleError, SaeWeights
from turbolens_server.sae.formats.common import (
    ForeignSae,
    check_settings,
    check_size,
    fold_decoder_norm,
    fold_input_bias,
    gated_as_jump_relu,
    plain_relu,
    read_json,
    read_pickle,
    scalar,
    take,
    transposed,
    vectors,
    whole_number,
)

WEIGHTS_FILE: Final = "ae.pt"
_LINEAR: Final = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
_OURS: Final = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED: Final = {
    "W_enc": "encoder.weight",
    "b_enc": "mag_bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder_bias",
}
_TRAINING: Final = (
    "dict_class trainer_class activation_dim dict_size k layer lm_name submodule_name wandb_name device seed lr steps "
    "warmup_steps decay_start resample_steps sparsity_warmup_steps l1_penalty auxk_alpha top_k_aux threshold_beta "
    "threshold_start_step bandwidth sparsity_penalty target_l0 group_fractions group_weights group_sizes "
    "sparsity_function sparsity_queue_length anneal_start p_start p_end n_sparsity_updates"
)
"""What trainers write, read here or of training alone: `dict_class` decides what is computed."""
_BUFFERS: Final = frozenset({"k", "threshold"})


def read_dictionary_learning(folder: Path) -> ForeignSae:
    """Read one trainer's dictionary."""
    path, settings = folder / WEIGHTS_FILE, folder / "config.json"
    config = read_json(settings)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise BundleError(f"{settings}: has no object called trainer, which says what kind of dictionary this is")
    check_settings(trainer, settings, known=_TRAINING, only={})
    kind, state = trainer.get("dict_class"), read_pickle(path)
    k: int | None = None
    folded: tuple[str, ...] = ()
    match kind:
        case "AutoEncoderTopK":
            weights = transposed(take(state, _LINEAR, path, beside=_BUFFERS))
            k = _k(state, trainer, path, settings)
        case "BatchTopKSAE":
            weights = _with_threshold(transposed(take(state, _LINEAR, path, beside=_BUFFERS)), state, path)
            folded = ("one threshold as a threshold for each feature",)
        case "MatryoshkaBatchTopKSAE":
            weights = _with_threshold(take(state, _OURS, path, beside=_BUFFERS | {"group_sizes"}), state, path)
            folded = ("one threshold as a threshold for each feature",)
        case "JumpReluAutoEncoder":
            weights = fold_input_bias(take(state, {**_OURS, "threshold": "threshold"}, path))
            folded = ("the encoder's input bias",)
        case "GatedAutoEncoder":
            raw = transposed(take(state, _GATED, path, beside=frozenset({"gate_bias", "r_mag"})))
            weights = gated_as_jump_relu(raw, *vectors(state, ("gate_bias", "r_mag"), len(raw.b_enc), path))
            folded = ("the gate as a threshold for each feature",)
        case "AutoEncoder":
            raw = plain_relu(transposed(take(state, {**_LINEAR, "b_dec": "bias"}, path)))
            weights = fold_decoder_norm(raw, path)
            folded = ("ReLU as JumpReLU with thresholds of 0", "activations times their decoder row's norm")
        case _:
            raise BundleError(
                f"{settings}: dict_class {kind!r} is not supported; supported are AutoEncoder, AutoEncoderTopK, "
                "BatchTopKSAE, MatryoshkaBatchTopKSAE, JumpReluAutoEncoder and GatedAutoEncoder"
            )
    check_size(trainer, "activation_dim", weights.b_dec.shape[0], settings)
    check_size(trainer, "dict_size", weights.b_enc.shape[0], settings)
    return ForeignSae(
        architecture="topk" if k else "jumprelu",
        k=k,
        weights=weights,
        weights_file=path,
        config=config,
        named=tuple(text for key in ("submodule_name", "layer") if isinstance(text := trainer.get(key), str)),
        model_name=name if isinstance(name := trainer.get("lm_name"), str) else None,
        folded=folded,
    )


def _k(state: Mapping[str, Any], trainer: Mapping[str, Any], path: Path, settings: Path) -> int:
    """k of the buffer that is saved with the weights, or of the configuration where older folders have no buffer."""
    if "k" not in state:
        return whole_number(trainer, "k", settings)
    k = int(scalar(state, "k", path))
    if trainer.get("k", k) != k:
        raise BundleError(f"{settings}: k={trainer['k']!r}, but {path.name} has {k}")
    return k


def _with_threshold(weights: SaeWeights, state: Mapping[str, Any], path: Path) -> SaeWeights:
    threshold = scalar(state, "threshold", path)
    if not threshold >= 0:  # not-a-number too
        raise BundleError(
            f"{path}: threshold is {threshold}; training never set it (it does from threshold_start_step on), so what "
            "this SAE encodes for one position is not known"
        )
    return dataclasses.replace(weights, threshold=torch.full_like(weights.b_enc, threshold))
