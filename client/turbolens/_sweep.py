"""One edit at many settings: a labelled grid of pictures and a table of what each moved."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from turbolens._compare import Comparison, compare
from turbolens._edits import Edit, Features, add, replace, scale, set_to, terms_of
from turbolens._results import Picture
from turbolens._table import Table

if TYPE_CHECKING:
    from PIL import Image

    from turbolens._async import AsyncLens

SweptKind = Literal["add", "scale", "set", "replace"]
_MAKE: Final[Mapping[str, Any]] = {"add": add, "scale": scale, "set": set_to, "replace": replace}
_GAP: Final = 4
_LINE: Final = 14
_MOST: Final = 4096


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Swept:
    """One picture of a sweep."""

    feature: str
    """Or several, joined by "+"."""
    strength: float
    steps: tuple[int, int] | None
    """At which the edit acts; None: at all."""
    seed: int
    picture: Picture
    change: Comparison
    """From the picture of the same seed without the edit."""

    def __repr__(self) -> str:
        return f"Swept({self.feature} at {self.strength:g}, steps {self.steps}, seed {self.seed}, {self.change!r})"


class Sweep(Table):
    """The pictures of a sweep as a table of what they moved; :meth:`grid` shows them."""

    def __init__(self, rows: Sequence[Swept], bases: Mapping[int, Picture]) -> None:
        columns = ("feature", "strength", "steps", "seed", "change.mean", "change.moved", "change.largest")
        super().__init__(rows, columns)
        self.bases = dict(bases)
        """By seed, the pictures without the edit."""

    def grid(self) -> Image.Image:
        """A row for each feature, range of steps and seed, a column for each strength, and first the plain picture."""
        from PIL import Image, ImageDraw, ImageFont

        lines: dict[tuple[str, tuple[int, int] | None, int], list[Swept]] = {}
        for row in self:
            lines.setdefault((row.feature, row.steps, row.seed), []).append(row)
        width, height = next(iter(self.bases.values())).image.size
        columns = 1 + max(map(len, lines.values()))
        sheet = Image.new(
            "RGB",
            (columns * (width + _GAP) + _GAP, len(lines) * (height + 2 * _LINE + _GAP) + _GAP),
            "white",
        )
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LINE - 3)
        for y, ((feature, steps, seed), rows) in enumerate(lines.items()):
            top = _GAP + y * (height + 2 * _LINE + _GAP)
            when = "" if steps is None else f", steps {steps[0]} to {steps[1] - 1}"
            draw.text((_GAP, top), f"{feature}{when}, seed {seed}", "black", font)
            shown = [("plain", self.bases[seed]), *((f"{row.strength:g}", row.picture) for row in rows)]
            for x, (caption, picture) in enumerate(shown):
                left = _GAP + x * (width + _GAP)
                draw.text((left, top + _LINE), caption, "black", font)
                sheet.paste(picture.image, (left, top + 2 * _LINE))
        return sheet

    def _repr_html_(self) -> str:
        import base64
        import io

        file = io.BytesIO()
        self.grid().save(file, "PNG")
        picture = base64.b64encode(file.getvalue()).decode()
        return f'<img src="data:image/png;base64,{picture}">{super()._repr_html_()}'


async def sweep(
    lens: AsyncLens,
    prompt: str,
    features: Sequence[Features],
    strengths: Sequence[float],
    kind: SweptKind,
    at: Sequence[tuple[int, int] | None],
    seeds: Sequence[int],
    edit: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Sweep:
    """See :meth:`Lens.sweep`."""
    if kind not in _MAKE:
        raise ValueError(f"kind {kind!r}; use one of {', '.join(_MAKE)}")
    settings = list(itertools.product(features, at, seeds, strengths))
    if not 0 < len(settings) <= _MOST:
        raise ValueError(f"{len(settings)} pictures; features, strengths, at and seeds make 1 to {_MOST}")
    before = list(options.get("steer", ()))
    rest = {name: value for name, value in options.items() if name != "steer"}

    async def one(seed: int, steer: Sequence[Edit]) -> Picture:
        return await lens.generate(prompt, seed=seed, steer=[*before, *steer], **rest)

    edits = [[_MAKE[kind](group, strength, steps=when, **edit)] for group, when, _, strength in settings]
    bases, made = await asyncio.gather(
        asyncio.gather(*(one(seed, ()) for seed in seeds)),
        asyncio.gather(*(one(seed, steer) for (_, _, seed, _), steer in zip(settings, edits, strict=True))),
    )
    plain = dict(zip(seeds, bases, strict=True))
    rows = [
        Swept(_name(group), strength, when, seed, picture, compare(plain[seed], picture))
        for (group, when, seed, strength), picture in zip(settings, made, strict=True)
    ]
    return Sweep(rows, plain)


def _name(group: Features) -> str:
    return " + ".join(str(ref) if weight in (None, 1) else f"{weight:g} {ref}" for ref, weight in terms_of(group))
