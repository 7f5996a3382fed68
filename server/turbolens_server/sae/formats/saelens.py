"""SAELens: `cfg.json` and `sae_weights.safetensors`, as its inference SAEs are saved; before and since its version 6.

Standard, TopK and JumpReLU SAEs are read (its BatchTopK and Matryoshka SAEs are saved as JumpReLU). What scales each
input by its own norm is refused by name: no weights can express it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from turbolens_server.sae.bundle import BundleError
from turbolens_server.sae.formats.common import (
    ForeignSae,
    check_size,
    fold_decoder_norm,
    fold_input_bias,
    plain_relu,
    read_json,
    read_safetensors,
    refuse,
    take,
    whole_number,
)

WEIGHTS_FILE: Final = "sae_weights.safetensors"
_NAMES: Final = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_NORMALIZATIONS: Final = {
    "expected_average_only_in": "the folder does not say by what factor; save it with the factor folded in",
    "constant_norm_rescale": "it scales each input by that input's own norm",
    "layer_norm": "it scales each input by that input's own mean and deviation",
}


def read_saelens(folder: Path) -> ForeignSae:
    """Read one inference SAE."""
    settings, path = folder / "cfg.json", folder / WEIGHTS_FILE
    config = read_json(settings)
    architecture = _architecture(config, settings)
    normalization = config.get("normalize_activations") or "none"
    if normalization != "none":
        reason = _NORMALIZATIONS.get(str(normalization), "it is not known here")
        raise BundleError(f"{settings}: normalize_activations={normalization!r} is not supported: {reason}")
    if (reshape := config.get("reshape_activations", "none")) != "none":
        raise BundleError(f"{settings}: reshape_activations={reshape!r} is not supported: updates have no heads")
    refuse(config, {"finetuning_scaling_factor": "its factors are not part of this format any more"}, settings)
    k = _k(config, settings) if architecture == "topk" else None
    names = {**_NAMES, "threshold": "threshold"} if architecture == "jumprelu" else _NAMES
    weights, folded = take(_unscaled(read_safetensors(path), path), names, path), []
    check_size(config, "d_in", weights.b_dec.shape[0], settings)
    check_size(config, "d_sae", weights.b_enc.shape[0], settings)
    if config.get("rescale_acts_by_decoder_norm"):
        if architecture != "topk":
            raise BundleError(f"{settings}: rescale_acts_by_decoder_norm has no meaning for {architecture}")
        weights = fold_decoder_norm(weights, path)
        folded.append("activations times their decoder row's norm")
    if not config.get("apply_b_dec_to_input", True):
        weights = fold_input_bias(weights)
        folded.append("the encoder's input bias")
    if architecture == "standard":
        weights = plain_relu(weights)
        folded.append("ReLU as JumpReLU with thresholds of 0")
    metadata = config.get("metadata")
    told = metadata if isinstance(metadata, dict) else config  # before version 6 there was no metadata
    return ForeignSae(
        architecture="topk" if architecture == "topk" else "jumprelu",
        k=k,
        weights=weights,
        weights_file=path,
        config=config,
        named=tuple(text for key in ("hook_name", "hook_point") if isinstance(text := told.get(key), str)),
        model_name=name if isinstance(name := told.get("model_name"), str) else None,
        folded=tuple(folded),
    )


def _architecture(config: Mapping[str, Any], settings: Path) -> str:
    """Standard, TopK or JumpReLU. Folders from before version 6 may have a TopK as the activation of a "standard"."""
    architecture = config.get("architecture") or "standard"
    if architecture not in ("standard", "topk", "jumprelu"):
        raise BundleError(
            f"{settings}: architecture {architecture!r} is not supported; supported are standard, topk and jumprelu"
        )
    key = "activation_fn" if "activation_fn" in config else "activation_fn_str"
    activation = config.get(key) or "relu"
    if activation not in ("relu", "topk") or (activation, architecture) == ("topk", "jumprelu"):
        raise BundleError(f"{settings}: {key}={activation!r} of a {architecture} SAE is not supported")
    return "topk" if activation == "topk" else architecture


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
