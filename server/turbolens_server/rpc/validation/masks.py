"""Where edits act: masks as shapes or pictures, and what those of one request may cost."""

from __future__ import annotations

from collections.abc import Sequence

from turbolens_proto.v1 import steering_pb2
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.steering.masks import Box, BoxMask, Mask, PolygonMask, read_png


class MaskChecks:
    """Checks the masks of one request, which share a bound on shapes and corners."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._limits = checks.limits
        self._shapes = self._corners = 0

    def mask(self, field: str, mask: steering_pb2.Mask) -> Mask | None:
        """A mask; None where something is wrong with it."""
        kind = mask.WhichOneof("shape")
        if kind is None:
            self._checks.wrong(f"{field}.shape", "is missing; give boxes, polygons or a png")
            return None
        if kind == "boxes":
            return self._boxes(f"{field}.boxes.boxes", mask.boxes.boxes)
        if kind == "polygons":
            return self._polygons(f"{field}.polygons.polygons", mask.polygons.polygons)
        return self._png(f"{field}.png", mask.png)

    def _png(self, field: str, data: bytes) -> Mask | None:
        if len(data) > self._limits.max_mask_bytes:
            self._checks.bad(field, f"{len(data)} bytes", f"at most {self._limits.max_mask_bytes} are allowed")
            return None
        try:
            picture = read_png(data)
        except ValueError as error:
            self._checks.wrong(field, str(error))
            return None
        if not picture.weights.any():
            self._checks.wrong(field, "is black everywhere: it would act nowhere")
        return picture

    def _fits(self, field: str, *, shapes: int, corners: int = 0) -> bool:
        """Whether the masks of the request may hold so many more shapes and corners."""
        self._shapes += shapes
        self._corners += corners
        most, most_corners = self._limits.max_mask_shapes, self._limits.max_mask_points
        if self._shapes <= most and self._corners <= most_corners:
            return True
        shown = f"{self._shapes} shapes with {self._corners} corners up to here"
        allowed = f"the masks of a request may hold {most} boxes and polygons, with {most_corners} corners of polygons"
        self._checks.bad(field, shown, f"{allowed}; for more, send a PNG")
        return False

    def _boxes(self, field: str, boxes: Sequence[steering_pb2.Box]) -> Mask | None:
        if not boxes:
            self._checks.wrong(field, "is empty; give at least one box")
            return None
        if not self._fits(field, shapes=len(boxes)):
            return None
        for i, b in enumerate(boxes):
            if not (0 <= b.left < b.right <= 1 and 0 <= b.top < b.bottom <= 1):
                shown = f"({b.left:g}, {b.top:g}, {b.right:g}, {b.bottom:g})"
                self._checks.bad(f"{field}[{i}]", shown, "must have 0 <= left < right <= 1 and 0 <= top < bottom <= 1")
        return BoxMask(tuple(Box(b.left, b.top, b.right, b.bottom) for b in boxes))

    def _polygons(self, field: str, polygons: Sequence[steering_pb2.Polygon]) -> Mask | None:
        if not polygons:
            self._checks.wrong(field, "is empty; give at least one polygon")
            return None
        if not self._fits(field, shapes=len(polygons)):  # first, so that there are few to count the corners of
            return None
        if not self._fits(field, shapes=0, corners=sum(len(polygon.points) for polygon in polygons)):
            return None
        shapes = []
        for i, polygon in enumerate(polygons):
            points = tuple((p.x, p.y) for p in polygon.points)
            if len(points) < 3:
                self._checks.bad(f"{field}[{i}].points", f"{len(points)} points", "a polygon has at least three")
            elif not all(0 <= v <= 1 for point in points for v in point):
                self._checks.bad(f"{field}[{i}].points", points, "coordinates must be 0 to 1")
            elif abs(_area(points)) < 1e-9:
                self._checks.bad(f"{field}[{i}].points", points, "no area, or its sides cross so that it cancels")
            shapes.append(points)
        return PolygonMask(tuple(shapes))


def _area(points: Sequence[tuple[float, float]]) -> float:
    """Signed area of a polygon (the shoelace formula)."""
    following = [*points[1:], points[0]]
    doubled = [x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(points, following, strict=True)]
    return sum(doubled) / 2
