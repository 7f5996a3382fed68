"""Text in PNG files: a tEXt chunk (PNG specification, third edition, 11.3.3.3), which image tools keep and show."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Final

_END: Final = b"\0\0\0\0IEND\xaeB`\x82"


def with_text(png: bytes, keyword: str, text: str) -> bytes:
    """A PNG with a text in it, before its end; both must be Latin-1.

    Raises:
        ValueError: the bytes are no whole PNG.
    """
    if not png.endswith(_END):
        raise ValueError("no whole PNG")
    body = b"tEXt" + keyword.encode("latin-1") + b"\0" + text.encode("latin-1")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[: -len(_END)] + chunk + _END


def read_text(file: Path, keyword: str) -> str | None:
    """A text of a PNG file; None where it has none.

    Raises:
        ValueError: the file is no PNG.
        OSError: it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.load()  # texts may stand after the pixels
            found = image.info.get(keyword)
    except UnidentifiedImageError:
        raise ValueError(f"{file}: no PNG") from None
    return found if isinstance(found, str) else None
