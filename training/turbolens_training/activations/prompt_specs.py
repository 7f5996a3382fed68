"""What `--prompts` names: the scene grammar, a file, or a dataset."""

from __future__ import annotations

import itertools

from turbolens_training.activations.config import SCENES
from turbolens_training.activations.dataset_prompts import dataset_column, open_dataset
from turbolens_training.activations.places import PromptError, place
from turbolens_training.activations.prompt_files import read_file
from turbolens_training.activations.prompts import Distinct, PromptList, PromptSource, ScenePrompts


def open_prompts(spec: str, *, seed: int) -> PromptSource:
    """The source that `--prompts` names.

    Args:
        spec: "scenes"; FILE (.txt, a prompt a line); FILE[:COLUMN] (.parquet, .csv, .jsonl); or FOLDER[:COLUMN] or
            OWNER/NAME[:COLUMN], a dataset read by Hugging Face `datasets`. Without a column, the only one with text.
        seed: of the order.

    Raises:
        PromptError: there is no such thing, or it cannot be read.
    """
    if spec == SCENES:
        return ScenePrompts()
    name, column, path = place(spec)
    if path is not None:
        return PromptList(read_file(path, column), seed=seed)
    return open_dataset(name, column, seed=seed)


def list_prompts(spec: str, most: int) -> tuple[list[str], str]:
    """The first distinct prompts of what `--prompts` names, in their own order, and in a line what was left out.

    Args:
        spec: as for :func:`open_prompts`, without the scenes.
        most: prompts, at most.

    Raises:
        PromptError: there is no such thing, it cannot be read, or holds no prompt.
    """
    name, column, path = place(spec)
    read = read_file(path, column) if path is not None else dataset_column(name, column)
    distinct = Distinct(read.rows)
    found = list(itertools.islice(distinct, most))
    if not found:
        raise PromptError(f"{read.name}: holds no prompt; left out: {distinct.left_out}")
    return found, f"{read.name}: {len(found):,} prompts taken; left out: {distinct.left_out}"
