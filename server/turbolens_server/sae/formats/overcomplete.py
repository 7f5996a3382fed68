"""Overcomplete: a module's state, `state_dict.pt` or `.pth`, and a `config.json` that says what the state does not.

The library saves no configuration, so the folder's owner writes one: {"class": "TopKSAE", "top_k": 10}, and
"normalization" where it is not the default "l2". Inputs are not centred, thresholds are kept as logarithms, and the
dictionary's rows are normalised when they are used, so what is saved is not yet what decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from turbolens_server.sae.bundle import BundleError, SaeWeights
from turbolens_server.sae.formats.common import (
    ForeignSae,
    check_settings,
    plain_relu,
    read_json,
    read_pickle,
    scalar,
    vectors,
    whole_number,
)

CONFIG_KEY: Final = "class"
"""Of the configuration: by it the folder is told from others with a state of the same name."""
_ENCODERS: Final = ("encoder.final_block.0", "encoder")
"""Of a linear encoder, and of one that was tied to the dictionary and is so no more."""
_DICTIONARY: Final = "dictionary._weights"
_NORMALIZED: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "l2": lambda rows: rows / (rows.norm(dim=1, keepdim=True) + 1e-8),
    "max_l2": lambda rows: rows / rows.norm(dim=1).max(),
    "identity": lambda rows: rows,
}


def read_overcomplete(folder: Path, path: Path) -> ForeignSae:
    """Read one SAE from its state file and the configuration beside it."""
    settings = folder / "config.json"
    config = read_json(settings)
    check_settings(config, settings, known=f"{CONFIG_KEY} top_k normalization", only={})
    kind, normalization = config[CONFIG_KEY], config.get("normalization", "l2")
    if kind not in ("SAE", "TopKSAE", "JumpSAE"):
        raise BundleError(f"{settings}: class {kind!r} is not supported; supported are SAE, TopKSAE and JumpSAE")
    if normalization not in _NORMALIZED:
        raise BundleError(f"{settings}: normalization={normalization!r}, expected {', '.join(_NORMALIZED)}")
    state = read_pickle(path)
    if not isinstance(state, dict):
        raise BundleError(f"{path}: holds a {type(state).__name__}, expected tensors by name")
    rows = _matrix(state, _DICTIONARY, path)  # [d_sae, d_in]
    d_sae, d_in = rows.shape
    W_dec = _NORMALIZED[normalization](rows) * torch.tensor(scalar(state, "dictionary.multiplier", path)).exp()
    encoder = next((name for name in _ENCODERS if f"{name}.weight" in state), None)
    W_enc = W_dec if encoder is None else _matrix(state, f"{encoder}.weight", path)
    if W_enc.shape != rows.shape:
        raise BundleError(f"{path}: {encoder}.weight has shape {tuple(W_enc.shape)}, expected {tuple(rows.shape)}")
    bias = f"{encoder or 'encoder'}.bias"
    read = {_DICTIONARY, "dictionary.multiplier", f"{encoder}.weight", bias}
    if encoder is None:
        read |= {"encoder.tied_to._weights", "encoder.tied_to.multiplier"}
    if kind == "JumpSAE":
        read |= {"thresholds"}
    if unknown := sorted(str(name) for name in state.keys() - read):
        raise BundleError(f"{path}: holds {', '.join(unknown[:5])}, which a linear {kind} does not have")
    weights = SaeWeights(
        W_enc=W_enc.T.contiguous(),
        b_enc=vectors(state, (bias,), d_sae, path)[0] if bias in state else torch.zeros(d_sae),
        W_dec=W_dec,
        b_dec=torch.zeros(d_in),
        threshold=vectors(state, ("thresholds",), d_sae, path)[0].exp() if kind == "JumpSAE" else None,
    )
    return ForeignSae(
        architecture="topk" if kind == "TopKSAE" else "jumprelu",
        k=whole_number(config, "top_k", settings) if kind == "TopKSAE" else None,
        weights=plain_relu(weights) if kind == "SAE" else weights,
        weights_file=path,
        config=config,
        folded=("ReLU as JumpReLU with thresholds of 0",) if kind == "SAE" else (),
    )


def _matrix(state: Mapping[str, Any], name: str, path: Path) -> Tensor:
    value = state.get(name)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 2 or 0 in value.shape:
        raise BundleError(f"{path}: {name} is missing or no matrix of floats")
    return value.float()
