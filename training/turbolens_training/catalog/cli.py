"""`turbolens catalog`: what is known of the features of bundles."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from turbolens_server.catalog.config import ImportLabelsConfig
from turbolens_training.catalog.config import BuildConfig

Command = (
    Annotated[BuildConfig, tyro.conf.subcommand("build")]
    | Annotated[ImportLabelsConfig, tyro.conf.subcommand("import-labels")]
)


def main(argv: list[str]) -> None:
    """Entry point: one line and exit code 1 for what cannot be done."""
    command: Command = tyro.cli(Command, args=argv, prog="turbolens catalog", description=__doc__)
    # What runs is imported here: a command's help must not wait for torch.
    from turbolens_server.files import WriteError, check_writable
    from turbolens_server.loading.errors import LoadError

    try:
        match command:
            case BuildConfig():
                from turbolens_training.catalog.build import build

                check_writable(*command.writes)
                build(command)
            case ImportLabelsConfig():
                from turbolens_server.catalog.label_files import import_labels

                print(f"{import_labels(command)} labels of {command.source} for {command.sae}")
    except (LoadError, ValueError, WriteError) as error:
        sys.exit(f"turbolens catalog: {error}")
