"""From a request to jobs, or to the list of everything that is wrong with it, before any model work.

Pure functions of the request, of what the engine serves and of the limits. Every problem is collected, with the path
of its field, what was received and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np

from turbolens_proto.v1 import feature_service_pb2, generation_service_pb2, run_pb2, steering_pb2
from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.types import Job, SaeOptions
from turbolens_server.rpc.errors import Violation, invalid
from turbolens_server.sae.temporal import refuse_edit, refuse_steps
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.kinds import EditKind
from turbolens_server.steering.masks import Box, BoxMask, FloatGrid, GridMask, Mask, PolygonMask, read_png

MAX_SEED: Final = 2**63 - 1
MAX_REQUEST_ID_CHARS: Final = 128
MAX_MESSAGE_BYTES: Final = 64 * 2**20
_MASK_SLACK: Final = 0.5 / 255 + 1e-6
"""What rounding to the grey levels of a PNG adds to a weight."""
_SHOWN: Final = 60  # characters of a received value in an error

GenerateRequest = generation_service_pb2.GenerateRequest
ExtractFeaturesRequest = feature_service_pb2.ExtractFeaturesRequest


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """What a request may hold, beyond what the engine says."""

    max_prompt_chars: int = 4000
    max_seeds: int = 16
    max_edits: int = 64
    max_features_per_edit: int = 1024
    max_strength: float = 1000.0
    max_mask_bytes: int = 4 * 2**20
    # What a small message could otherwise cost: boxes quadratically, a white PNG 64 MiB for each 20 kB.
    max_mask_shapes: int = 256
    """Boxes and polygons of all masks of a request."""
    max_mask_points: int = 4096
    """Corners of all polygons of a request."""
    max_mask_pixels: int = 2**24
    """Of all PNG masks of a request."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which features to return, and how."""

    saes: tuple[str, ...]
    only: dict[str, frozenset[int]] | None
    """By SAE; None: all features."""
    value_type: run_pb2.ValueType.ValueType


@dataclasses.dataclass(frozen=True)
class ValidRequest:
    """A request that can be served."""

    request_id: str
    prompt: str
    jobs: tuple[Job, ...]
    selection: Selection | None
    sampling: run_pb2.Sampling
    """With every default filled in."""
    edits: tuple[steering_pb2.Edit, ...]
    sae_options: tuple[run_pb2.SaeOptions, ...]
    image_format: run_pb2.ImageFormat.ValueType = run_pb2.IMAGE_FORMAT_PNG
    image_quality: int = 90
    return_latents: bool = False


