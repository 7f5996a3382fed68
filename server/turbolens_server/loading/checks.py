"""What a model folder is, told by its configurations before anything is loaded: what is not served is named."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from turbolens_server.files import read_object
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.weights import STEMS

_BY_CHANNELS: Final = {
    8: "edits a picture that it is given (8 channels)",
    9: "fills masked parts of a picture that it is given (inpainting, 9 channels)",
}


def check_folder(folder: Path, variant: str | None) -> None:
    """Raise LoadError where a `diffusers` folder is no SDXL-type model from noise, or its weights are not to be had."""
    index = read_object(folder / "model_index.json", LoadError)
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise LoadError(f"{folder / 'model_index.json'}: does not say what pipeline it is of (_class_name)")
    if not kind.startswith("StableDiffusionXL"):
        raise LoadError(f"{folder}: is a {kind}, and SDXL-type models are served")
    if (index.get("text_encoder") or [None])[-1] is None:
        raise LoadError(f"{folder}: is an SDXL refiner, without a first text encoder: it only finishes other pictures")
    unet, vae = (
        read_object(folder / "unet" / "config.json", LoadError),
        read_object(folder / "vae" / "config.json", LoadError),
    )
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latent:
        what = _BY_CHANNELS.get(channels, f"takes {channels} channels, and latents have {latent}")
        raise LoadError(f"{folder}: its U-Net {what}; models that draw from noise are served")
    for part, stem in STEMS.items():
        _check_weights(folder / part, stem, variant)


def is_foreign(what: str, it: str, trained_on: str | None, model_hash: str, *, fused: bool, force: str | None) -> bool:
    """Whether what was trained on one model is served on another.

    Args:
        what: it is, for messages.
        it: a word for it, "it" or "them".
        trained_on: hash of the U-Net; None: it does not say, and is taken.
        model_hash: of the U-Net that serves.
        fused: that one is not the one of its folder.
        force: the flag that asks for it all the same, to be named; None: that was asked for.

    Raises:
        LoadError: it is, and was not asked for.
    """
    foreign = trained_on is not None and trained_on != model_hash
    if foreign and force is not None:
        this = "this one, with --lora," if fused else "this one"
        raise LoadError(
            f"{what}: trained on the model with hash {str(trained_on)[:12]}, but {this} has {model_hash[:12]}; "
            f"pass {force} to serve {it} all the same (every result will say so)"
        )
    return foreign


def _check_weights(folder: Path, stem: str, variant: str | None) -> None:
    names = sorted(path.name for path in folder.glob(f"{stem}*"))
    variants = sorted(
        {name.removeprefix(f"{stem}.").split(".")[0] for name in names if name.count(".") == 2} - {"safetensors"}
    )
    if any(name.endswith(".safetensors") for name in names):
        plain = [name for name in names if name.startswith((f"{stem}.safetensors", f"{stem}-0"))]
        if variant is None and variants and not plain:
            raise LoadError(f"{folder}: has the weights of variant {variants[0]} alone; add --variant {variants[0]}")
    elif any(name.endswith(".bin") for name in names):
        load = f"DiffusionPipeline.from_pretrained('{folder.parent}', use_safetensors=False)"
        raise LoadError(
            f"{folder}: has .bin weights alone, which can hold code and are not read; where you trust them, convert "
            f"them: python -c \"from diffusers import *; {load}.save_pretrained('converted')\""
        )
