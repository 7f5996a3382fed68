"""Where what a command reads is: what can be said before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from turbolens_server.files import WriteError, check_writable
from turbolens_server.loading.places import EMBEDDED, nowhere
from turbolens_training.activations.config import SCENES


class PromptError(ValueError):
    """Prompts cannot be read; the text is one line that names the file and, where there is one, the line."""


def missing(
    *, model: str = EMBEDDED, saes: Path | tuple[str, ...] = (), prompts: str | None = None, **files: Path | None
) -> list[str]:
    """All that is neither here nor where it could be fetched from, a line each.

    Args:
        model: as `--model` says it.
        saes: the folder of bundles, or as `--sae` of the server says them.
        prompts: as `--prompts` says them.
        files: paths by setting.
    """
    local = {"saes": saes, **files} if isinstance(saes, Path) else files
    found = nowhere(model, () if isinstance(saes, Path) else saes)
    found += [f"--{name} {path}: no such file or folder" for name, path in local.items() if path and not path.exists()]
    if prompts is not None and prompts != SCENES:
        try:
            place(prompts)
        except PromptError as error:
            found.append(str(error))
    return found


def unwritable(folders: Iterable[Path]) -> list[str]:
    """Which folders for results can neither be written to nor made, a line each."""
    found = []
    for folder in folders:
        try:
            check_writable(folder)
        except WriteError as error:
            found.append(str(error))
    return found


def place(spec: str) -> tuple[str, str | None, Path | None]:
    """Name, column, and the file where it is one; None: a dataset.

    Raises:
        PromptError: there is no such thing.
    """
    name, column = _split_column(spec)
    path = Path(name).expanduser()
    if path.is_file():
        return name, column, path
    is_id = name.count("/") == 1 and not path.is_absolute() and not name.startswith((".", "~"))
    if not path.is_dir() and not is_id:
        raise PromptError(
            f"--prompts {spec}: no such file or folder, not {SCENES!r}, and not a dataset's id like owner/name"
        )
    return name, column, None


def _split_column(spec: str) -> tuple[str, str | None]:
    """ "captions.csv:text" -> ("captions.csv", "text"); a name that exists as it stands has no column."""
    name, colon, column = spec.rpartition(":")
    if not colon or Path(spec).expanduser().exists():
        return spec, None
    return name, column
