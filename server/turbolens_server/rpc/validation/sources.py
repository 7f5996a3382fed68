"""What a run starts from: a prompt, a picture or latents. A picture is refused by its header, before it is unpacked."""

from __future__ import annotations

import io
import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from turbolens_proto.v1 import run_pb2
from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.types import Start
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.steering.masks import pixels_only

_FORMATS: Final = {
    run_pb2.IMAGE_FORMAT_UNSPECIFIED: ("PNG", "JPEG", "WEBP"),
    run_pb2.IMAGE_FORMAT_PNG: ("PNG",),
    run_pb2.IMAGE_FORMAT_JPEG: ("JPEG",),
    run_pb2.IMAGE_FORMAT_WEBP: ("WEBP",),
}
_MODES: Final = ("RGB", "L")
_TYPES: Final = {
    run_pb2.VALUE_TYPE_UNSPECIFIED: "<f2",
    run_pb2.VALUE_TYPE_FLOAT16: "<f2",
    run_pb2.VALUE_TYPE_FLOAT32: "<f4",
}
_AXES: Final = 3
"""Of latents."""
_LARGEST: Final = 1e4
"""Of a latent: one of a picture is about 1, and half precision ends at 65,504."""


class Started(NamedTuple):
    """What a run starts from and hears."""

    prompt: str
    start: Start | None = None
    """None: noise alone."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels of the start."""


def check_source(checks: Checks, field: str, source: run_pb2.Source) -> Started:
    """What a run starts from."""
    match source.WhichOneof("kind"):
        case "prompt":
            return Started(check_prompt(checks, f"{field}.prompt.text", source.prompt.text))
        case "picture":
            path, picture = f"{field}.picture", source.picture
            prompt = check_prompt(checks, f"{path}.prompt", picture.prompt)
            _check_strength(checks, path, picture.strength)
            pixels = _pixels(checks, f"{path}.picture", picture.picture)
            return Started(prompt) if pixels is None else Started(prompt, Start("picture", pixels), pixels.shape[:2])
        case "latents":
            path, latents = f"{field}.latents", source.latents
            prompt = check_prompt(checks, f"{path}.prompt", latents.prompt)
            if latents.HasField("strength"):
                _check_strength(checks, path, latents.strength)
            values = _values(checks, f"{path}.latents", latents.latents)
            if values is None:
                return Started(prompt)
            height, width = (edge * checks.info.vae_downscale for edge in values.shape[1:])
            return Started(
                prompt, Start("latents" if latents.HasField("strength") else "noise", values), (height, width)
            )
    checks.wrong(field, "is missing; give a prompt (the empty prompt is one), a picture or latents")
    return Started("")


def check_prompt(checks: Checks, field: str, text: str) -> str:
    """A text that the model hears."""
    if len(text) > checks.limits.max_prompt_chars:
        allowed = f"has {len(text)} characters; at most {checks.limits.max_prompt_chars} are allowed"
        checks.bad(field, text, allowed)
    return text


def _strength_of(source: run_pb2.Source) -> float | None:
    """How much of the way from noise a run walks; None: all of it, from noise."""
    match source.WhichOneof("kind"):
        case "picture":
            return source.picture.strength
        case "latents" if source.latents.HasField("strength"):
            return source.latents.strength
    return None


def steps_of(source: run_pb2.Source, steps: int) -> int:
    """Steps that a run from a source walks of all."""
    strength = _strength_of(source)
    return steps if strength is None else taken_steps(steps, strength)


def taken_steps(steps: int, strength: float) -> int:
    """Steps that are walked of all; 1 where it would be none or is no number, which is refused elsewhere."""
    taken = steps * strength
    return min(max(int(taken), 1), steps) if math.isfinite(taken) else 1


def check_taken(checks: Checks, field: str, source: run_pb2.Source, steps: int) -> None:
    """Whether a strength leaves anything to walk of so many steps."""
    strength = _strength_of(source)
    if strength is not None and 0 < strength <= 1 and int(steps * strength) < 1:
        most = checks.info.max_steps  # no hint of steps that nobody may ask for
        more = f", or sampling.steps to {math.ceil(1 / strength)}" if 1 / strength <= most else ""
        text = f"is less than one of {steps} step{'s'[: steps > 1]}; raise it{more}"
        checks.bad(f"{field}.{source.WhichOneof('kind')}.strength", strength, text)


