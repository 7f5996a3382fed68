"""Results made again, and what differs then."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from turbolens._blocks import RunFeatures
from turbolens._edits import FeatureRef
from turbolens._model import Model
from turbolens._numbers import whole
from turbolens._png import read_text
from turbolens._provenance import Chosen, Provenance
from turbolens._results import PNG_PICTURE, Extraction, Picture
from turbolens._run import FORMATS, Call, ImageFormat

SCHEMA: Final = "turbolens.manifest/1"
"""Kind and version of a manifest."""
TOLERANCE: Final = 3
"""Of 255: what rounding in another batch moves a pixel by."""
_RELATIVE: Final = 0.02
"""The same of a feature's mean activation, as a share of the SAE's strongest."""
_KEPT: Final = 20
"""Features of each SAE that a manifest keeps the mean of."""
Verdict = Literal["equal", "equal within tolerance", "different", "refused"]
Kind = Literal["picture", "features"]


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """How one result was made, and what it was."""

    provenance: Provenance
    kind: Kind
    seed: int
    """Of the provenance's seeds, which ran together, this result's."""
    digest: str
    """SHA-256 of its pixels or activations."""
    format: ImageFormat = "png"
    quality: int | None = None
    strongest: Mapping[str, Mapping[int, float]] = dataclasses.field(default_factory=dict)
    """Of features: by SAE, the strongest ones' mean activation."""
    prompt_index: int = 0
    """Likewise of its prompts."""
    pixels: npt.NDArray[np.uint8] | None = dataclasses.field(default=None, compare=False)
    """Where the manifest is in its own picture."""

    def __post_init__(self) -> None:
        run = self.provenance.run
        if self.seed not in run.seeds or not 0 <= self.prompt_index < len(run.prompts):
            raise ValueError(f"its run has no picture of seed {self.seed} and prompt {self.prompt_index}")

    @property
    def place(self) -> int:
        """Its own among the run's results."""
        run = self.provenance.run
        return self.prompt_index * len(run.seeds) + run.seeds.index(self.seed)

    def call(self) -> Call:
        """What to ask for, to have it again: all prompts and seeds, as they ran."""
        run = self.provenance.run
        if self.kind == "picture":
            # How an SAE is read may be said of one in use alone, and of some the features were the only use: of those
            # one feature comes back.
            asked = () if run.features is None else run.features or (*run.k, *run.prefix)
            read = tuple(sae for sae in dict.fromkeys((*run.k, *run.prefix)) if sae in asked)
            only = tuple(FeatureRef(sae, 0) for sae in read)
            run = dataclasses.replace(run, features=read or None, only=only, float32=False)
        return Call(run=run, several=True, format=self.format, quality=self.quality)

    def to_json(self) -> str:
        """As the text of a file."""
        told = {
            "schema": SCHEMA, "kind": self.kind, "seed": str(self.seed), "prompt": self.prompt_index,
            "sha256": self.digest, "format": self.format, "quality": self.quality, "strongest": self.strongest,
            "provenance": json.loads(self.provenance.to_json()),
        }  # fmt: skip
        return json.dumps(told, indent=1) + "\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """What came of making a result again."""

    verdict: Verdict
    differs: tuple[str, ...]
    """What the server has otherwise: model, SAEs, LoRAs, versions, backend."""
    detail: str
    """How far the results are apart, or why the server refused."""
    made: Picture | Extraction | None
    """The new result; None where it was refused."""

    def __str__(self) -> str:
        return "\n  ".join([f"{self.verdict}{f' ({self.detail})' if self.detail else ''}", *self.differs])


def manifest(result: Picture | Extraction) -> Manifest:
    """How a result was made, to keep beside it and to give to `lens.replay`; a saved PNG holds its own.

    Raises:
        ValueError: it is a picture of a stream, which does not know that.
    """
    if result.provenance is None:
        raise ValueError("a picture of a stream does not know how it was made; its Done event does")
    if isinstance(result, Picture):
        return Manifest(
            result.provenance, "picture", result.seed, _of_pixels(result.array), result.format, result.quality,
            prompt_index=result.prompt_index,
        )  # fmt: skip
    strongest = {sae: _strongest(means) for sae, means in _means(result).items()}
    return Manifest(
        result.provenance, "features", result.seed, _of_features(result), strongest=strongest,
        prompt_index=result.prompt_index,
    )  # fmt: skip


def read_manifest(file: Path) -> Manifest:
    """The manifest of a file: a PNG that we saved, or the JSON that :meth:`Manifest.to_json` made.

    Raises:
        ValueError: it is neither.
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        is_png = opened.read(4) == b"\x89PNG"
    return _of_png(file) if is_png else _of_json(file)


def _of_png(file: Path) -> Manifest:
    from PIL import Image

    account = Provenance.from_png(file)
    about = json.loads(read_text(file, PNG_PICTURE) or "{}")
    if not about and account.run.results != 1:
        raise ValueError(f"{file}: one of {account.run.results} pictures, and does not say which")
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    seed = int(about.get("seed", account.run.seeds[0]))
    return Manifest(
        account, "picture", seed, _of_pixels(pixels), about.get("format", "png"), about.get("quality"),
        prompt_index=int(about.get("prompt", 0)), pixels=pixels,
    )  # fmt: skip


