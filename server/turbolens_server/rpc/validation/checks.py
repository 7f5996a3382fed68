"""What every check needs: what is served, the limits, and the list of what is wrong so far."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

from turbolens_proto.v1 import steering_pb2
from turbolens_server.engine.batcher import MAX_BATCH
from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.types import MAX_REGIONS
from turbolens_server.rpc.errors import Violation, invalid

MAX_REQUEST_ID_CHARS: Final = 128
MAX_REFERENCES: Final = 4
_SHOWN: Final = 60  # characters of a received value in an error
_TOLD: Final = 400  # of all that is said of a field: names that a caller made up may be part of it
_MOST_VIOLATIONS: Final = 100
"""No more are looked for."""


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """What a request may hold, beyond what the engine says."""

    max_prompt_chars: int = 4000
    max_seeds: int = 16
    max_edits: int = 64
    max_features_per_edit: int = 1024
    max_request_features: int = 4096
    """Features of all edits, those taken away included."""
    max_selected: int = 4096
    """Features that a request may name to have only those."""
    max_saes: int = 64
    """SAEs that a request or a search may name, and options of SAEs."""
    max_references: int = MAX_REFERENCES
    """Each takes a row of a batch beside its picture's."""
    max_lanes: int = MAX_BATCH
    """Of one picture, its references' included: a batch holds no more."""
    max_guidance_scale: float = 100.0
    max_regions: int = MAX_REGIONS
    max_strength: float = 1000.0
    max_picture_bytes: int = 8 * 2**20
    """Of one that a run starts from."""
    max_mask_bytes: int = 4 * 2**20
    # What a small message could otherwise cost: boxes quadratically, a white PNG 64 MiB for each 20 kB.
    max_mask_shapes: int = 256
    """Boxes and polygons of all masks of a request."""
    max_mask_points: int = 4096
    """Corners of all polygons of a request."""
    max_mask_pixels: int = 2**24
    """Of all PNG masks of a request."""


class Checks:
    """Collects violations: the path of a field, what was received and what is allowed."""

    def __init__(self, info: EngineInfo, limits: RequestLimits) -> None:
        self.info = info
        self.limits = limits
        self.violations: list[Violation] = []
        self.points = {point.name: point for point in info.hook_points}
        self.prefixes: dict[str, int] = {}
        """Features that an SAE has in this request, where it is not read whole."""

    def wrong(self, field: str, description: str) -> None:
        """Something is wrong with a field.

        Raises:
            RpcError: INVALID_ARGUMENT once so much is wrong that more would help nobody.
        """
        self.violations.append(Violation(field, description[:_TOLD]))
        if len(self.violations) >= _MOST_VIOLATIONS:
            self.refuse()

    def refuse(self) -> None:
        """End here where anything is wrong.

        Raises:
            RpcError: INVALID_ARGUMENT with a violation for every field that is wrong.
        """
        if self.violations:
            raise invalid(self.violations)

    def bad(self, field: str, value: Any, allowed: str) -> None:
        """A value that is not allowed."""
        shown = repr(value[: _SHOWN + 1] if isinstance(value, str | list | tuple) else value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        self.wrong(field, f"got {shown}; {allowed}")

    def number(self, field: str, value: float, scale: float = 1.0) -> float:
        """An amount or a weight; `scale`: what 1 of it stands for."""
        bound = self.limits.max_strength * scale
        if not math.isfinite(value) or abs(value) > bound:
            self.bad(field, value, f"must be finite and within -{bound:g} to {bound:g}")
            return 0.0
        return value

    def known(self, field: str, value: int, enum: Any) -> bool:
        """Whether a number is one of an enum's."""
        if value in enum.values():
            return True
        self.bad(field, value, f"must be one of {', '.join(f'{n} ({v})' for n, v in enum.items())}")
        return False

    def sae(self, field: str, name: str) -> bool:
        """Whether an SAE is served."""
        if name in self.info.saes:
            return True
        have = ", ".join(self.info.saes) or "none"
        self.bad(field, name, f"no such SAE or block; this server has {have}")
        return False

    def feature(self, field: str, ref: steering_pb2.FeatureRef) -> bool:
        """Whether a feature exists as its SAE is read."""
        if not self.sae(f"{field}.sae", ref.sae):
            return False
        prefix = self.prefixes.get(ref.sae)
        d_sae = prefix or self.info.saes[ref.sae].bundle.d_sae
        if not 0 <= ref.index < d_sae:
            at = f" at prefix {prefix}" if prefix else ""
            self.bad(f"{field}.index", ref.index, f"must be 0 to {d_sae - 1} for {ref.sae}{at}")
            return False
        return True
