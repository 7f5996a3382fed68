"""Read the folders that the authors of arXiv 2410.22366 publish: `config.json`, `state_dict.pth`, `mean.pt`.

A run's folder is named after its block ("unet.down_blocks.2.attentions.1_k10_hidden5120_...") and holds the files in
`final/`. The pickles are read as tensors only (`weights_only=True`): code in them is never run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turbolens_server.sae.bundle import Bundle, BundleError, FeatureStats, SaeWeights, check_weights, hash_file

_MODULE = re.compile(
    r"(?:unet\.)?((?:down_blocks|up_blocks)\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+)"
    r"(?:\.transformer_blocks\.(\d+)\.(attn[12]))?"
)


def is_reference_folder(folder: Path) -> bool:
    """Whether a folder looks like one of theirs."""
    return (folder / "config.json").exists() and (folder / "state_dict.pth").exists()


def module_to_hook_point(module: str) -> str:
    """ "down_blocks.2.attentions.1" -> "down.2.1", and with ".transformer_blocks.0.attn1" -> "down.2.1.attn1.0".

    Other text is returned as it is.
    """
    found = _MODULE.search(module)
    if found is None:
        return module
    block = found[1].replace("_blocks", "").replace("_block", "").replace(".attentions", "")
    return f"{block}.{found[3]}.{found[2]}" if found[3] else block


def load_reference_folder(folder: Path, hook_point: str | None = None) -> Bundle:
    """Read one published SAE.

    Args:
        folder: holds `config.json` and `state_dict.pth`, and `mean.pt` where strengths in means are wanted.
        hook_point: where it sits; None: read off the folder's name or its parents'.

    Raises:
        BundleError: a file is missing or malformed, or the block is not known.
    """
    if hook_point is None:
        found = next((m for part in reversed(folder.resolve().parts) if (m := _MODULE.search(part))), None)
        if found is None:
            raise BundleError(f"{folder}: its name does not say which block it is for; give it as BLOCK={folder}")
        hook_point = module_to_hook_point(found[0])
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}/config.json: unreadable ({error})") from error
    checkpoint = _read_pickle(folder / "state_dict.pth")
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    keys = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
    missing = [
        key for key in keys.values() if not (isinstance(state, dict) and isinstance(state.get(key), torch.Tensor))
    ]
    if missing or state is None:
        raise BundleError(f"{folder}/state_dict.pth: lacks {', '.join(missing)}")
    tensors = {ours: state[theirs].float() for ours, theirs in keys.items()}
    weights = SaeWeights(
        W_enc=tensors["W_enc"].T.contiguous(),
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"].T.contiguous(),
        b_dec=tensors["b_dec"],
    )
    check_weights(weights, str(folder))
    k = config.get("k")
    if not (isinstance(k, int) and 0 < k <= weights.W_enc.shape[1]):
        raise BundleError(f"{folder}/config.json: k={k!r}, expected 1 to {weights.W_enc.shape[1]}")
    return Bundle(
        name=hook_point,
        hook_point=hook_point,
        architecture="topk",
        k=k,
        weights=weights,
        stats=_read_mean(folder / "mean.pt", weights.W_enc.shape[1]),
        hash=hash_file(folder / "state_dict.pth"),
        model_hash=None,
        provenance={"format": "sdxl-unbox", "config": config},
        folder=folder,
    )


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BundleError(f"{path.parent}: {path.name} is missing") from error
    except Exception as error:  # torch raises many kinds; the first line says what was refused
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(f"{path}: refused ({reason})") from error


def _read_mean(path: Path, d_sae: int) -> FeatureStats | None:
    """Their `mean.pt` is the mean over active positions; they publish no frequency, maximum or update norm."""
    if not path.exists():
        return None
    mean = _read_pickle(path)
    if not isinstance(mean, torch.Tensor) or mean.shape != (d_sae,) or not torch.isfinite(mean).all():
        raise BundleError(f"{path}: expected {d_sae} finite means")
    unknown = np.zeros(d_sae, np.float32)
    return FeatureStats(
        mean=mean.float().numpy(),
        max=unknown,
        frequency=unknown,
        timesteps=np.zeros(0, np.int64),
        update_rms=np.zeros(0, np.float32),
    )