def _of_json(file: Path) -> Manifest:
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(told, dict) or told.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        if told["kind"] not in ("picture", "features") or told["format"] not in FORMATS:
            raise ValueError("its kind or format is none that this client knows")
        return Manifest(
            Provenance.from_json(json.dumps(told["provenance"])),
            told["kind"],
            whole(int(told["seed"]), "seed"),
            str(told["sha256"]),
            told["format"],
            told["quality"],
            {sae: {int(index): float(mean) for index, mean in of.items()} for sae, of in told["strongest"].items()},
            int(told.get("prompt", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: neither a PNG that TurboLens saved nor a manifest ({error})") from None


def otherwise(account: Provenance, model: Model, backend: str) -> tuple[str, ...]:
    """What a server has otherwise than a result was made with; `backend` is what runs there now, which may change."""
    saes = {sae.name: sae.hash for sae in model.saes}
    pairs: list[tuple[str, object, object]] = [
        ("model", account.model, model.name),
        ("the U-Net's weights", account.model_hash, model.hash),
        ("what draws beside it", account.components_hash, model.components_hash),
        ("LoRAs", _loras(account), _loras(model)),
        *((f"SAE {name}", hash, saes.get(name, "not served")) for name, hash in sorted(account.sae_hashes.items())),
        ("learned gates", account.gate_hash, account.gate_hash and (model.gate.hash if model.gate else "none")),
        *(
            (f"version of {name}", had, model.versions.get(name, "none"))
            for name, had in sorted(account.versions.items())
        ),
        ("backend", account.backend, backend),
        ("device", account.device, model.device),
        ("dtype", account.dtype, model.dtype),
    ]
    return tuple(f"{what}: {_short(had)} then, {_short(has)} now" for what, had, has in pairs if had != has)


def compare(before: Manifest, made: Picture | Extraction, differs: tuple[str, ...], tolerance: int) -> Replay:
    """Hold a result that was made again to the first one."""
    differs += _otherwise_chosen(before.provenance.chosen_for(before.seed, before.prompt_index), made.chosen)
    if isinstance(made, Picture):
        return _compare_pixels(before, made, differs, tolerance)
    if _of_features(made) == before.digest:
        return Replay("equal", differs, "", made)
    worst = 0.0
    means = _means(made)
    for sae, had in before.strongest.items():
        has = means.get(sae, {})
        top = max(had.values(), default=1.0) or 1.0
        worst = max([worst, *(abs(has.get(index, 0.0) - mean) / top for index, mean in had.items())])
    detail = f"the mean of a strong feature moved by up to {worst:.2%} of its SAE's strongest"
    return Replay("equal within tolerance" if worst <= _RELATIVE else "different", differs, detail, made)


def _otherwise_chosen(then: Sequence[Chosen], now: Sequence[Chosen]) -> tuple[str, ...]:
    told = []
    for a, b in zip(then, now, strict=False):
        if others := (a.given.keys() ^ b.given.keys()) | (a.taken.keys() ^ b.taken.keys()):
            told.append(f"features chosen for edit {a.edit}: {len(others)} that only one of the two runs has")
    return tuple(told)


def _compare_pixels(before: Manifest, made: Picture, differs: tuple[str, ...], tolerance: int) -> Replay:
    now = made.array
    if _of_pixels(now) == before.digest:
        return Replay("equal", differs, "", made)
    if before.pixels is None:
        return Replay("different", differs, "a manifest alone does not tell by how much; the PNG would", made)
    if now.shape != before.pixels.shape:
        return Replay("different", differs, f"{before.pixels.shape[:2]} then, {now.shape[:2]} now", made)
    apart = np.abs(now.astype(np.int16) - before.pixels)
    detail = f"largest difference {apart.max()} of 255, {(apart.max(axis=2) > 0).mean():.2%} of the pixels"
    return Replay("equal within tolerance" if apart.max() <= tolerance else "different", differs, detail, made)


def _loras(of: Provenance | Model) -> str:
    return ", ".join(f"{lora.name}={lora.weight:g} ({lora.hash[:12]})" for lora in of.loras) or "none"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text or "nothing"


def _of_pixels(pixels: npt.NDArray[np.uint8]) -> str:
    return hashlib.sha256(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _of_features(features: RunFeatures) -> str:
    digest = hashlib.sha256()
    for sae, block in sorted(features.items()):
        digest.update(f"{sae} {list(block.steps)} {block.height} {block.width} {block.d_sae}".encode())
        for column, kind in ((block.rows, "<i8"), (block.indices, "<i8"), (block.values, "<f4")):
            digest.update(np.ascontiguousarray(column, kind).tobytes())
    return digest.hexdigest()


def _means(features: RunFeatures) -> dict[str, dict[int, float]]:
    found = {}
    for sae, block in features.items():
        means = block.means()
        found[sae] = {int(i): float(means[i]) for i in np.flatnonzero(means)}
    return found


def _strongest(means: Mapping[int, float]) -> dict[int, float]:
    return dict(sorted(means.items(), key=lambda pair: -pair[1])[:_KEPT])
