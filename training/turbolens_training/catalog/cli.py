"""`turbolens catalog`: what is known of the features of bundles."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import tyro

from turbolens_server.catalog.config import ImportLabelsConfig
from turbolens_training.activations.places import missing, unwritable
from turbolens_training.catalog.config import BuildConfig

Command = (
    Annotated[BuildConfig, tyro.conf.subcommand("build")]
    | Annotated[ImportLabelsConfig, tyro.conf.subcommand("import-labels")]
)


def main(argv: list[str]) -> None:
    """Entry point: one line and exit code 1 for what cannot be done."""
    command: Command = tyro.cli(Command, args=argv, prog="turbolens catalog", description=__doc__)
    if isinstance(command, BuildConfig):
        lines = missing(model=command.model, saes=command.saes, prompts=command.prompts, words=command.words)
        lines += unwritable(command.writes)
    else:
        lines = missing(file=command.file, sae=command.sae)
    if lines:
        sys.exit("\n".join(f"turbolens catalog: {line}" for line in lines))
    # What runs is imported here: a command's help must not wait for torch.
    from turbolens_server.files import WriteError
    from turbolens_server.loading.errors import LoadError

    try:
        match command:
            case BuildConfig():
                from turbolens_training.catalog.build import build

                build(command)
            case ImportLabelsConfig():
                from turbolens_server.catalog.label_files import import_labels

                count = import_labels(command)
                told = {"bundle": str(command.sae), "labelled": count, "source": command.source}
                line = f"{count} labels of {command.source} for {command.sae}"
                print(json.dumps(told) if command.json else line)
    except (LoadError, ValueError, WriteError) as error:
        sys.exit(f"turbolens catalog: {error}")
