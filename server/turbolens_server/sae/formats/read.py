"""Every folder of an SAE that is served: our bundles, and what other projects save, read by one reader each.

A reader gives the same features as its project's own formula, or refuses by name what weights cannot express; tests
hold each to that formula. Pickles are read as tensors and plain values only: code in them is never run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from turbolens_server.files import hash_file
from turbolens_server.sae.bundle import Bundle, BundleError, check_weights, load_bundle
from turbolens_server.sae.formats import (
    dictionary_learning,
    llamascopium,
    overcomplete,
    saelens,
    saev,
    sparsify,
    state_dict,
)
from turbolens_server.sae.formats.common import ForeignSae, read_json
from turbolens_server.sae.formats.names import Format
from turbolens_server.unet.points import find_point, point_of_folder

_READERS: Final[Mapping[str, Callable[[Path], ForeignSae]]] = {
    "sdxl-unbox": state_dict.read_sdxl_unbox,
    "openai": state_dict.read_openai,
    "sparsify": sparsify.read_sparsify,
    "dictionary_learning": dictionary_learning.read_dictionary_learning,
    "saelens": saelens.read_saelens,
    "llamascopium": llamascopium.read_llamascopium,
    "overcomplete": lambda folder: overcomplete.read_overcomplete(folder, state_dict.state_file(folder)),
    "saev": saev.read_saev,
}
_BY_WEIGHTS: Final = {
    saelens.WEIGHTS_FILE: "saelens",
    sparsify.WEIGHTS_FILE: "sparsify",
    dictionary_learning.WEIGHTS_FILE: "dictionary_learning",
    saev.WEIGHTS_FILE: "saev",
    **dict.fromkeys(state_dict.STATE_FILES, "sdxl-unbox"),
}


_VIT_PRISMA: Final = "weights.pt"
"""Known to be refused by its reason, and not as a folder without weights."""


def find_saes(root: Path) -> list[Path]:
    """Every folder at or below `root` that holds an SAE of some format, whole or not, in order of path.

    Links to folders are followed. A folder that is reached in several ways counts once, by its own name.

    Raises:
        BundleError: a link leads nowhere, or a folder cannot be read.
    """
    found: dict[Path, Path] = {}
    for folder in sorted(_folders(root, frozenset()), key=lambda path: (_through_link(root, path), path)):
        if any((folder / name).exists() for name in ("cfg.json", *_BY_WEIGHTS)) or _is_vit_prisma(folder):
            found.setdefault(folder.resolve(), folder)
    return sorted(found.values())


def _is_vit_prisma(folder: Path) -> bool:
    settings = folder / "config.json"
    return (folder / _VIT_PRISMA).is_file() and settings.is_file() and "normalize_activations" in read_json(settings)


def _folders(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """A folder and all below it, links to folders too; those that begin with a dot are not finished, or nobody's."""
    real = folder.resolve()
    if real in above:  # a link that leads back
        return
    yield folder
    try:
        for child in folder.iterdir():
            if child.is_symlink() and not child.exists():
                raise BundleError(f"{child}: a link that leads nowhere; remove it, or put back what it named")
            if child.is_dir() and not child.name.startswith("."):
                yield from _folders(child, above | {real})
    except OSError as error:
        raise BundleError(f"{folder}: cannot be read ({error.strerror})") from error


def _through_link(root: Path, folder: Path) -> bool:
    return folder.resolve() != root.resolve() / folder.relative_to(root)


def detect(folder: Path) -> str:
    """The format of a folder, by its files.

    Raises:
        BundleError: it holds the weights of no format, or of several.
    """
    found = [name for name in _BY_WEIGHTS if (folder / name).is_file()]
    if len(found) > 1:
        raise BundleError(f"{folder}: holds the weights of several SAEs ({', '.join(found)}); keep one of them")
    if not found and _is_vit_prisma(folder):
        raise BundleError(
            f"{folder / _VIT_PRISMA}: of vit-prisma, which normalises each input by its own mean and deviation "
            "(layer_norm, its default): not supported"
        )
    if not found:
        raise BundleError(f"{folder}: the weights are missing; formats keep them in {', '.join(_BY_WEIGHTS)}")
    kind = _BY_WEIGHTS[found[0]]
    if kind == "saelens" and llamascopium.is_llamascopium(folder):
        return "llamascopium"
    if kind != "sdxl-unbox":
        return kind
    # Three projects keep a state of that name; OpenAI's library writes no configuration beside it.
    settings = folder / "config.json"
    if not settings.is_file():
        return "openai"
    return "overcomplete" if overcomplete.CONFIG_KEY in read_json(settings) else kind


def is_bundle(folder: Path) -> bool:
    """Whether a folder is one of our own bundles: a SAELens folder with our entry in its metadata.

    Raises:
        BundleError: its cfg.json is unreadable.
    """
    if not (folder / saelens.WEIGHTS_FILE).is_file() or not (folder / "cfg.json").is_file():
        return False
    metadata = read_json(folder / "cfg.json").get("metadata")
    return isinstance(metadata, dict) and "turbolens" in metadata


def at_block(bundle: Bundle, hook_point: str) -> Bundle:
    """A bundle that sits elsewhere, under that block's name where it has its own block's."""
    name = hook_point if bundle.name == bundle.hook_point else bundle.name
    return dataclasses.replace(bundle, hook_point=hook_point, name=name)


def read_sae(folder: Path, hook_point: str | None = None, format: Format = "auto") -> Bundle:
    """Read the SAE of one folder.

    Args:
        folder: a bundle, or a folder of another project.
        hook_point: where it sits; None: read off its configuration, its folder's name, or a parent's.
        format: whose it is; "auto": by its files.

    Raises:
        BundleError: with one line that names the file and what is wrong.
    """
    if format == "auto" and is_bundle(folder):
        bundle = load_bundle(folder)
        return bundle if hook_point is None else at_block(bundle, hook_point)
    kind = detect(folder) if format == "auto" else format
    sae = _READERS[kind](folder)
    check_weights(sae.weights, str(sae.weights_file))
    d_sae = sae.weights.b_enc.shape[0]
    if sae.k is not None and sae.k > d_sae:
        raise BundleError(f"{folder}: k is {sae.k}, more than its {d_sae} features")
    block = hook_point or next(filter(None, map(find_point, sae.named)), None) or point_of_folder(folder)
    if block is None:
        raise BundleError(f"{folder}: neither its files nor its name say which block it is for; give the block's name")
    return Bundle(
        name=block,
        hook_point=block,
        architecture="turbolens-matryoshka" if sae.nesting and sae.nesting.k_max else sae.architecture,
        k=sae.k,
        weights=sae.weights,
        stats=sae.stats,
        hash=hash_file(sae.weights_file),
        model_hash=None,
        provenance={"format": kind, "model_name": sae.model_name, "folded": list(sae.folded), "config": sae.config},
        folder=folder,
        nesting=sae.nesting,
    )
