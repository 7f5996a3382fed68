"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, a folder for each hook point, named after its module.

TopK over ReLU of W_enc (x - b_dec) + b_enc, which is our TopK: a value that ReLU clears is 0 either way. SAeUron and
latentsae grew out of it and kept the names of its files and tensors, with settings that change what these mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from turbolens_server.sae.bundle import BundleError, Nesting
from turbolens_server.sae.formats.common import (
    ForeignSae,
    check_settings,
    check_size,
    read_json,
    read_safetensors,
    take,
    vectors,
    whole_number,
)

WEIGHTS_FILE: Final = "sae.safetensors"
_NAMES: Final = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_KNOWN: Final = "d_in num_latents expansion_factor k normalize_decoder multi_topk"
_SKIP: Final = "the linear skip bypasses the features"
_BATCH: Final = "features of a position are chosen by what else is in its batch"
_ONLY: Final[Mapping[str, tuple[Any, str]]] = {
    "activation": ("topk", "features are chosen in groups"),
    "transcode": (False, "it predicts another module's output, so its features do not add up to the update"),
    "skip_connection": (False, _SKIP),
    "embed_skip": (False, "the skip from the embedding bypasses the features"),
    "gram_lookup": (False, "it encodes what an n-gram table leaves over, and the table is not in the folder"),
    "signed": (False, "it selects by magnitude and lets activations be negative"),
    # SAeUron
    "input_unit_norm": (False, "it scales each input by that input's own mean and deviation, which no weights express"),
    "batch_topk": (False, _BATCH),
    "sample_topk": (False, "k features are chosen for a whole picture, and encoding takes one position"),
}
_LATENT_KNOWN: Final = (
    "sae_type mean_center matryoshka_sizes matryoshka_ks matryoshka_loss_weights matryoshka_use_batchtopk skip_rank "
    "jumprelu_init_threshold jumprelu_bandwidth jumprelu_max_active sparsity_penalty k_anneal k_anneal_start "
    "k_anneal_pct lista_eta lista_steps decorr_alpha max_fire_rate fire_rate_penalty batchtopk_threshold "
    "batchtopk_threshold_beta cosine_alpha_init cosine_per_feature decoder_init_norm"
)
"""What latentsae adds: read here, of training alone, or of a `sae_type` that is refused."""
_LATENT_TYPES: Final = {
    "gated": "its gate is of other weights than its magnitudes",
    "jumprelu": "it also keeps at most jumprelu_max_active features",
    "lista": "features inhibit each other, by their decoder rows, before the selection",
    "batchtopk": "it keeps what passes a threshold and then at most k",
    "cosine": "it scores by the angle to the input, which no weights express",
    "abstopk": "it selects by magnitude and lets activations be negative",
}


def read_sparsify(folder: Path) -> ForeignSae:
    """Read one hook point's sparse coder."""
    settings, path = folder / "cfg.json", folder / WEIGHTS_FILE
    config = read_json(settings)
    latent = "sae_type" in config
    check_settings(
        config,
        settings,
        known=f"{_KNOWN} {_LATENT_KNOWN if latent else ''}",
        only={"use_skip": (False, _SKIP)} if latent else _ONLY,
    )
    k, nesting = whole_number(config, "k", settings), None
    beside: frozenset[str] = frozenset()
    if latent:
        k, nesting = _latent_type(config, settings, k)
        beside = frozenset({"input_mean", "batchtopk_threshold"})
    state = read_safetensors(path)
    raw = take(state, _NAMES, path, beside=beside)
    folded: tuple[str, ...] = ()
    d_sae, d_in = raw.W_enc.shape
    if latent and config.get("mean_center"):
        # x - mean is read, and the mean added to what is decoded: both are the decoder's bias.
        (mean,) = vectors(state, ("input_mean",), d_in, path)
        raw, folded = dataclasses.replace(raw, b_dec=raw.b_dec + mean), ("the mean that inputs are centred by",)
    check_size(config, "d_in", d_in, settings)
    if config.get("num_latents"):  # 0 stands for expansion_factor * d_in
        check_size(config, "num_latents", d_sae, settings)
    else:
        expected = whole_number(config, "expansion_factor", settings) * d_in
        if expected != d_sae:
            raise BundleError(f"{settings}: expansion_factor * d_in is {expected}, but the weights have {d_sae}")
    if nesting is not None and nesting.prefixes[-1] != d_sae:
        raise BundleError(
            f"{settings}: matryoshka_sizes ends with {nesting.prefixes[-1]}, but the weights have {d_sae}"
        )
    return ForeignSae(
        architecture="topk",
        k=k,
        weights=dataclasses.replace(raw, W_enc=raw.W_enc.T.contiguous()),
        weights_file=path,
        config=config,
        folded=folded,
        nesting=nesting,
    )


def _latent_type(config: Mapping[str, Any], settings: Path, k: int) -> tuple[int, Nesting | None]:
    """k and the nested sizes of a latentsae; a Matryoshka encodes with the last of its several k."""
    kind = str(config["sae_type"]).lower()  # saved by the name of an enumeration's member: "TOPK"
    if kind == "topk":
        return k, None
    if kind != "matryoshka":
        reason = _LATENT_TYPES.get(kind, "it is not known here")
        raise BundleError(f"{settings}: sae_type={config['sae_type']!r} is not supported: {reason}")
    sizes, ks = (_whole_numbers(config, key, settings) for key in ("matryoshka_sizes", "matryoshka_ks"))
    if len(sizes) != len(ks) or sizes != sorted({*sizes}) or max(ks) > sizes[-1]:
        raise BundleError(f"{settings}: matryoshka_sizes={sizes} must rise, each with one of matryoshka_ks={ks}")
    return ks[-1], Nesting(k_max=ks[-1], prefixes=tuple(size for size in sizes if size >= ks[-1]))


def _whole_numbers(config: Mapping[str, Any], key: str, settings: Path) -> list[int]:
    try:
        numbers = [int(part) for part in str(config.get(key, "")).split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise BundleError(f"{settings}: {key}={config.get(key)!r}, expected whole numbers from 1 with commas")
    return numbers
