"""Pictures coded for the wire."""

from __future__ import annotations

import io

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from turbolens_proto.v1 import run_pb2
from turbolens_server.images import encode_image, encode_png

pictures = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)))


@given(pictures)
def test_a_png_is_read_back_bit_by_bit(picture):
    image = Image.open(io.BytesIO(encode_png(picture)))
    image.verify()
    image = Image.open(io.BytesIO(encode_png(picture)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(image), picture)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (run_pb2.IMAGE_FORMAT_PNG, "PNG"),
        (run_pb2.IMAGE_FORMAT_JPEG, "JPEG"),
        (run_pb2.IMAGE_FORMAT_WEBP, "WEBP"),
    ],
)
def test_every_format_is_what_it_says(kind, name):
    picture = np.full((16, 24, 3), (200, 30, 90), np.uint8)
    coded = encode_image(picture, kind, 90)
    image = Image.open(io.BytesIO(coded.data))
    assert (image.format, image.size, coded.width, coded.height) == (name, (24, 16), 24, 16)
    assert np.abs(np.asarray(image.convert("RGB"), np.int16) - picture).max() <= 8
