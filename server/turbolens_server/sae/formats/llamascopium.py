"""llamascopium, before called lm-saes: `config.json` and `sae_weights.safetensors`.

Inputs are not centred. Where the norm of the data set's activations is in the file, inputs are multiplied by
sqrt(d_model) / norm before they are encoded; features are told in the units of these inputs, as its own `encode` does.
A selection that is made among activations times their decoder row's norm is ours among features in that unit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from turbolens_server.sae.bundle import BundleError, SaeWeights
from turbolens_server.sae.formats.common import (
    ForeignSae,
    check_settings,
    check_size,
    fold_decoder_norm,
    fold_input_bias,
    plain_relu,
    read_json,
    read_safetensors,
    scalar,
    scale_input,
    take,
    vectors,
    whole_number,
)
from turbolens_server.sae.formats.saelens import WEIGHTS_FILE

_NAMES: Final = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
_KNOWN: Final = (
    "d_model expansion_factor use_decoder_bias act_fn norm_activation sparsity_include_decoder_norm top_k "
    "use_triton_kernel sparsity_threshold_for_triton_spmm_kernel jumprelu_threshold_window hook_point_in hook_point_out"
)
_ONLY: Final = {
    "sae_type": ("sae", "it is no SAE of one hook point"),
    "use_glu_encoder": (False, "a second encoder gates the first"),
}
_SUPPORTED: Final = ("relu", "jumprelu", "topk")
_THRESHOLD: Final = "activation_function.log_jumprelu_threshold"
_NORM: Final = "dataset_average_activation_norm."


def is_llamascopium(folder: Path) -> bool:
    """Whether a folder is one of theirs, which have SAELens' name of the weights file and another's of settings."""
    return (folder / "config.json").is_file() and not (folder / "cfg.json").is_file()


def read_llamascopium(folder: Path) -> ForeignSae:
    """Read one SAE."""
    settings, path = folder / "config.json", folder / WEIGHTS_FILE
    config = read_json(settings)
    check_settings(config, settings, known=_KNOWN, only=_ONLY)
    point, kind = config.get("hook_point_in"), config.get("act_fn", "relu")
    if config.get("hook_point_out", point) != point:
        raise BundleError(f"{settings}: hook_point_out is not hook_point_in: it predicts another module's output")
    if kind not in _SUPPORTED:
        raise BundleError(f"{settings}: act_fn={kind!r} is not supported; supported are {', '.join(_SUPPORTED)}")
    state = read_safetensors(path)
    norms = {name for name in state if name.startswith(_NORM)}
    raw = _weights(state, config, path, beside=norms | {_THRESHOLD})
    d_in, d_sae = raw.W_enc.shape
    check_size(config, "d_model", d_in, settings)
    rescaled = config.get("sparsity_include_decoder_norm", True)
    folded = ["the encoder's input bias"]
    if kind == "jumprelu":
        threshold = vectors(state, (_THRESHOLD,), d_sae, path)[0].exp()
        raw = dataclasses.replace(raw, threshold=threshold / raw.W_dec.norm(dim=1) if rescaled else threshold)
    if kind == "topk" and rescaled:
        raw = fold_decoder_norm(raw, path)
        folded.append("activations times their decoder row's norm")
    if (factor := _input_factor(config, state, str(point), settings, path)) != 1:
        raw = scale_input(raw, factor)
        folded.append(f"inputs times {factor:.6g}")
    if kind == "relu":
        raw = plain_relu(raw)
        folded.append("ReLU as JumpReLU with thresholds of 0")
    return ForeignSae(
        architecture="topk" if kind == "topk" else "jumprelu",
        k=whole_number(config, "top_k", settings) if kind == "topk" else None,
        weights=fold_input_bias(raw),
        weights_file=path,
        config=config,
        named=(point,) if isinstance(point, str) else (),
        folded=tuple(folded),
    )


def _weights(state: dict[str, Tensor], config: Mapping[str, Any], path: Path, beside: set[str]) -> SaeWeights:
    if not config.get("use_decoder_bias", True) and "W_D" in state:
        state = {**state, "b_D": torch.zeros(state["W_D"].shape[-1])}
    return take(state, _NAMES, path, beside=frozenset(beside))


def _input_factor(config: Mapping[str, Any], state: Mapping[str, Any], point: str, settings: Path, path: Path) -> float:
    """What inputs are multiplied by before they are encoded."""
    kind = config.get("norm_activation", "dataset-wise")
    if kind == "inference":  # folded in when it was saved
        return 1.0
    if kind != "dataset-wise":
        raise BundleError(
            f"{settings}: norm_activation={kind!r} is not supported: inputs are scaled by their own norms, which no "
            "weights express"
        )
    norm = scalar(state, _NORM + point, path)
    if not 0 < norm < math.inf:
        raise BundleError(f"{path}: {_NORM}{point} is {norm}, expected a number above 0")
    return math.sqrt(config.get("d_model", 0)) / norm
