"""`turbolens admin`: SAEs of a server that serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import Positional

import turbolens as tl
from turbolens.cli.server import Calls, rows_of

_COLUMNS = ("name", "hook_point", "architecture", "d_sae", "k", "labels", "hash")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Change(Calls):
    """Commands that speak to a server's `admin_port`, which --server names."""

    timeout: float = 600.0
    """Seconds."""

    def told(self, saes: Sequence[tl.Sae]) -> None:
        """Print what is served now."""
        table = tl.Table(list(saes), _COLUMNS)
        self.show(rows_of(table), table)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load(_Change):
    """Serve more SAEs; requests that were sent before keep theirs.

    Example: turbolens admin load up.0.1=/models/an-sae --server localhost:50052
    """

    source: Positional[str]
    """As `--sae` of turbolens serve: a folder on the server's machine or a hub id, with NAME=, BLOCK= or NAME@BLOCK= in
    front where it should be called or sit otherwise."""
    force: bool = False
    """Serve them though they were trained on another model."""

    def run(self) -> None:
        with self.connect() as lens:
            self.told(lens.load_saes(self.source, force=self.force, timeout=self.timeout))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unload(_Change):
    """Serve an SAE no more.

    Example: turbolens admin unload up.0.1 --server localhost:50052
    """

    name: Positional[str]
    """The SAE's name."""

    def run(self) -> None:
        with self.connect() as lens:
            self.told(lens.unload_sae(self.name, timeout=self.timeout))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reload(_Change):
    """Read an SAE, its statistics and its labels again from where they came from.

    Example: turbolens admin reload up.0.1 --server localhost:50052
    """

    name: Positional[str]
    """The SAE's name."""

    def run(self) -> None:
        with self.connect() as lens:
            self.told(lens.reload_sae(self.name, timeout=self.timeout))


@dataclasses.dataclass(frozen=True, kw_only=True)
class List(_Change):
    """List the SAEs that are served.

    Example: turbolens admin list --server localhost:50052
    """

    def run(self) -> None:
        with self.connect() as lens:
            self.told(lens.model().saes)


AdminCommands = Annotated[
    Annotated[Load, tyro.conf.subcommand("load")]
    | Annotated[Unload, tyro.conf.subcommand("unload")]
    | Annotated[Reload, tyro.conf.subcommand("reload")]
    | Annotated[List, tyro.conf.subcommand("list")],
    tyro.conf.subcommand("admin", description="Change the SAEs of a server that serves."),
]
