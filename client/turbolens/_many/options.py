"""The keyword arguments of `extract_many` and `generate_many`, beside those of each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from turbolens._many.progress import Show
from turbolens._run import ExtractOptions, GenerateOptions


class ManyOptions(TypedDict, total=False):
    """What is of the whole."""

    seeds: Sequence[int]
    column: str
    progress: Show
    overwrite: bool
    patience: float


class ExtractManyOptions(ManyOptions, ExtractOptions, total=False):
    """What `extract_many` takes beside prompts, output and form."""


class GenerateManyOptions(ManyOptions, GenerateOptions, total=False):
    """What `generate_many` takes beside prompts and output."""
