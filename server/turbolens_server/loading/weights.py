"""Which files hold the weights of a model's parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Final

from turbolens_server.files import first_line
from turbolens_server.loading.errors import LoadError

STEMS: Final = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""What the weight files of each part are called."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """The files of one part."""

    files: tuple[Path, ...]
    """In order of name."""
    variant: str | None
    """What to ask the library for, so that it loads these."""

    @property
    def name(self) -> str:
        """Of the file, or of the first of several, with the part's folder."""
        more = f" (and {len(self.files) - 1} more)" if len(self.files) > 1 else ""
        return f"{self.files[0].parent.name}/{self.files[0].name}{more}"


def find_weights(folder: Path, stem: str, variant: str | None) -> Weights:
    """The weight files of one part: the variant's where the folder has it, since a pipeline may have it of some only.

    Libraries differ in which they take of several, so that several are refused: what is hashed is what is loaded.

    Raises:
        LoadError: there are none, or both one file and shards.
    """
    for name in dict.fromkeys((variant, None)):
        dot = f".{name}" if name else ""
        single = f"{stem}{dot}.safetensors"
        # The second is how older versions of diffusers named it.
        indices = dict.fromkeys((f"{stem}.safetensors.index{dot}.json", f"{stem}.safetensors{dot}.index.json"))
        found = [file for file in (single, *indices) if (folder / file).is_file()]
        if len(found) > 1:
            raise LoadError(f"{folder}: holds both {' and '.join(found)}; keep the one that is to be loaded")
        if found == [single]:
            return Weights((folder / single,), name)
        if found:
            shards = sorted(set(_weight_map(folder / found[0]).values()))
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise LoadError(f"{folder}: {missing[0]} is missing, which {found[0]} names")
            return Weights(tuple(folder / shard for shard in shards), name)
    raise LoadError(
        f"{folder}: {stem}.safetensors is missing, and pickled weights are not loaded; convert them by save_pretrained"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor, of an index of shards."""
    try:
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("no files by tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: no index of shards ({first_line(error)})") from error
    return found
