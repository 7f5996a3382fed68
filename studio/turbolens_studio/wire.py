"""What the page says and hears: runs as JSON, pictures and features as frames of bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import turbolens as tl

MAX_SEED: Final = 2**63 - 1


class BadRun(ValueError):
    """A run that is not one; says which field is wrong."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


@dataclasses.dataclass(frozen=True)
class Run:
    """One picture to make, as a page asks for it."""

    prompt: str
    seed: int
    steps: int | None = None
    edits: tuple[tl.Edit, ...] = ()
    features: bool = False
    """Return the features of all SAEs."""
    only: tuple[tl.FeatureRef, ...] = ()
    """Return these features alone."""
    previews: bool = False

    @classmethod
    def from_json(cls, value: Any) -> Run:
        """From what a page sends.

        Raises:
            BadRun: with the field that is wrong.
        """
        if not isinstance(value, dict):
            raise BadRun("run", "is no object")
        if unknown := value.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise BadRun(sorted(unknown)[0], "is no field of a run")
        prompt, seed, steps = value.get("prompt"), value.get("seed"), value.get("steps")
        if not isinstance(prompt, str):
            raise BadRun("prompt", "is not text")
        if isinstance(seed, str) and seed.isascii() and seed.isdecimal():
            seed = int(seed)  # as the contract's own JSON writes it: a page's numbers hold 53 bits
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
            raise BadRun("seed", f"got {str(seed)[:40]!r}, expected a whole number from 0 to {MAX_SEED}")
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
            raise BadRun("steps", f"got {steps!r}, expected a whole number")
        try:
            edits = tuple(tl.edits_from_json(json.dumps(value.get("edits") or [])))
        except (ValueError, TypeError) as error:
            raise BadRun("edits", str(error)) from None
        only = value.get("only") or []
        if not isinstance(only, list) or not all(isinstance(name, str) for name in only):
            raise BadRun("only", 'is no list of features such as "up.0.1/202"')
        try:
            refs = tuple(_ref(name) for name in only)
        except ValueError as error:
            raise BadRun("only", str(error)) from None
        return cls(prompt, seed, steps, edits, bool(value.get("features")), refs, bool(value.get("previews")))

    def settings(self) -> dict[str, Any]:
        """What decides the picture, as JSON with the contract's own names."""
        return {
            "prompt": self.prompt,
            "seed": str(self.seed),
            "steps": self.steps,
            "edits": json.loads(tl.edits_to_json(self.edits)),
        }

    @property
    def key(self) -> str:
        """The same for two runs that make the same picture."""
        text = json.dumps(self.settings(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _ref(name: str) -> tl.FeatureRef:
    sae, slash, index = name.rpartition("/")
    if not slash or not index.isdecimal():
        raise ValueError(f'{name[:60]!r} names no feature; write "up.0.1/202"')
    return tl.feature(sae, int(index))


def pack(header: Mapping[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """A frame: the length of its header (uint32), the header as JSON, then the parts, each at a multiple of four bytes.

    The header says in `parts` where each part begins and how long it is, counted from the first one's beginning.
    """
    at, places, body = 0, [], bytearray()
    for part in parts:
        places.append([at, len(part)])
        body += part
        body += bytes(-len(body) % 4)
        at = len(body)
    text = json.dumps({**header, "parts": places}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 4) % 4)
    return struct.pack("<I", len(text)) + text + bytes(body)


def packed_features(block: tl.BlockFeatures) -> tuple[dict[str, Any], bytes]:
    """The features of one SAE at one step: what they are, and their columns.

    [n] rows (uint32), [n] indices (uint32), [n] values (float32), one after the other.
    """
    about = {
        "sae": block.sae,
        "step": block.steps[0],
        "height": block.height,
        "width": block.width,
        "size": block.d_sae,
        "count": len(block.values),
    }
    columns = block.rows.astype("<u4"), block.indices.astype("<u4"), block.values.astype("<f4")
    return about, b"".join(column.tobytes() for column in columns)


def error_json(error: Exception) -> dict[str, Any]:
    """An error as a page is told of it."""
    if isinstance(error, BadRun):
        violations = [{"field": error.field, "description": error.description}]
        return {"code": "INVALID_ARGUMENT", "message": str(error), "violations": violations}
    if isinstance(error, tl.TurboLensError):
        return {
            "code": error.code,
            "message": error.message,
            "violations": [dataclasses.asdict(violation) for violation in error.violations],
            "retryAfter": error.retry_after,
        }
    if isinstance(error, ValueError | TypeError):  # what the SDK refuses before it asks the server
        return {"code": "INVALID_ARGUMENT", "message": str(error), "violations": []}
    return {"code": "INTERNAL", "message": "the studio failed; its terminal says why", "violations": []}
