"""Code pictures for the wire."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from turbolens_proto.v1 import run_pb2


def encode_image(picture: npt.NDArray[np.uint8], kind: run_pb2.ImageFormat.ValueType, quality: int) -> run_pb2.Image:
    """A picture [height, width, 3] as a message; `quality` counts for JPEG and WebP only."""
    height, width, _ = picture.shape
    if kind == run_pb2.IMAGE_FORMAT_RAW:
        return run_pb2.Image(format=kind, data=picture.tobytes(), width=width, height=height)
    name = {run_pb2.IMAGE_FORMAT_JPEG: "JPEG", run_pb2.IMAGE_FORMAT_WEBP: "WEBP"}.get(kind, "PNG")
    file = io.BytesIO()
    options = {"quality": quality} if name != "PNG" else {"compress_level": 3}
    Image.fromarray(picture).save(file, name, **options)
    return run_pb2.Image(format=kind, data=file.getvalue(), width=width, height=height)
