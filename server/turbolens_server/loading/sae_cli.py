"""`turbolens sae`: SAEs of other projects as bundles of ours."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from tyro.conf import Positional

from turbolens_server.sae.formats.names import Format

if TYPE_CHECKING:
    from turbolens_server.sae.bundle import Bundle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Convert SAEs that another project saved into bundles.

    Serving does not need it: `turbolens serve --sae` reads the same folders. A bundle also says which model it is for,
    loads in SAELens, and has room for statistics, top examples and labels (`turbolens catalog`).

    Example: turbolens sae import surokpro2/sdxl-saes ./sdxl-saes --model stabilityai/sdxl-turbo --variant fp16
    """

    src: Positional[str]
    """A folder with one SAE or several below it, or a hub id."""
    out: Positional[Path]
    """New folder: the bundle, or where there are several SAEs, a bundle for each by its block."""
    block: str | None = None
    """Where the SAE sits, such as down.2.1; left out: read off its configuration or its folder's name."""
    name: str | None = None
    """What requests call the SAE; left out: as its block. Several of one block need a name each."""
    format: Format = "auto"
    """Whose format it is; left out: found by the names of the files."""
    model: str | None = None
    """Model it was trained on: `mini`, a `diffusers` folder or a hub id. The bundle is then refused on any other."""
    variant: str | None = None
    """Variant of the model's weight files that is served, such as `fp16`."""
    json: bool = False
    """Print JSON, a line for each bundle."""


def main(argv: list[str]) -> None:
    """Entry point: one line and exit code 1 for what cannot be converted."""
    config: Import = tyro.extras.subcommand_cli_from_dict(
        {"import": Import}, args=argv, prog="turbolens sae", description=__doc__
    )
    # Imported late: a command's help and a mistyped setting must not wait for torch.
    from turbolens_server.loading.convert import convert
    from turbolens_server.loading.errors import LoadError
    from turbolens_server.sae.bundle import BundleError

    try:
        settings = vars(config).copy()
        as_json = settings.pop("json")
        for bundle, folder in convert(**settings):
            print(json.dumps(_told(bundle, folder)) if as_json else _line(bundle, folder), flush=True)
    except (LoadError, BundleError, OSError) as error:
        sys.exit(f"turbolens sae import: {error}")


def _told(bundle: Bundle, folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder), "hook_point": bundle.hook_point, "k": bundle.k, "d_sae": bundle.d_sae,
        "d_in": bundle.d_in, "folded": list(bundle.provenance["folded"]), "statistics": bundle.stats is not None,
    }  # fmt: skip


def _line(bundle: Bundle, folder: Path) -> str:
    kind = f"TopK {bundle.k}" if bundle.k else "JumpReLU"
    folded = "".join(f"; folded: {what}" for what in bundle.provenance["folded"])
    stats = "" if bundle.stats else "; no statistics: turbolens catalog build measures them"
    return f"{folder}  {bundle.hook_point}, {kind}, {bundle.d_sae} features of {bundle.d_in}{folded}{stats}"
