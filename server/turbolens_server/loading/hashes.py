"""What a model is known by: hashes of the files that are loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from turbolens_server.files import hash_file, hash_files
from turbolens_server.loading.weights import STEMS, find_weights


def hash_unet(folder: Path, variant: str | None = None) -> str:
    """SHA-256 over the U-Net's weight files, in order of name.

    Raises:
        LoadError: there are none.
    """
    return hash_files(find_weights(folder / "unet", STEMS["unet"], variant).files)


def hash_components(
    folder: Path, variant: str | None = None, vae: Path | None = None, checkpoint: Path | None = None
) -> str:
    """SHA-256 over all that draws beside the U-Net's weights, as it is loaded: weights, vocabularies, configurations.

    Args:
        folder: of the model.
        variant: of the weight files.
        vae: of the VAE that stands in for the model's own, a folder or a file.
        checkpoint: the file with all weights, where the folder gives configurations and vocabularies alone.

    Raises:
        LoadError: weights are missing.
    """
    found = [("unet", folder / "unet" / "config.json"), *([("checkpoint", checkpoint)] if checkpoint else [])]
    for part in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        replaced = part == "vae" and vae is not None
        at = vae if part == "vae" and vae is not None and vae.is_dir() else folder / part
        settings = [p for p in at.glob("*") if p.suffix in (".json", ".txt", ".model") and ".index." not in p.name]
        if part == "vae" and vae is not None and vae.is_file():
            settings.append(vae)
        elif (stem := STEMS.get(part)) and (replaced or checkpoint is None):
            settings += find_weights(at, stem, None if replaced else variant).files
        found += [(part, path) for path in sorted(settings)]
    lines = "".join(f"{part}/{path.name} {hash_file(path)}\n" for part, path in found)
    if json.loads((folder / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True):
        lines += "force_zeros_for_empty_prompt\n"  # what guidance leads away from where a request names nothing
    return hashlib.sha256(lines.encode()).hexdigest()
