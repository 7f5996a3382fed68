"""Conversion of SAEs that other projects saved into bundles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from turbolens_server.files import first_line
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hashes import hash_unet
from turbolens_server.loading.hub import SAE_PATTERNS, model_folder, resolve, snapshot
from turbolens_server.sae.bundle import Bundle, BundleError, save_bundle
from turbolens_server.sae.formats.names import Format, check_name
from turbolens_server.sae.formats.read import find_saes, is_bundle, read_sae
from turbolens_server.unet.attention_taps import with_attention_points
from turbolens_server.unet.points import HookPoint, list_points, module_of
from turbolens_server.unet.tapped import find_hook_points


def convert(
    src: str,
    out: Path,
    *,
    block: str | None = None,
    name: str | None = None,
    format: Format = "auto",
    model: str | None = None,
    variant: str | None = None,
) -> Iterator[tuple[Bundle, Path]]:
    """Write a bundle for every SAE below `src`; all are read, and refused, before the first is written.

    Args:
        src: a folder or a hub id.
        out: new folder: the bundle, or where there are several, a bundle for each by its block.
        block: where the SAE sits; None: read off its configuration or its folder's name.
        name: what requests call the SAE; None: as its block.
        format: whose format it is.
        model: what it was trained on; its U-Net's hash goes into the bundle.
        variant: of the model's weight files.

    Yields:
        What was read, and the folder of its bundle.

    Raises:
        LoadError: `src` or `model` is no folder and no hub id that can be had.
        BundleError: an SAE cannot be converted, or `out` is not new.
    """
    if block is not None:
        try:
            module_of(block)
        except ValueError as error:
            raise BundleError(f"--block {error}") from error
    if out.exists():
        raise BundleError(f"{out} exists; name a new folder")
    root = resolve(src, "SRC", snapshot(SAE_PATTERNS))
    model_hash, points = None, {}
    if model is not None:
        at = model_folder(model, variant)
        model_hash, points = hash_unet(at, variant), _points(at)
    folders = find_saes(root)
    if not folders:
        raise BundleError(f"{src}: no SAE of a known format in {root}")
    if block is not None and len(folders) > 1:
        raise BundleError(f"--block {block}: {root} holds {len(folders)} SAEs; name one of their folders")
    if name is not None and len(folders) > 1:
        raise BundleError(f"--name {name}: {root} holds {len(folders)} SAEs; name one of their folders")
    if already := [folder for folder in folders if is_bundle(folder)]:
        raise BundleError(f"{already[0]} is a bundle already; serve it as it is")
    found = [read_sae(folder, block, format) for folder in folders]
    for bundle in found if model is not None else ():
        _check_fits(bundle, points, str(model))
    blocks = [bundle.hook_point for bundle in found]
    if doubled := sorted({at for at in blocks if blocks.count(at) > 1}):
        raise BundleError(
            f"{root} holds several SAEs for {', '.join(doubled)}; convert one folder at a time, each with a --name"
        )
    if name is not None:
        try:
            check_name(name, found[0].hook_point)
        except ValueError as error:
            raise BundleError(f"--name {error}") from error
    for bundle in found:
        folder = out / bundle.hook_point if len(found) > 1 else out
        save_bundle(
            folder,
            hook_point=bundle.hook_point,
            hook_module=module_of(bundle.hook_point),
            model_name=Path(model).name if model is not None else bundle.provenance["model_name"],
            model_hash=model_hash,
            architecture=bundle.architecture,
            k=bundle.k,
            weights=bundle.weights,
            stats=bundle.stats,
            name=name,
            nesting=bundle.nesting,
            provenance={
                **bundle.provenance,
                "source": root.name if Path(src).expanduser().is_dir() else src,
                "source_hash": bundle.hash,
            },
        )
        yield bundle, folder


def _points(model: Path) -> dict[str, HookPoint]:
    """Every hook point of a model, by its configuration alone."""
    try:
        with torch.device("meta"):  # shapes and no contents
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model / "unet"))
    except Exception as error:  # diffusers raises many kinds for what is no U-Net of its own
        raise LoadError(f"{model / 'unet'}: no U-Net of diffusers ({first_line(error)})") from error
    return with_attention_points(unet, find_hook_points(unet, 1))


def _check_fits(bundle: Bundle, points: Mapping[str, HookPoint], model: str) -> None:
    """Raise BundleError where a model has no such hook point, or one of another width."""
    point = points.get(bundle.hook_point)
    if point is None:
        raise BundleError(f"{bundle.folder}: {model} has no block {bundle.hook_point}; it has {list_points(points)}")
    if point.d_model != bundle.d_model:
        raise BundleError(
            f"{bundle.folder}: reads {bundle.d_model} dimensions, {bundle.hook_point} of {model} has {point.d_model}"
        )
