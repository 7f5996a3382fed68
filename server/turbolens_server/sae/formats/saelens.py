"""SAELens: `cfg.json` and `sae_weights.safetensors`, as inference SAEs and checkpoints save them; before and since 6.

Standard, TopK, JumpReLU and gated SAEs are read, and BatchTopK and Matryoshka ones, saved as JumpReLU once they are
trained. What scales each input by its own norm is refused by name: no weights can express it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from turbolens_server.sae.bundle import BundleError, Nesting, SaeWeights
from turbolens_server.sae.formats.common import (
    ForeignSae,
    check_settings,
    check_size,
    fold_decoder_norm,
    fold_input_bias,
    gated_as_jump_relu,
    plain_relu,
    read_json,
    read_safetensors,
    scalar,
    scale_input,
    take,
    vectors,
    whole_number,
)

WEIGHTS_FILE: Final = "sae_weights.safetensors"
_SCALER_FILE: Final = "activation_scaler.json"
_NAMES: Final = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATE: Final = ("b_gate", "r_mag")
_BATCH: Final = ("batchtopk", "matryoshka_batchtopk")
"""Of checkpoints: afterwards they are saved as JumpReLU."""
_ARCHITECTURES: Final = ("standard", "topk", "jumprelu", "gated", *_BATCH)
_NORMALIZATIONS: Final = {
    "expected_average_only_in": f"the folder does not say by what factor; keep {_SCALER_FILE} of the checkpoint in it",
    "constant_norm_rescale": "it scales each input by that input's own norm",
    "layer_norm": "it scales each input by that input's own mean and deviation",
    "covariance_whitening": "its matrices are not read here; SAELens folds them in when training ends",
}
_KNOWN: Final = (
    "architecture d_in d_sae dtype device k metadata apply_b_dec_to_input normalize_activations "
    "rescale_acts_by_decoder_norm sae_lens_version "
    # of training alone
    "decoder_init_norm l1_coefficient l0_coefficient l1_warm_up_steps l0_warm_up_steps lp_norm use_sparse_activations "
    "aux_loss_coefficient topk_threshold_lr matryoshka_widths use_matryoshka_aux_loss jumprelu_init_threshold "
    "jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_tanh_scale jumprelu_ste_to_input target_l0 "
    "pre_act_loss_coefficient"
)
_ONLY: Final = {"reshape_activations": ("none", "updates have no heads")}


def read_saelens(folder: Path) -> ForeignSae:
    """Read one inference SAE, or the SAE of a checkpoint."""
    settings, path = folder / "cfg.json", folder / WEIGHTS_FILE
    config = read_json(settings)
    metadata = config.get("metadata")
    told = metadata if isinstance(metadata, dict) else config  # before version 6 there was no metadata
    old = _before_6(config.get("sae_lens_version") or told.get("sae_lens_version"))
    architecture = _architecture(config, settings, old=old)
    if old:  # all settings of a run, of releases that are past: those that matter are known
        _check_old(config, settings)
    else:
        check_settings(config, settings, known=_KNOWN, only=_ONLY)
    tensors, folded = _unscaled(read_safetensors(path), path), []
    weights = _weights(tensors, architecture, path)
    check_size(config, "d_in", weights.b_dec.shape[0], settings)
    check_size(config, "d_sae", weights.b_enc.shape[0], settings)
    if (factor := _input_factor(config, folder, settings)) != 1:
        weights = scale_input(weights, factor)
        folded.append(f"inputs times {factor:.6g}")
    rescaled = bool(config.get("rescale_acts_by_decoder_norm"))
    if rescaled:
        if architecture not in ("topk", *_BATCH):
            raise BundleError(f"{settings}: rescale_acts_by_decoder_norm has no meaning for {architecture}")
        weights = fold_decoder_norm(weights, path)
        folded.append("activations times their decoder row's norm")
    if architecture in _BATCH:
        # What is compared with it is smaller by the factor where it was multiplied with the scaled rows' norms.
        threshold = scalar(tensors, "topk_threshold", path) / (factor if rescaled else 1)
        weights = dataclasses.replace(weights, threshold=torch.full_like(weights.b_enc, threshold))
        folded.append("one threshold as a threshold for each feature")
    if architecture == "gated":
        weights = gated_as_jump_relu(weights, *vectors(tensors, _GATE, weights.b_enc.shape[0], path))
        folded.append("the gate as a threshold for each feature")
    if not config.get("apply_b_dec_to_input", True):
        weights = fold_input_bias(weights)
        folded.append("the encoder's input bias")
    if architecture == "standard":
        weights = plain_relu(weights)
        folded.append("ReLU as JumpReLU with thresholds of 0")
    return ForeignSae(
        architecture="topk" if architecture == "topk" else "jumprelu",
        k=_k(config, settings) if architecture == "topk" else None,
        weights=weights,
        weights_file=path,
        config=config,
        named=tuple(text for key in ("hook_name", "hook_point") if isinstance(text := told.get(key), str)),
        model_name=name if isinstance(name := told.get("model_name"), str) else None,
        folded=tuple(folded),
        nesting=None if architecture == "topk" else _nesting(config, told, weights.b_enc.shape[0], settings),
    )


def _nesting(config: Mapping[str, Any], metadata: Mapping[str, Any], d_sae: int, settings: Path) -> Nesting | None:
    """The widths that a Matryoshka was trained at: settings of a checkpoint, and afterwards kept among the metadata."""
    details = metadata.get("training_architecture_details")
    widths = (details if isinstance(details, dict) else config).get("matryoshka_widths")
    if not widths:
        return None
    whole = isinstance(widths, list) and all(type(width) is int and 0 < width <= d_sae for width in widths)
    if not whole or widths != sorted({*widths}):
        raise BundleError(f"{settings}: matryoshka_widths={widths!r} must be rising sizes up to {d_sae}")
    return Nesting(None, tuple(sorted({*widths, d_sae})))


def _before_6(version: object) -> bool:
    """Whether a folder is from before version 6, when an SAE needed no architecture; one without a version is."""
    major = re.match(r"\d+", version) if isinstance(version, str) else None
    return major is None or int(major[0]) < 6


def _check_old(config: Mapping[str, Any], settings: Path) -> None:
    if config.get("finetuning_scaling_factor"):
        raise BundleError(f"{settings}: finetuning_scaling_factor is not supported: its factors are not in it")
    reshaped = config.get("reshape_activations", "hook_z" if "hook_z" in str(config.get("hook_name")) else "none")
    if reshaped != "none":
        raise BundleError(f"{settings}: reshape_activations={reshaped!r} is not supported: updates have no heads")


def _architecture(config: Mapping[str, Any], settings: Path, *, old: bool) -> str:
    """The architecture. Folders from before version 6 may have a TopK as the activation of a "standard"."""
    architecture = config.get("architecture") or ("standard" if old else None)
    if architecture is None:
        raise BundleError(f"{settings}: architecture is missing, and SAELens assumes none since its version 6")
    if architecture not in _ARCHITECTURES:
        raise BundleError(
            f"{settings}: architecture {architecture!r} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    key = "activation_fn" if "activation_fn" in config else "activation_fn_str"
    activation = config.get(key) or "relu"
    if activation not in ("relu", "topk") or (activation == "topk" and architecture not in ("standard", "topk")):
        raise BundleError(f"{settings}: {key}={activation!r} of a {architecture} SAE is not supported")
    return "topk" if activation == "topk" else str(architecture)


def _weights(tensors: dict[str, Tensor], architecture: str, path: Path) -> SaeWeights:
    if architecture in _BATCH:
        return take(tensors, _NAMES, path, beside=frozenset({"topk_threshold"}))
    if architecture == "gated":
        return take(tensors, {**_NAMES, "b_enc": "b_mag"}, path, beside=frozenset({*_GATE, "b_enc"}))
    return take(tensors, {**_NAMES, "threshold": "threshold"} if architecture == "jumprelu" else _NAMES, path)


def _input_factor(config: Mapping[str, Any], folder: Path, settings: Path) -> float:
    """What inputs are multiplied by before they are encoded; a checkpoint keeps it in a file beside."""
    normalization = config.get("normalize_activations") or "none"
    if normalization is True:  # before version 4
        normalization = "expected_average_only_in"
    if normalization == "none":
        return 1.0
    if normalization == "expected_average_only_in" and (folder / _SCALER_FILE).is_file():
        factor = read_json(folder / _SCALER_FILE).get("scaling_factor")
        if isinstance(factor, (int, float)) and 0 < factor < float("inf"):
            return float(factor)
        raise BundleError(f"{folder / _SCALER_FILE}: scaling_factor={factor!r}, expected a number above 0")
    reason = _NORMALIZATIONS.get(str(normalization), "it is not known here")
    raise BundleError(f"{settings}: normalize_activations={normalization!r} is not supported: {reason}")


def _unscaled(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors without factors of 1, which SAELens saved beside them for a time, and drops itself."""
    factor = tensors.get("scaling_factor")
    if factor is None:
        return tensors
    if not bool((factor == 1).all()):
        raise BundleError(f"{path}: scaling_factor is not 1 everywhere; save it folded into the weights")
    return {name: tensor for name, tensor in tensors.items() if name != "scaling_factor"}


def _k(config: Mapping[str, Any], settings: Path) -> int:
    """k, which folders from before version 6 keep among the activation function's arguments."""
    arguments = config.get("activation_fn_kwargs")
    return whole_number(arguments if "k" not in config and isinstance(arguments, dict) else config, "k", settings)
