"""Pictures that a page was given: upright, in sRGB, of the size it works in, or a refusal that says why."""

from __future__ import annotations

import io
import warnings
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps

MAX_BYTES: Final = 32 * 2**20
MAX_PIXELS: Final = 64_000_000
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def read_picture(data: bytes) -> Image.Image:
    """An upload as an upright sRGB picture; what is clear becomes black.

    Raises:
        ValueError: it is no picture, broken, or too large.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes; at most {MAX_BYTES:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")
        image.load()
        return _to_srgb(ImageOps.exif_transpose(image))
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        raise ValueError(f"no picture that can be read ({str(error)[:120]})") from None


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits, which a conversion to 8 would cut off, not scale
        values = np.asarray(image, np.float64)
        image = Image.fromarray((values / max(65535.0, values.max(initial=0)) * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "black"), clear).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            tagged = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, tagged, ImageCms.createProfile("sRGB"), outputMode="RGB")
            image = converted if converted is not None else image
        except ImageCms.PyCMSError:
            pass  # a broken profile: the numbers as they are
    return image.convert("RGB")


def as_mask(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    """How bright a picture is, as a mask [height, width]; black is 0 and white is 255."""
    grey = image.convert("L").resize((width, height), Image.Resampling.BOX)
    return np.asarray(grey)
