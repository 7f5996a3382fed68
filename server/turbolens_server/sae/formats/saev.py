"""saev: one file, `sae.pt`, a line of JSON and then the tensors.

Files of its release 0.1 have the settings in that line, and read x - b_dec; later sources write a schema's number and
read x. Their TopK keeps negative activations, which features here do not have.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Final

import torch

from turbolens_server.sae.bundle import BundleError
from turbolens_server.sae.formats.common import (
    ForeignSae,
    check_settings,
    check_size,
    fold_input_bias,
    plain_relu,
    take,
)

WEIGHTS_FILE: Final = "sae.pt"
_NAMES: Final = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_KNOWN: Final = (
    "d_vit d_model d_sae exp_factor activation seed n_reinit_samples remove_parallel_grads normalize_w_dec "
    "sparsity_coeff ghost_grads l1_coeff use_ghost_grads"
)
_LONGEST_LINE: Final = 1 << 16


def read_saev(folder: Path) -> ForeignSae:
    """Read one SAE."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise BundleError(f"{folder}: {WEIGHTS_FILE} is missing")
    with path.open("rb") as file:
        header, rest = file.readline(_LONGEST_LINE), file.read()
    try:
        told = json.loads(header)
        state = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    except Exception as error:  # json and torch raise many kinds; code in a pickle is not run
        raise BundleError(f"{path}: refused; no line of JSON and tensors (code in it was not run)") from error
    if not isinstance(told, dict) or not isinstance(told.get("cfg", told), dict):
        raise BundleError(f"{path}: begins with a {type(told).__name__}, expected settings")
    config: dict[str, Any] = told.get("cfg", told)
    check_settings(config, path, known=_KNOWN, only={})
    activation = config.get("activation") or {}
    kind = told["cls"] if told.get("cls") in ("TopK", "BatchTopK") else activation.get("cls", "Relu")
    if kind != "Relu":
        raise BundleError(f"{path}: activation {kind!r} is not supported: it lets activations be negative")
    weights = plain_relu(take(state, _NAMES, path))
    check_size(config, "d_vit", weights.b_dec.shape[0], path)
    folded: tuple[str, ...] = ("ReLU as JumpReLU with thresholds of 0",)
    if "schema" in told:
        weights, folded = fold_input_bias(weights), (*folded, "the encoder's input bias")
    return ForeignSae(architecture="jumprelu", k=None, weights=weights, weights_file=path, config=config, folded=folded)
