"""`turbolens features`: find and look up features."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

import turbolens as tl
from turbolens.cli.server import Calls, rows_of

_COLUMNS = ("ref", "label", "label_score", "frequency", "mean", "max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(Calls):
    """Find features by words.

    Example: turbolens features search blue --block up.0.1
    """

    words: Positional[str]
    """What the feature should stand for."""
    block: str | None = None
    """Only this SAE."""
    limit: int = 10
    """At most so many."""

    def run(self) -> None:
        with self.connect() as lens:
            found = lens.search_features(self.words, block=self.block, limit=self.limit)
        self.show(rows_of(found), found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class List(Calls):
    """List the features of an SAE.

    Example: turbolens features list up.0.1 --filter 'attribute = "color" AND frequency > 0.01' --limit 20
    """

    sae: Positional[str]
    """The SAE's name."""
    filter: str = ""
    """Comparisons joined by AND."""
    order_by: str = "label_score desc"
    """Fields with an optional "desc"."""
    limit: int = 50
    """At most so many."""

    def run(self) -> None:
        with self.connect() as lens:
            every = lens.list_features(self.sae, filter=self.filter, order_by=self.order_by)
            found = tl.Table(list(itertools.islice(every, self.limit)), _COLUMNS)
        self.show(rows_of(found), found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show(Calls):
    """Show what is known of one feature.

    Example: turbolens features show up.0.1/202
    """

    feature: Positional[str]
    """BLOCK/INDEX."""

    def run(self) -> None:
        with self.connect() as lens:
            feature = lens.get_feature(self.feature)
        tables = [tl.Table([feature], _COLUMNS)]
        if feature.labels:
            tables.append(tl.Table(feature.labels, ("attribute", "value", "region", "score")))
        if feature.examples:
            tables.append(tl.Table(feature.examples, ("activation", "y", "x", "step", "steps", "seed", "prompt")))
        direction = None if feature.direction is None else feature.direction.tolist()
        self.show(
            dataclasses.asdict(feature) | {"ref": str(feature.ref), "direction": direction},
            "\n\n".join(map(str, tables)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast(Calls):
    """Say which features tell two sets of prompts apart, with effect size and a p corrected for many tests.

    Example: turbolens features contrast night.txt day.txt --sae up.0.1
    """

    prompts: Positional[Path]
    """Prompts: .txt with one a line, .jsonl, .csv or .parquet."""
    others: Positional[Path]
    """What they are held against, likewise."""
    seed: UseAppendAction[tuple[int, ...]] = ()
    """Seed of every prompt; may be repeated; left out: 0."""
    sae: UseAppendAction[tuple[str, ...]] = ()
    """Only this SAE; may be repeated; left out: all."""
    steps: int | None = None
    """Denoising steps; left out: the server's default."""
    limit: int = 20
    """At most so many features."""

    def run(self) -> None:
        with self.connect() as lens:
            found = lens.contrast(
                self.prompts,
                self.others,
                seeds=self.seed or (0,),
                limit=self.limit,
                saes=self.sae or None,
                steps=self.steps,
            )
        self.show(rows_of(found), found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest(Calls):
    """List the features of the same SAE that are nearest to one.

    Example: turbolens features nearest up.0.1/202 --by co-firing
    """

    feature: Positional[str]
    """BLOCK/INDEX."""
    by: Literal["decoder", "co-firing"] = "decoder"
    """What makes them near: that they write alike, or that they fire together."""
    limit: int = 10
    """At most so many."""

    def run(self) -> None:
        with self.connect() as lens:
            found = lens.nearest_features(self.feature, limit=self.limit, by=self.by)
        self.show(rows_of(found), found)


FeatureCommands = Annotated[
    Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Nearest, tyro.conf.subcommand("nearest")]
    | Annotated[Contrast, tyro.conf.subcommand("contrast")]
    | Annotated[Show, tyro.conf.subcommand("show")],
    tyro.conf.subcommand("features", description="Find and look up features."),
]
