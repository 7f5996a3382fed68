"""`turbolens steer`: check, apply and compare steering files."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

import turbolens as tl
from turbolens._results import encoder_of, format_of
from turbolens.cli.server import Calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validate(Calls):
    """Say what a steering file holds, or where it is wrong; with --server, whether that server has what it names.

    Example: turbolens steer validate warm.yaml --server localhost:50051
    """

    file: Positional[Path]
    """A steering file, .json or .yaml."""

    def run(self) -> None:
        steering = tl.steering.load(self.file)
        if self.server is not None:
            with self.connect() as lens:
                # Features alone, none of which comes back: the server checks every field before any work.
                only = steering.edits[0].features[0][0] if steering.edits and steering.edits[0].features else None
                lens.extract(steering.prompt or "", seed=steering.seed or 0, **steering.options(), only=only)
        self.show(steering.to_plain(), "\n".join(steering.lines()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Apply(Calls):
    """Make a picture with a steering file.

    Example: turbolens steer apply warm.yaml "a big star on the left" --seed 7 --out warm.png
    """

    file: Positional[Path]
    """A steering file, .json or .yaml."""
    prompt: Positional[str] = ""
    """What to draw; left out: the file's own prompt."""
    seed: int | None = None
    """Left out: the file's own, else the server draws one and says which."""
    steps: int | None = None
    """Left out: the file's own, else the server's default."""
    out: Path = Path("picture.png")
    """File to write."""

    def run(self) -> None:
        steering = tl.steering.load(self.file)
        if (shape := format_of(self.out)) is None:
            encoder_of(self.out.suffix.lower())
        prompt = self.prompt or steering.prompt
        if prompt is None:
            raise ValueError(f"{self.file} has no prompt of its own; give one")
        options = steering.options() | ({} if self.steps is None else {"steps": self.steps})
        seed = steering.seed if self.seed is None else self.seed
        with self.connect() as lens:
            picture = lens.generate(prompt, seed=seed, format=shape or "png", **options)
        picture.save(self.out)
        self.show({"file": str(self.out), "seed": picture.seed}, f"{self.out}  seed {picture.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """Say what differs between two steering files; exit code 1 where something does, as of diff.

    Example: turbolens steer diff before.yaml after.json
    """

    before: Positional[Path]
    """A steering file."""
    after: Positional[Path]
    """Another."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        lines = tl.steering.diff(tl.steering.load(self.before), tl.steering.load(self.after))
        Calls(json=self.json).show(lines, "\n".join(lines) or "equal")
        if lines:
            sys.stdout.flush()
            sys.exit(1)


SteerCommands = Annotated[
    Annotated[Validate, tyro.conf.subcommand("validate")]
    | Annotated[Apply, tyro.conf.subcommand("apply")]
    | Annotated[Diff, tyro.conf.subcommand("diff")],
    tyro.conf.subcommand("steer", description="Check, apply and compare steering files."),
]
