"""`turbolens extract-many`, `generate-many` and `sweep`: many pictures of one kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional, UseAppendAction

import turbolens as tl
from turbolens._results import encoder_of
from turbolens.cli.pictures import Repeated
from turbolens.cli.server import Calls, rows_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Many(Calls):
    prompts: Positional[Path]
    """Prompts: .txt with one a line, .jsonl, .csv or .parquet; a row may have a seed of its own."""
    out: Positional[Path]
    """Where to write."""
    seed: UseAppendAction[tuple[int, ...]] = ()
    """Seed of every prompt; may be repeated; left out: 0."""
    column: str | None = None
    """Column of rows that is the prompt; left out: prompt."""
    steps: int | None = None
    """Denoising steps; left out: the server's default."""
    steering: Path | None = None
    """Steering file whose edits and references hold for every prompt."""
    overwrite: bool = False
    """Begin anew, whatever is there; otherwise a run that was cut short goes on where it was."""
    patience: float = 300.0
    """Seconds for which a server that is away or full is asked again."""

    def options(self) -> dict[str, Any]:
        """What both calls take."""
        steered = {} if self.steering is None else tl.steering.load(self.steering).options()
        given = {"column": self.column, "steps": self.steps, "seeds": self.seed or None}
        return steered | {k: v for k, v in given.items() if v is not None} | {
            "overwrite": self.overwrite, "patience": self.patience
        }  # fmt: skip

    def tell(self, report: tl.ManyReport) -> None:
        """What it came to."""
        rows = dataclasses.asdict(report) | {"out": str(report.out)}
        resumed = f", {report.resumed:,} of them before" if report.resumed else ""
        failed = f", {report.failed:,} failed" if report.failed else ""
        self.show(rows, f"{report.out}  {report.done:,} prompts{resumed}{failed}, {report.seconds:.1f} s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractMany(_Many):
    """Write the features of very many prompts into one Parquet table.

    Example: turbolens extract-many prompts.txt features.parquet --seed 1 --seed 2 --sae up.0.1
    """

    sae: Repeated = ()
    """Only this SAE; may be repeated; left out: all."""
    form: Literal["pooled", "full"] = "pooled"
    """Lists of each prompt's features with their means, or every activation."""

    def run(self) -> None:
        with self.connect() as lens:
            self.tell(
                lens.extract_many(self.prompts, self.out, form=self.form, saes=self.sae or None, **self.options())
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateMany(_Many):
    """Write the pictures of very many prompts into a folder, with a metadata.jsonl.

    Example: turbolens generate-many prompts.jsonl pictures --steps 2 --steering warm.yaml
    """

    format: Literal["png", "jpeg", "webp"] = "png"
    """Of the pictures."""

    def run(self) -> None:
        with self.connect() as lens:
            self.tell(lens.generate_many(self.prompts, self.out, format=self.format, **self.options()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Calls):
    """Make one picture at many strengths of many features: a labelled grid, and a table of what each moved.

    Example: turbolens sweep "a big red star, night background" --feature up.0.1/202 --strengths -4 4 8
    """

    prompt: Positional[str]
    """What to draw."""
    feature: Repeated
    """BLOCK/INDEX, or several joined by "+"; may be repeated."""
    strengths: tuple[float, ...]
    """Strengths, factors or values, as the kind has them."""
    kind: Literal["add", "scale", "set", "replace"] = "add"
    """What is done with them."""
    seed: UseAppendAction[tuple[int, ...]] = ()
    """Seed of a row of pictures; may be repeated; left out: 0."""
    steps: int | None = None
    """Denoising steps; left out: the server's default."""
    out: Path = Path("sweep.png")
    """File of the grid."""

    def run(self) -> None:
        encoder_of(self.out.suffix.lower())  # refused before pictures are made for nothing
        if not self.out.parent.is_dir():
            raise FileNotFoundError(f"--out {self.out}: no such folder")
        features = [name.split("+") for name in self.feature]
        with self.connect() as lens:
            swept = lens.sweep(
                self.prompt, features, self.strengths, kind=self.kind, seeds=self.seed or (0,), steps=self.steps
            )
        swept.grid().save(self.out)
        self.show({"file": str(self.out), "rows": rows_of(swept)}, f"{self.out}\n{swept}")