def _check_strength(checks: Checks, path: str, strength: float) -> None:
    if not checks.info.takes_pictures:
        checks.wrong(path, f"the scheduler {checks.info.scheduler} does not say how a picture is noised")
    elif not 0 < strength <= 1:
        checks.bad(f"{path}.strength", strength, "must be more than 0 and at most 1")


def _pixels(checks: Checks, field: str, image: run_pb2.Image) -> npt.NDArray[np.uint8] | None:
    """A picture [height, width, 3] of a size that is served; None where something is wrong with it."""
    most = checks.limits.max_picture_bytes
    if not checks.known(f"{field}.format", image.format, run_pb2.ImageFormat):
        return None
    if len(image.data) > most:
        checks.bad(f"{field}.data", f"{len(image.data)} bytes", f"at most {most} are allowed")
        return None
    if image.format == run_pb2.IMAGE_FORMAT_RAW:
        size = (image.height, image.width)
        if not _served(checks, field, size):
            return None
        if len(image.data) != (right := 3 * math.prod(size)):
            checks.bad(f"{field}.data", f"{len(image.data)} bytes", f"RAW is height * width * 3 = {right}")
            return None
        return np.frombuffer(image.data, np.uint8).reshape(*size, 3).copy()
    formats = _FORMATS[image.format]
    try:
        data = pixels_only(image.data) if image.data.startswith(b"\x89PNG") else image.data
        with Image.open(io.BytesIO(data), formats=formats) as opened:  # reads the header alone
            if not _served(checks, field, (opened.height, opened.width)):
                return None
            if getattr(opened, "is_animated", False):
                checks.wrong(f"{field}.data", "moves; give one picture")
            elif opened.mode not in _MODES:  # what is clear has no color, and CMYK has many
                checks.wrong(f"{field}.data", f"has pixels of mode {opened.mode}; give RGB or grey ones, without alpha")
            else:
                return np.asarray(opened.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for broken files
        checks.wrong(f"{field}.data", f"not a readable {' or '.join(formats)} ({type(error).__name__})")
    return None


def _served(checks: Checks, field: str, size: tuple[int, int]) -> bool:
    """Whether pictures of this (height, width) are made here."""
    if size in checks.info.sizes:
        return True
    checks.bad(field, f"{size[1]}x{size[0]}", f"{sizes_served(checks.info)}; scale it first")
    return False


def sizes_served(info: EngineInfo) -> str:
    """The sizes of pictures that are made here, in words."""
    return f"sizes served (width x height): {', '.join(f'{width}x{height}' for height, width in info.sizes)}"


def _values(checks: Checks, field: str, tensor: run_pb2.Tensor) -> npt.NDArray[np.float32] | None:
    """Latents [C, h, w] of a size that is served; None where something is wrong with them."""
    info, shape = checks.info, tuple(tensor.shape[:_AXES])
    if not checks.known(f"{field}.type", tensor.type, run_pb2.ValueType):
        return None
    served = [(info.latent_channels, *(edge // info.vae_downscale for edge in size)) for size in info.sizes]
    if shape not in served or len(tensor.shape) > _AXES:
        shown = list(shape) if len(tensor.shape) <= _AXES else f"{len(tensor.shape)} axes"
        checks.bad(f"{field}.shape", shown, f"must be one of {', '.join(str(list(one)) for one in served)}")
        return None
    kind = np.dtype(_TYPES[tensor.type])
    if len(tensor.data) != math.prod(shape) * kind.itemsize:
        checks.bad(f"{field}.data", f"{len(tensor.data)} bytes", f"must be {math.prod(shape) * kind.itemsize}")
        return None
    values = np.frombuffer(tensor.data, kind).reshape(shape).astype(np.float32)
    if not (np.abs(values) <= _LARGEST).all():
        checks.wrong(f"{field}.data", f"must be finite and within -{_LARGEST:g} to {_LARGEST:g}")
        return None
    return values
