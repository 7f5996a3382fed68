"""`turbolens attribute`."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

from tyro.conf import Positional

import turbolens as tl
from turbolens._files import write_whole
from turbolens._results import encoder_of
from turbolens.cli.server import Calls, rows_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribute(Calls):
    """Say which words, positions and heads made a feature fire: a feature at the z of an attention layer.

    Example: turbolens attribute "a big red star on the left" up.0.1.attn2.0.z/12 --seed 7 --out why.png
    """

    prompt: Positional[str]
    """What is drawn."""
    feature: Positional[str]
    """SAE/INDEX."""
    seed: int | None = None
    """Seed; left out: the server draws one."""
    steps: int | None = None
    """Denoising steps; left out: the server's default."""
    step: int | None = None
    """The step to look at, from 0; left out: the last."""
    at: str | None = None
    """ROW,COLUMN of the grid; left out: where the feature is active."""
    region: str | None = None
    """Box LEFT,TOP,RIGHT,BOTTOM in fractions of the picture, in place of --at."""
    leave_out: bool = False
    """Leave each word out of the prompt instead, a run for each, and say what the feature loses: through the whole
    model, and not at this layer alone."""
    limit: int = 12
    """At most so many rows."""
    out: Path | None = None
    """Picture of the table: bars, and where each word contributes."""

    def run(self) -> None:
        position, region = None, None
        if self.at is not None:
            row, column = _numbers("at", self.at, 2, "ROW,COLUMN")
            position = (int(row), int(column))
        if self.region is not None:
            region = tl.box(*_numbers("region", self.region, 4, "LEFT,TOP,RIGHT,BOTTOM"))
        if self.leave_out and self.out is not None:
            raise ValueError("--out draws where each word contributes, which leaving words out does not tell")
        with self.connect() as lens:
            given: dict[str, Any] = {"seed": self.seed, "step": self.step, "steps": self.steps}
            if self.leave_out:
                lost = lens.leave_out(self.prompt, self.feature, at=position, region=region, **given)
                shown = tl.Table(lost[: self.limit], ("word", "drop", "share"), lost.hint)
                self.show({"feature": self.feature, "words": rows_of(shown)}, str(shown))
                return
            found = lens.attribute(self.prompt, self.feature, **given)
        rows = found.sources(at=position, region=region)
        shown = tl.Table(rows[: self.limit], ("name", "contribution", "share"))
        if self.out is not None:
            picture = found.image(n=self.limit, at=position, region=region)
            coded = io.BytesIO()
            picture.save(coded, encoder_of(self.out.suffix.lower()))
            write_whole(self.out, coded.getvalue())
        told = {
            "feature": str(found.feature), "seed": found.seed, "step": found.step, "bias": found.bias,
            "sources": rows_of(shown), "heads": found.heads(at=position, region=region).tolist(),
        }  # fmt: skip
        self.show(told, f"{found!r}\n\n{shown}")


def _numbers(option: str, value: str, count: int, form: str) -> list[float]:
    parts = value.split(",")
    try:
        numbers = [float(part) if count > 2 else int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ValueError(f"--{option} {value}: write {form}")
    return numbers
