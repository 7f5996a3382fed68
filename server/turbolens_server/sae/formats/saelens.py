"""SAELens: `cfg.json` and `sae_weights.safetensors`, as its inference SAEs are saved; before and since its version 6.

Standard, TopK and JumpReLU SAEs are read (its BatchTopK and Matryoshka SAEs are saved as JumpReLU). What scales each
input by its own norm is refused by name: no weights can express it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

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
    architecture = config.get("architecture", "standard")
    if architecture not in ("standard", "topk", "jumprelu"):
        raise BundleError(
            f"{settings}: architecture {architecture!r} is not supported; supported are standard, topk and jumprelu"
        )
    normalization = config.get("normalize_activations") or "none"
    if normalization != "none":
        reason = _NORMALIZATIONS.get(str(normalization), "it is not known here")
        raise BundleError(f"{settings}: normalize_activations={normalization!r} is not supported: {reason}")
    if (reshape := config.get("reshape_activations", "none")) != "none":
        raise BundleError(f"{settings}: reshape_activations={reshape!r} is not supported: updates have no heads")
    refuse(config, {"finetuning_scaling_factor": "its factors are not part of this format any more"}, settings)
    k = _k(config, settings) if architecture == "topk" else None
    names = {**_NAMES, "threshold": "threshold"} if architecture == "jumprelu" else _NAMES
    weights, folded = take(read_safetensors(path), names, path), []
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


def _k(config: Mapping[str, Any], settings: Path) -> int:
    """k, which folders from before version 6 keep among the activation function's arguments."""
    arguments = config.get("activation_fn_kwargs")
    return whole_number(arguments if "k" not in config and isinstance(arguments, dict) else config, "k", settings)
