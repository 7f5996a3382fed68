"""What a model is known by: hashes of the files that are loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from turbolens_server.files import first_line, hash_file, hash_files
from turbolens_server.loading.errors import LoadError

_STEMS: Final = {"text_encoder": "model", "text_encoder_2": "model", "vae": "diffusion_pytorch_model"}
"""What the weight files of a part are called, beside the U-Net's."""


def hash_unet(folder: Path, variant: str | None = None) -> str:
    """SHA-256 over the U-Net's weight files, in order of name.

    Raises:
        LoadError: there are none.
    """
    return hash_files(_weight_files(folder / "unet", "diffusion_pytorch_model", variant))


def hash_components(folder: Path, variant: str | None = None, vae: Path | None = None) -> str:
    """SHA-256 over all that draws beside the U-Net's weights, as it is loaded: weights, vocabularies, configurations.

    Args:
        folder: of the model.
        variant: of the weight files.
        vae: of the VAE that stands in for the model's own.

    Raises:
        LoadError: weights are missing.
    """
    found = [("unet", folder / "unet" / "config.json")]
    for part in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        replaced = part == "vae" and vae is not None
        at = vae if part == "vae" and vae is not None else folder / part
        settings = [p for p in at.glob("*") if p.suffix in (".json", ".txt", ".model") and ".index." not in p.name]
        if stem := _STEMS.get(part):
            settings += _weight_files(at, stem, None if replaced else variant)
        found += [(part, path) for path in sorted(settings)]
    lines = "".join(f"{part}/{path.name} {hash_file(path)}\n" for part, path in found)
    return hashlib.sha256(lines.encode()).hexdigest()


def _weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The weight files that `diffusers` loads: the variant's where the folder has it, shards where there is an index.

    A pipeline may have a variant of some parts only, so a part without it is loaded as it is.
    """
    names = {path.name for path in folder.glob("*") if path.is_file()}
    if not variant or not any("." in name and name.split(".")[1].startswith(variant) for name in names):
        variant = None
    dot = f".{variant}" if variant else ""
    # The second is how older versions of diffusers named it.
    for index in (f"{stem}.safetensors.index{dot}.json", f"{stem}.safetensors{dot}.index.json"):
        if index in names:
            wanted = sorted(set(_weight_map(folder / index).values()))
            break
    else:
        wanted = [f"{stem}{dot}.safetensors"]
    if missing := [name for name in wanted if name not in names]:
        raise LoadError(f"{folder}: {missing[0]} is missing, and the model is known by the hash of its weights")
    return [folder / name for name in wanted]


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor, of an index of shards."""
    try:
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("no files by tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: no index of shards ({first_line(error)})") from error
    return found
