"""Image-text encoders, such as CLIP and SigLIP: pictures and words in one space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from turbolens_server.engine.decode import Picture
from turbolens_server.files import first_line, hash_files
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hub import resolve
from turbolens_server.loading.parts import read_part
from turbolens_server.loading.weights import find_weights

_BATCH: Final = 64
_SIGLIP_TOKENS: Final = 64
"""SigLIP was trained on texts padded to this length, and reads others wrongly."""


class Encoder(Protocol):
    """What embeds pictures and texts; cosines between them say what fits."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """Of its weights."""
        ...

    def to(self, device: torch.device) -> None:
        """Move to where it shall run."""
        ...

    def embed_pictures(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures, at least one and of any size, as [N, D] float32 of norm 1 on the CPU."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, at least one, as [N, D] float32 of norm 1 on the CPU."""
        ...


class PretrainedEncoder:
    """An encoder of `transformers` that has `get_image_features` and `get_text_features`."""

    def __init__(self, name: str, digest: str, model: Any, tokenizer: Any, image_processor: Any) -> None:
        """Take the loaded parts; `digest` is the hash of the weights."""
        self.name, self.hash = name, digest
        self._model, self._tokenizer, self._image_processor = model.eval(), tokenizer, image_processor
        text_config = model.config.get_text_config()
        limit = min(getattr(text_config, "max_position_embeddings", 77), tokenizer.model_max_length)
        self._padding: dict[str, Any] = {"padding": True, "max_length": limit}
        if "siglip" in model.config.model_type:
            self._padding = {"padding": "max_length", "max_length": _SIGLIP_TOKENS}

    def to(self, device: torch.device) -> None:
        self._model.to(device)

    def embed_pictures(self, pictures: Sequence[Picture]) -> Tensor:
        def embed(some: Sequence[Picture]) -> Any:
            inputs = self._image_processor([Image.fromarray(picture) for picture in some], return_tensors="pt")
            return self._model.get_image_features(**inputs.to(self._model.device))

        return _in_batches(embed, pictures)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        def embed(some: Sequence[str]) -> Any:
            inputs = self._tokenizer(list(some), truncation=True, return_tensors="pt", **self._padding)
            return self._model.get_text_features(**inputs.to(self._model.device))

        return _in_batches(embed, texts)


@torch.inference_mode()
def _in_batches(embed: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> Tensor:
    found = [embed(items[start : start + _BATCH]).pooler_output.float() for start in range(0, len(items), _BATCH)]
    return torch.nn.functional.normalize(torch.cat(found), dim=-1).cpu()


def load_encoder(name: str) -> PretrainedEncoder:
    """An encoder by folder or hub id, on the CPU in float32; only safetensors are read, and no code of the folder's.

    Raises:
        LoadError: there is no such folder, and the hub gave nothing.
        ValueError: it is no image-text encoder, or cannot be loaded.
    """
    folder = resolve(name, "--encoder")
    try:
        weights = find_weights(folder, "model", None)
        model = read_part(folder, AutoModel, weights, torch.float32)
    except LoadError as error:
        raise ValueError(f"--encoder {name}: {error}") from error
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(
            f"--encoder {name}: a {type(model).__name__} does not embed both pictures and texts; "
            "take CLIP, SigLIP or another image-text encoder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # The same arithmetic with and without torchvision.
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        local = Path(name).expanduser().is_dir()
        encoder = PretrainedEncoder(
            folder.resolve().name if local else name, hash_files(weights.files), model, tokenizer, image_processor
        )
        _try(encoder)
    except Exception as error:
        raise ValueError(f"--encoder {name}: does not embed a picture and a word ({first_line(error)})") from error
    return encoder


def _try(encoder: Encoder) -> None:
    """Embed a gray picture and a word: what cannot must say so before hours of work."""
    gray = np.full((32, 32, 3), 128, np.uint8)
    picture, text = encoder.embed_pictures([gray]), encoder.embed_texts(["gray"])
    if picture.ndim != 2 or picture.shape != text.shape:
        raise ValueError(f"shapes {tuple(picture.shape)} and {tuple(text.shape)} have no cosine")
    if not (picture.isfinite().all() and text.isfinite().all()):
        raise ValueError("values that are not finite")
