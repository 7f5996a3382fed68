"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, a folder for each hook point, named after its module.

TopK over ReLU of W_enc (x - b_dec) + b_enc, which is our TopK: a value that ReLU clears is 0 either way.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from turbolens_server.sae.bundle import BundleError
from turbolens_server.sae.formats.common import (
    ForeignSae,
    check_size,
    read_json,
    read_safetensors,
    refuse,
    take,
    whole_number,
)

WEIGHTS_FILE: Final = "sae.safetensors"
_NAMES: Final = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_REFUSED: Final = {
    "transcode": "a transcoder predicts another module's output, so its features do not add up to the update",
    "skip_connection": "the linear skip bypasses the features",
    "embed_skip": "the skip from the embedding bypasses the features",
    "gram_lookup": "it encodes what an n-gram table leaves over, and the table is not in the folder",
    "signed": "it selects by magnitude and lets activations be negative",
}


def read_sparsify(folder: Path) -> ForeignSae:
    """Read one hook point's sparse coder."""
    settings, path = folder / "cfg.json", folder / WEIGHTS_FILE
    config = read_json(settings)
    refuse(config, _REFUSED, settings)
    if (activation := config.get("activation", "topk")) != "topk":
        raise BundleError(f"{settings}: activation {activation!r} is not supported; supported is topk")
    raw = take(read_safetensors(path), _NAMES, path)
    d_sae, d_in = raw.W_enc.shape
    check_size(config, "d_in", d_in, settings)
    if config.get("num_latents"):  # 0 stands for expansion_factor * d_in
        check_size(config, "num_latents", d_sae, settings)
    else:
        expected = whole_number(config, "expansion_factor", settings) * d_in
        if expected != d_sae:
            raise BundleError(f"{settings}: expansion_factor * d_in is {expected}, but the weights have {d_sae}")
    return ForeignSae(
        architecture="topk",
        k=whole_number(config, "k", settings),
        weights=dataclasses.replace(raw, W_enc=raw.W_enc.T.contiguous()),
        weights_file=path,
        config=config,
    )