class _Checker:
    """Collects violations."""

    def __init__(self, info: EngineInfo, limits: RequestLimits) -> None:
        self.info = info
        self.limits = limits
        self.violations: list[Violation] = []
        self.points = {point.name: point for point in info.hook_points}
        self.mask_pixels = self.mask_shapes = self.mask_corners = 0
        self.prefixes: dict[str, int] = {}
        """Features that an SAE has in this request, where it is not read whole."""

    def bad(self, field: str, value: Any, allowed: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        self.violations.append(Violation(field, f"got {shown}; {allowed}"))

    def number(self, field: str, value: float) -> float:
        bound = self.limits.max_strength
        if not math.isfinite(value) or abs(value) > bound:
            self.bad(field, value, f"must be finite and within -{bound:g} to {bound:g}")
            return 0.0
        return value

    def known(self, field: str, value: int, enum: Any) -> bool:
        if value in enum.values():
            return True
        self.bad(field, value, f"must be one of {', '.join(f'{n} ({v})' for n, v in enum.items())}")
        return False

    def sae(self, field: str, name: str) -> bool:
        if name in self.info.saes:
            return True
        have = ", ".join(self.info.saes) or "none"
        self.bad(field, name, f"no such SAE or block; this server has {have}")
        return False

    def feature(self, field: str, ref: steering_pb2.FeatureRef) -> bool:
        if not self.sae(f"{field}.sae", ref.sae):
            return False
        prefix = self.prefixes.get(ref.sae)
        d_sae = prefix or self.info.saes[ref.sae].bundle.d_sae
        if not 0 <= ref.index < d_sae:
            at = f" at prefix {prefix}" if prefix else ""
            self.bad(f"{field}.index", ref.index, f"must be 0 to {d_sae - 1} for {ref.sae}{at}")
            return False
        return True

    # Parts of a run

    def request_id(self, value: str) -> str:
        if len(value) > MAX_REQUEST_ID_CHARS or not (value.isascii() and value.isprintable()):
            self.bad("request_id", value, f"must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters")
        return value

    def prompt(self, request: GenerateRequest | ExtractFeaturesRequest) -> str:
        if request.WhichOneof("source") != "prompt":
            self.violations.append(Violation("source", "is missing; give a prompt (the empty prompt is one)"))
            return ""
        text = request.prompt.text
        if len(text) > self.limits.max_prompt_chars:
            allowed = f"has {len(text)} characters; at most {self.limits.max_prompt_chars} are allowed"
            self.bad("prompt.text", text, allowed)
        return text

    def sampling(self, sampling: run_pb2.Sampling) -> tuple[int, int, int]:
        info = self.info
        steps = sampling.steps if sampling.HasField("steps") else info.default_steps
        if not 1 <= steps <= info.max_steps:
            self.bad("sampling.steps", steps, f"must be 1 to {info.max_steps}")
            steps = 1
        height = sampling.height if sampling.HasField("height") else info.default_size[0]
        width = sampling.width if sampling.HasField("width") else info.default_size[1]
        if (height, width) not in info.sizes:
            served = ", ".join(f"{w}x{h}" for h, w in info.sizes)
            field = "sampling.width" if sampling.HasField("width") else "sampling.height"
            self.bad(field, f"{width}x{height}", f"sizes served (width x height): {served}")
            height, width = info.default_size
        if sampling.HasField("guidance_scale") and sampling.guidance_scale != 0:
            self.bad(
                "sampling.guidance_scale", sampling.guidance_scale, "only 0, the model's one-pass setting, is served"
            )
        return steps, height, width

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        if len(seeds) > self.limits.max_seeds:
            self.bad("seeds", f"{len(seeds)} seeds", f"at most {self.limits.max_seeds} are allowed")
            return [0]
        for i, seed in enumerate(seeds):
            if not 0 <= seed <= MAX_SEED:
                self.bad(f"seeds[{i}]", seed, "must be 0 to 2^63 - 1")
        return list(seeds) or [secrets.randbelow(2**31)]

    def sae_options(self, request: GenerateRequest | ExtractFeaturesRequest, *, reads: bool) -> tuple[SaeOptions, ...]:
        """How SAEs are read; before features are looked at, since a prefix says which there are.

        Args:
            request: the whole of it, since options of an SAE that it does not use are a mistake.
            reads: features come back.
        """
        used = {item.feature.sae for edit in request.edits for item in edit.features}
        used |= set(request.features.saes or self.info.saes) if reads else set()
        found: dict[str, SaeOptions] = {}
        for i, options in enumerate(request.sae_options):
            field, name = f"sae_options[{i}]", options.sae
            if not self.sae(f"{field}.sae", name):
                continue
            if name in found:
                self.bad(f"{field}.sae", name, "an SAE may be named once")
                continue
            if name not in used:
                self.bad(f"{field}.sae", name, "must be an SAE whose features are asked for or edited")
            k = options.k if options.HasField("k") else None
            prefix = options.prefix if options.HasField("prefix") else None
            refused = self.info.saes[name].bundle.refused(k, prefix)
            for part, why in refused.items():
                self.bad(f"{field}.{part}", getattr(options, part), f"{name} {why}")
            if prefix and "prefix" not in refused:
                self.prefixes[name] = prefix
            found[name] = SaeOptions(name, k, prefix)
        return tuple(found.values())

    def selection(self, selection: run_pb2.FeatureSelection, steps: int) -> Selection:
        names = []
        for i, name in enumerate(selection.saes):
            if self.sae(f"features.saes[{i}]", name) and name not in names:
                names.append(name)
        if not selection.saes:
            # Those that these steps allow; where there are none, all, so that the refusal names what is allowed.
            fitting = [name for name, sae in self.info.saes.items() if sae.bundle.steps in (None, steps)]
            names = fitting or list(self.info.saes)
            if not names:
                self.violations.append(Violation("features", "this server has no SAE; start it with --sae"))
        only: dict[str, set[int]] = {name: set() for name in names}
        for i, ref in enumerate(selection.only):
            field = f"features.only[{i}]"
            if self.feature(field, ref):
                if ref.sae in only:
                    only[ref.sae].add(ref.index)
                else:
                    self.bad(f"{field}.sae", ref.sae, "must be among the selected SAEs")
        self.known("features.value_type", selection.value_type, run_pb2.ValueType)
        wanted = {name: frozenset(indices) for name, indices in only.items()} if selection.only else None
        value_type = selection.value_type or run_pb2.VALUE_TYPE_FLOAT16
        ordered = tuple(name for name in self.info.saes if name in names)
        return Selection(ordered, wanted, value_type)

    def steps_of(self, used: Collection[str], steps: int) -> None:
        for name, sae in self.info.saes.items():
            if name in used and (reason := refuse_steps(sae.bundle, steps)):
                self.bad("sampling.steps", steps, reason)

    def image(self, image: run_pb2.ImageOptions) -> tuple[run_pb2.ImageFormat.ValueType, int]:
        self.known("image.format", image.format, run_pb2.ImageFormat)
        kind = image.format or run_pb2.IMAGE_FORMAT_PNG
        if image.HasField("quality"):
            if kind not in (run_pb2.IMAGE_FORMAT_JPEG, run_pb2.IMAGE_FORMAT_WEBP):
                self.bad("image.quality", image.quality, "only JPEG and WebP have a quality")
            elif not 1 <= image.quality <= 100:
                self.bad("image.quality", image.quality, "must be 1 to 100")
        return kind, image.quality if image.HasField("quality") else 90

    # Edits

    def edits(self, edits: Sequence[steering_pb2.Edit], steps: int, size: tuple[int, int]) -> list[Edit]:
        if len(edits) > self.limits.max_edits:
            self.bad("edits", f"{len(edits)} edits", f"at most {self.limits.max_edits} are allowed")
            return []
        before = len(self.violations)
        valid = [e for i, edit in enumerate(edits) if (e := self.edit(f"edits[{i}]", edit, steps, size)) is not None]
        if len(self.violations) == before:
            self.no_overlap(valid, steps, size)
        return valid

    def edit(self, path: str, edit: steering_pb2.Edit, steps: int, size: tuple[int, int]) -> Edit | None:
        before = len(self.violations)
        kind: EditKind | None = edit.WhichOneof("kind")
        amount, unit = 0.0, Unit.MEAN
        if kind is None:
            self.violations.append(Violation(f"{path}.kind", "is missing; give one of add, scale, set, replace"))
        else:
            name = {"add": "strength", "scale": "factor", "set": "value", "replace": "strength"}[kind]
            message = getattr(edit, kind)
            amount = self.number(f"{path}.{kind}.{name}", getattr(message, name))
            if kind != "scale" and self.known(f"{path}.{kind}.unit", message.unit, steering_pb2.Unit):
                unit = {0: Unit.MEAN, 1: Unit.RAW, 2: Unit.MEAN, 3: Unit.NORM}[message.unit]
        features = self.features(path, edit, kind, unit)
        for name in dict.fromkeys(feature.sae for feature in features):
            if kind and (reason := refuse_edit(self.info.saes[name].bundle, kind)):
                self.violations.append(Violation(f"{path}.{kind}", reason))
        window = self.window(f"{path}.steps", edit, steps)
        mask = self.mask(f"{path}.mask", edit.mask) if edit.HasField("mask") else None
        if kind is None or len(self.violations) > before:
            return None
        if mask is None:
            return Edit(kind, features, amount, unit, None, window)
        # Once here and not for every seed in the engine; and a picture would wait in the queue at its full size.
        grids = {self.points[at].grid(*size): at for at in self.points_of(features)}
        on_grids = GridMask({shape: mask.on_grid(*shape) for shape in grids})
        if empty := [at for shape, at in grids.items() if not on_grids.on_grid(*shape).any()]:
            self.violations.append(Violation(f"{path}.mask", f"covers nothing on the grid of {empty[0]}"))
            return None
        return Edit(kind, features, amount, unit, on_grids, window)

    def points_of(self, features: Sequence[WeightedFeature]) -> list[str]:
        """Hook points that an edit of these features acts at."""
        return list(dict.fromkeys(self.info.saes[feature.sae].hook_point for feature in features))

    def features(self, path: str, edit: steering_pb2.Edit, kind: str | None, unit: Unit) -> tuple[WeightedFeature, ...]:
        count, most = len(edit.features), self.limits.max_features_per_edit
        if not 1 <= count <= most:
            self.bad(f"{path}.features", f"{count} features", f"an edit takes 1 to {most}")
            return ()
        found: dict[tuple[str, int], WeightedFeature] = {}
        for i, item in enumerate(edit.features):
            field = f"{path}.features[{i}]"
            weight = self.number(f"{field}.weight", item.weight) if item.HasField("weight") else 1.0
            if item.HasField("weight") and kind == "scale":
                self.bad(f"{field}.weight", item.weight, "scale takes no weights")
            if not self.feature(f"{field}.feature", item.feature):
                continue
            key = (item.feature.sae, item.feature.index)
            if key in found:
                self.bad(f"{field}.feature", f"{key[0]}/{key[1]}", "a feature may be named once in an edit")
            found[key] = WeightedFeature(*key, weight)
            if kind in ("add", "set", "replace"):
                self.unit(f"{path}.{kind}.unit", unit, *key)
        return tuple(found.values())

    def unit(self, field: str, unit: Unit, sae: str, index: int) -> None:
        bundle = self.info.saes[sae].bundle
        stats = bundle.stats
        if unit is Unit.MEAN and stats is None:
            self.bad(field, "mean", f"{sae} has no statistics; use UNIT_RAW")
        elif unit is Unit.MEAN and stats is not None and not stats.mean[index] > 0:
            self.bad(field, "mean", f"{sae}/{index} was never active, so it has no mean; use UNIT_RAW")
        elif unit is Unit.NORM and bundle.measured is None:
            self.bad(field, "norm", f"{sae} has no statistics of its block's norm; use UNIT_RAW or UNIT_MEAN")

    def window(self, field: str, edit: steering_pb2.Edit, steps: int) -> tuple[int, int] | None:
        if not edit.HasField("steps"):
            return None
        start, end = edit.steps.start, edit.steps.end
        if not 0 <= start < end <= steps:
            self.bad(
                field, f"{start} to {end}", f"must be a range start < end within 0 to {steps}, the steps of this run"
            )
        return start, end

    def mask(self, field: str, mask: steering_pb2.Mask) -> Mask | None:
        kind = mask.WhichOneof("shape")
        if kind is None:
            self.violations.append(Violation(f"{field}.shape", "is missing; give boxes, polygons or a png"))
            return None
        if kind == "boxes":
            return self.boxes(f"{field}.boxes.boxes", mask.boxes.boxes)
        if kind == "polygons":
            return self.polygons(f"{field}.polygons.polygons", mask.polygons.polygons)
        if len(mask.png) > self.limits.max_mask_bytes:
            self.bad(f"{field}.png", f"{len(mask.png)} bytes", f"at most {self.limits.max_mask_bytes} are allowed")
            return None
        try:
            picture = read_png(mask.png)
        except ValueError as error:
            self.violations.append(Violation(f"{field}.png", str(error)))
            return None
        self.mask_pixels += picture.weights.size
        if self.mask_pixels > self.limits.max_mask_pixels:
            allowed = f"the PNG masks of a request may hold {self.limits.max_mask_pixels} pixels in all"
            self.bad(f"{field}.png", f"{picture.weights.size} pixels", allowed)
            return None
        if not picture.weights.any():
            self.violations.append(Violation(f"{field}.png", "is black everywhere: the edit would act nowhere"))
        return picture

    def fits(self, field: str, *, shapes: int, corners: int = 0) -> bool:
        """Whether the masks of the request may hold so many more shapes and corners."""
        self.mask_shapes += shapes
        self.mask_corners += corners
        most, most_corners = self.limits.max_mask_shapes, self.limits.max_mask_points
        if self.mask_shapes <= most and self.mask_corners <= most_corners:
            return True
        shown = f"{self.mask_shapes} shapes with {self.mask_corners} corners up to here"
        allowed = f"the masks of a request may hold {most} boxes and polygons, with {most_corners} corners of polygons"
        self.bad(field, shown, f"{allowed}; for more, send a PNG")
        return False

    def boxes(self, field: str, boxes: Sequence[steering_pb2.Box]) -> Mask | None:
        if not boxes:
            self.violations.append(Violation(field, "is empty; give at least one box"))
            return None
        if not self.fits(field, shapes=len(boxes)):
            return None
        for i, b in enumerate(boxes):
            if not (0 <= b.left < b.right <= 1 and 0 <= b.top < b.bottom <= 1):
                shown = f"({b.left:g}, {b.top:g}, {b.right:g}, {b.bottom:g})"
                self.bad(f"{field}[{i}]", shown, "must have 0 <= left < right <= 1 and 0 <= top < bottom <= 1")
        return BoxMask(tuple(Box(b.left, b.top, b.right, b.bottom) for b in boxes))

    def polygons(self, field: str, polygons: Sequence[steering_pb2.Polygon]) -> Mask | None:
        if not polygons:
            self.violations.append(Violation(field, "is empty; give at least one polygon"))
            return None
        if not self.fits(field, shapes=len(polygons), corners=sum(len(polygon.points) for polygon in polygons)):
            return None
        shapes = []
        for i, polygon in enumerate(polygons):
            points = tuple((p.x, p.y) for p in polygon.points)
            if len(points) < 3:
                self.bad(f"{field}[{i}].points", f"{len(points)} points", "a polygon has at least three")
            elif not all(0 <= v <= 1 for point in points for v in point):
                self.bad(f"{field}[{i}].points", points, "coordinates must be 0 to 1")
            elif abs(_area(points)) < 1e-9:
                self.bad(f"{field}[{i}].points", points, "the polygon has no area")
            shapes.append(points)
        return PolygonMask(tuple(shapes))

    def no_overlap(self, edits: Sequence[Edit], steps: int, size: tuple[int, int]) -> None:
        """The `replace` edits of one block at one step may not claim more than the whole of any place."""
        claims: dict[tuple[str, int], list[tuple[int, FloatGrid]]] = {}
        for i, edit in enumerate(edits):
            if edit.kind != "replace":
                continue
            for at in self.points_of(edit.features):
                shape = self.points[at].grid(*size)
                grid = np.ones(shape, np.float32) if edit.mask is None else edit.mask.on_grid(*shape)
                for step in range(*(edit.steps or (0, steps))):
                    taken = claims.setdefault((at, step), [])
                    taken.append((i, grid))
                    total = np.sum([area for _, area in taken], axis=0)
                    if total.max() > 1 + _MASK_SLACK * len(taken):
                        fullest = np.unravel_index(total.argmax(), shape)
                        others = ", ".join(f"edits[{other}]" for other, area in taken[:-1] if area[fullest] > 0)
                        text = f"replaces the same place of {at} as {others}; masks may not overlap"
                        self.violations.append(Violation(f"edits[{i}].mask", text))
                        return


def _area(points: Sequence[tuple[float, float]]) -> float:
    """Signed area of a polygon (the shoelace formula)."""
    following = [*points[1:], points[0]]
    doubled = [x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(points, following, strict=True)]
    return sum(doubled) / 2


def _edited(edits: Sequence[steering_pb2.Edit]) -> set[str]:
    """SAEs that edits name, known or not."""
    return {feature.feature.sae for edit in edits for feature in edit.features}


def _validate(
    checker: _Checker, request: GenerateRequest | ExtractFeaturesRequest, *, picture: bool, previews: bool
) -> ValidRequest:
    request_id = checker.request_id(request.request_id)
    prompt = checker.prompt(request)
    steps, height, width = checker.sampling(request.sampling)
    seeds = checker.seeds(request.seeds)
    reads = not picture or request.HasField("features")
    sae_options = checker.sae_options(request, reads=reads)
    edits = checker.edits(request.edits, steps, (height, width))
    selection = checker.selection(request.features, steps) if reads else None
    checker.steps_of({*(selection.saes if selection else ()), *_edited(request.edits)}, steps)
    kind, quality, latents = run_pb2.IMAGE_FORMAT_PNG, 90, False
    if isinstance(request, GenerateRequest):
        kind, quality = checker.image(request.image)
        latents = request.return_latents
    if checker.violations:
        raise invalid(checker.violations)
    jobs = tuple(
        Job(
            prompt=prompt,
            seed=seed,
            steps=steps,
            height=height,
            width=width,
            edits=tuple(edits),
            saes=selection.saes if selection else (),
            sae_options=sae_options,
            picture=picture,
            previews=previews,
        )
        for seed in seeds
    )
    sampling = run_pb2.Sampling(steps=steps, width=width, height=height, guidance_scale=0.0)
    return ValidRequest(
        request_id, prompt, jobs, selection, sampling, tuple(request.edits), tuple(request.sae_options), kind, quality,
        return_latents=latents,
    )  # fmt: skip


def validate_generate(
    request: GenerateRequest, info: EngineInfo, limits: RequestLimits, *, previews: bool = False
) -> ValidRequest:
    """A request for pictures, ready to run.

    Raises:
        RpcError: INVALID_ARGUMENT with a violation for every field that is wrong.
    """
    return _validate(_Checker(info, limits), request, picture=True, previews=previews)


def validate_extract(request: ExtractFeaturesRequest, info: EngineInfo, limits: RequestLimits) -> ValidRequest:
    """A request for features, ready to run.

    Raises:
        RpcError: INVALID_ARGUMENT with a violation for every field that is wrong.
    """
    return _validate(_Checker(info, limits), request, picture=False, previews=False)
