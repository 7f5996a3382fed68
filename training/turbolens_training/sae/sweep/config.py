"""Settings of `turbolens train sweep`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turbolens_training.activations.config import DataConfig
from turbolens_training.sae.config import ARCHITECTURES, ArchitectureName, SaeConfig
from turbolens_training.settings import counts_below_one, refuse


@dataclasses.dataclass(frozen=True)
class Point:
    """One place in the grid: an SAE for every hook point."""

    architecture: ArchitectureName
    k: int
    d_sae: int

    @classmethod
    def parse(cls, text: str) -> Point:
        """Read `ARCHITECTURE:K:D_SAE`.

        Raises:
            ValueError: it is none.
        """
        architecture, *numbers = text.split(":")
        if architecture not in ARCHITECTURES or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(
                f"points: {text!r}, expected ARCHITECTURE:K:D_SAE, with an architecture of {', '.join(ARCHITECTURES)}"
            )
        return cls(architecture, *map(int, numbers))

    @property
    def name(self) -> str:
        return f"{self.architecture}-k{self.k}-d{self.d_sae}"


@dataclasses.dataclass(frozen=True)
class SweepConfig(DataConfig):
    """Train a grid of SAEs on the same updates, and write one table of what each is worth as it is served.

    Pictures are made once, into the cache. Every point is trained, exported whatever its gates say (the table says it
    too) and measured on held-out data; one point of each architecture, the middle one, is also served over a socket and
    evaluated against the truth. What is done already in `--work` is not done again.
    """

    cache: Path = Path("runs/sweep/cache")
    """Folder that keeps the updates as float16, for all points."""
    points: tuple[str, ...] = (
        *(f"topk:{k}:{d_sae}" for k in (5, 10, 20) for d_sae in (128, 256, 512)),
        "batch-topk:10:256",
        "jumprelu:10:256",
        "matryoshka:10:256",
        "temporal:40:512",
    )
    """The grid, each `ARCHITECTURE:K:D_SAE`. A `matryoshka` has prefixes of a quarter and a half of its features."""
    work: Path = Path("runs/sweep")
    """Folder of checkpoints, bundles and results, by point."""
    out: Path = Path("runs/sweep/report")
    """Folder of the tables, the figure and the raw results."""
    steps: int = 800
    """Training steps of each point."""
    batch: int = 1024
    """Tokens of a step, for each block."""
    reservoir: int = SaeConfig.reservoir
    """Tokens in each block's shuffling reservoir. A temporal's tokens are of several updates each, so that it gets
    fewer of them, here, of pictures, and of held-out data."""
    served_pictures: int = 8
    """Held-out pictures whose features are asked for over a socket, and compared with the bundle's own."""
    splice_scenes: int = 64
    """Held-out scenes whose pictures are compared with reconstructions in the update's place."""
    probe_pictures: int = 512
    """Held-out pictures of the probes of single features."""

    def __post_init__(self) -> None:
        """Refuse what is no grid."""
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        of_data = list(super().problems())
        yield from of_data
        yield from counts_below_one(self, "served_pictures", "splice_scenes", "probe_pictures")
        if not self.points:
            yield "points: none"
        for text in self.points if not of_data else ():
            try:
                self.training(Point.parse(text))
            except ValueError as error:
                yield str(error)

    def grid(self) -> list[Point]:
        """The points, each once."""
        return list(dict.fromkeys(map(Point.parse, self.points)))

    def training(self, point: Point) -> SaeConfig:
        """How a point is trained.

        Raises:
            ValueError: it cannot be.
        """
        folder = self.work / point.name
        settings: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(DataConfig)}
        settings |= {"reservoir": self.reservoir, "steps_per_chunk": SaeConfig.steps_per_chunk}
        if point.architecture == "temporal":
            for name in ("one_step_share", "multi_steps"):
                del settings[name]
            for name in ("reservoir", "held_out_chunks"):
                settings[name] = max(1, settings[name] // SaeConfig.run_steps)
            settings["steps_per_chunk"] *= SaeConfig.run_steps
        return SaeConfig(
            **settings,
            architecture=point.architecture,
            k=point.k,
            d_sae=point.d_sae,
            steps=self.steps,
            batch=self.batch,
            out=folder / "bundles",
            work=folder,
            allow_below_gates=True,
            resume=True,
        )

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.cache, self.work, self.out)
