"""What a run starts from in place of noise: a picture or latents."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from turbolens._numbers import number
from turbolens_proto.v1 import run_pb2

if TYPE_CHECKING:
    from PIL import Image

_CODED = (b"\x89PNG", b"\xff\xd8", b"RIFF")
_GREY_OR_RGB = ("RGB", "L")


@runtime_checkable
class HasImage(Protocol):
    """Anything that stands for a picture, such as one of a result."""

    @property
    def image(self) -> Image.Image:
        """A PIL image."""
        ...


ImageLike: TypeAlias = Any
"""A picture: a result's, a PIL image, an array of uint8 [height, width, 3], the bytes or the path of a PNG, JPEG or
WebP."""


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Start:
    """A picture, or latents, that a run starts from."""

    value: run_pb2.Image | run_pb2.Tensor
    strength: float | None
    """None: the latents are the first noise."""

    @classmethod
    def from_proto(cls, source: run_pb2.Source) -> Start | None:
        """What a source starts from; None: noise."""
        match source.WhichOneof("kind"):
            case "picture":
                return cls(source.picture.picture, source.picture.strength)
            case "latents":
                told = source.latents
                return cls(told.latents, told.strength if told.HasField("strength") else None)
        return None

    def to_proto(self, prompt: str) -> run_pb2.Source:
        """The source of a run that hears a prompt."""
        if isinstance(self.value, run_pb2.Image):
            made = run_pb2.PictureSource(picture=self.value, prompt=prompt, strength=self.strength or 0.0)
            return run_pb2.Source(picture=made)
        return run_pb2.Source(latents=run_pb2.LatentsSource(latents=self.value, prompt=prompt, strength=self.strength))

    def __hash__(self) -> int:
        return hash((self.value.SerializeToString(deterministic=True), self.strength))

    def __repr__(self) -> str:
        if isinstance(self.value, run_pb2.Image):
            return f"Start(<{len(self.value.data)} bytes of a picture>, strength={self.strength:g})"
        told = "noise" if self.strength is None else f"latents, strength={self.strength:g}"
        return f"Start(<{list(self.value.shape)} {told}>)"


def source_of(prompt: str, start: Start | None) -> run_pb2.Source:
    """The source of a run."""
    return run_pb2.Source(prompt=run_pb2.PromptSource(text=prompt)) if start is None else start.to_proto(prompt)


def prompt_of(source: run_pb2.Source) -> str:
    """What a source hears."""
    kind = source.WhichOneof("kind")
    return source.prompt.text if kind in (None, "prompt") else getattr(source, kind).prompt


def start_of(image: ImageLike | None, start_latents: Any, strength: float | None) -> Start | None:
    """What a run starts from; None: noise.

    Raises:
        TypeError, ValueError: it cannot be right for any server, or two things were given.
        OSError: a file cannot be read.
    """
    if strength is not None:
        strength = number(strength, "strength")
    if image is not None and start_latents is not None:
        raise ValueError("give image or start_latents, not both")
    if image is not None:
        if strength is None:
            raise ValueError("image needs a strength: how much of the way from noise is walked, such as 0.5")
        return Start(_image(image), strength)
    if start_latents is not None:
        values = np.asarray(start_latents, np.float32)
        if values.ndim != 3 or not np.isfinite(values).all():
            raise ValueError(f"start_latents are finite, [channels, height, width]; got shape {values.shape}")
        tensor = run_pb2.Tensor(
            shape=values.shape, type=run_pb2.VALUE_TYPE_FLOAT32, data=values.astype("<f4").tobytes()
        )
        return Start(tensor, strength)
    if strength is not None:
        raise ValueError("strength is of a run that starts from an image or from latents")
    return None


def _image(picture: ImageLike) -> run_pb2.Image:
    if isinstance(picture, str | os.PathLike):
        picture = Path(picture).read_bytes()
    if isinstance(picture, bytes):
        if not picture.startswith(_CODED):
            raise ValueError("image: the bytes are those of no PNG, JPEG or WebP")
        return run_pb2.Image(data=picture)
    from PIL import Image

    image = picture.image if isinstance(picture, HasImage) and not isinstance(picture, Image.Image) else picture
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise TypeError(f"image: {array.dtype} {array.shape}; give uint8 [height, width, 3], a PIL image or bytes")
        image = Image.fromarray(array)
    if image.mode not in _GREY_OR_RGB:
        raise ValueError(f"image: of mode {image.mode}; give RGB or grey, such as by convert('RGB')")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return run_pb2.Image(format=run_pb2.IMAGE_FORMAT_PNG, data=file.getvalue())
