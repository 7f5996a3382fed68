"""Masks are exact area averages."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from turbolens_server.steering.masks import Box, BoxMask, PictureMask, PolygonMask, read_png

fractions = st.integers(0, 48).map(lambda i: i / 48)


@st.composite
def boxes(draw):
    left, right = sorted(draw(st.lists(fractions, min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(draw(st.lists(fractions, min_size=2, max_size=2, unique=True)))
    return Box(left, top, right, bottom)


def brute_force(shapes, height, width, samples=24):
    """The union's coverage by counting sample points, exact for edges on a grid of 1/48."""
    ys = (np.arange(height * samples) + 0.5) / (height * samples)
    xs = (np.arange(width * samples) + 0.5) / (width * samples)
    inside = np.zeros((len(ys), len(xs)), bool)
    for b in shapes:
        inside |= ((ys > b.top) & (ys < b.bottom))[:, None] & ((xs > b.left) & (xs < b.right))[None]
    return inside.reshape(height, samples, width, samples).mean((1, 3))


@given(st.lists(boxes(), min_size=1, max_size=4), st.sampled_from([(8, 8), (16, 16), (4, 6)]))
def test_boxes_are_the_union_by_area(shapes, grid):
    assert np.allclose(BoxMask(tuple(shapes)).on_grid(*grid), brute_force(shapes, *grid), atol=1e-5)


@given(boxes())
def test_a_box_is_the_polygon_of_its_corners(box):
    corners = ((box.left, box.top), (box.right, box.top), (box.right, box.bottom), (box.left, box.bottom))
    polygon = PolygonMask((corners,)).on_grid(8, 8)
    assert np.abs(polygon - BoxMask((box,)).on_grid(8, 8)).max() <= 0.07  # an edge lies within half of 16 samples


corners = st.tuples(st.floats(0, 1), st.floats(0, 1))


@given(st.lists(st.lists(corners, min_size=3, max_size=7), min_size=1, max_size=3))
def test_polygons_hold_the_points_that_are_inside_by_the_even_odd_rule(polygons):
    """Each sample point by itself: how many sides a ray from it to the left crosses."""
    height, width, samples = 2, 3, 16
    expected = np.zeros((height * samples, width * samples), bool)
    for row, column in np.ndindex(expected.shape):
        y, x = (row + 0.5) / (height * samples), (column + 0.5) / (width * samples)
        for polygon in polygons:
            crossed = 0
            for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
                if (y0 <= y) != (y1 <= y):
                    crossed += x0 + (y - y0) / (y1 - y0) * (x1 - x0) < x
            expected[row, column] |= crossed % 2 == 1
    cells = expected.reshape(height, samples, width, samples).mean((1, 3))
    on_grid = PolygonMask(tuple(map(tuple, polygons))).on_grid(height, width)
    assert np.abs(on_grid - cells).max() <= 1 / samples**2 + 1e-6  # a point on a side may fall to either


def test_what_lies_between_two_samples_is_not_made_larger():
    """Over many positions the edges' rounding cancels out."""
    found = []
    for shift in np.linspace(0, 0.05, 40):
        left, top, right, bottom = 0.111 + shift, 0.123 + shift, 0.777 + shift, 0.888 + shift
        grid = PolygonMask((((left, top), (right, top), (right, bottom), (left, bottom)),)).on_grid(8, 8)
        found.append(grid.mean() / ((right - left) * (bottom - top)))
    assert np.mean(found) == pytest.approx(1, abs=2e-3)


def test_a_triangle_covers_half():
    assert PolygonMask((((0, 0), (1, 0), (0, 1)),)).on_grid(8, 8).mean() == pytest.approx(0.5, abs=0.02)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(8, 8), (3, 5)]))
def test_a_picture_keeps_its_mean_at_any_size(height, width, grid):
    weights = np.random.default_rng(0).random((height, width)).astype(np.float32)
    on_grid = PictureMask(weights).on_grid(*grid)
    assert on_grid.shape == grid
    assert on_grid.mean() == pytest.approx(weights.mean(), abs=1e-5)
    assert on_grid.min() >= -1e-6
    assert on_grid.max() <= 1 + 1e-6


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_png_values():
    grey = np.array([[0, 255], [51, 102]], np.uint8)
    assert np.allclose(read_png(png(Image.fromarray(grey))).on_grid(2, 2), grey / 255, atol=1e-6)
    sixteen = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert np.allclose(read_png(png(sixteen)).on_grid(1, 2), [[0, 1]])
    assert np.allclose(read_png(png(Image.new("1", (4, 4), 1))).on_grid(2, 2), 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_what_is_not_grey_is_refused(mode):
    with pytest.raises(ValueError, match=f"mode {mode}; a mask is a grey PNG"):
        read_png(png(Image.new(mode, (4, 4))))


@given(st.binary(max_size=200))
def test_broken_pngs_are_refused(data):
    with pytest.raises(ValueError, match="PNG"):
        read_png(data)


def test_truncated_and_huge_pngs_are_refused():
    whole = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)))
    with pytest.raises(ValueError, match="PNG"):
        read_png(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="4096"):
        read_png(png(Image.new("L", (5000, 1))))
