"""Read the activations that the authors of arXiv 2410.22366 collect: WebDataset tars of pickled tensors.

Their script writes one tar for each block, named after its module (`unet.down_blocks.2.attentions.1.tar`) or after the
block (`down_2_1.tar`). A sample `sample_N` is one batch of prompts: `diff.pth` is the block's update, [B, steps,
d_model, h, w] float32 (older ones without steps), and `gen_args.json` says how the pictures were made. The pickles are
read as tensors only (`weights_only=True`): code in them is never run.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.files import first_line, hash_file
from turbolens_server.unet.points import find_point
from turbolens_training.activations.cache import CacheError, ShardCache, StoredUpdates

_BLOCK: Final = re.compile(r"(?:down|up)\.\d+\.\d+|mid\.\d+")
_STEPS: Final = 1000
"""Timesteps that SDXL Turbo was trained on: no run has more steps."""
_END: Final = bytes(1024)
"""What every whole tar ends with."""


@dataclasses.dataclass(frozen=True)
class TarSample:
    """One batch of pictures at one block."""

    key: str
    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    """One for each picture; the same for all where the batch was drawn from one generator."""
    updates: tuple[Tensor, ...]
    """T of [N, P, d_model], P positions in row order of the grid."""


def tar_block(path: Path) -> str | None:
    """The hook point that a tar is of, by its name; None: of none, as `images.tar`."""
    name = find_point(path.stem) or path.stem.replace("_", ".")
    return name if _BLOCK.fullmatch(name) else None


def read_tar(path: Path) -> Iterator[TarSample]:
    """The samples of one block's tar, in order.

    Raises:
        CacheError: the tar, or a sample in it, is not as their script writes it.
    """
    for key, files in _samples(path):
        where = f"{path}, {key}"
        missing = [name for name in ("diff.pth", "gen_args.json") if name not in files]
        if missing:
            raise CacheError(f"{where}: lacks {', '.join(missing)}")
        try:
            diff = torch.load(io.BytesIO(files["diff.pth"]), map_location="cpu", weights_only=True)
        except Exception as error:  # the reader of pickles raises many kinds
            raise CacheError(f"{where}.diff.pth: not a plain tensor ({first_line(error)})") from error
        if not isinstance(diff, Tensor) or diff.ndim not in (4, 5):
            raise CacheError(f"{where}.diff.pth: expected a tensor [B, steps, d_model, h, w]")
        if diff.ndim == 4:
            diff = diff[:, None]
        if not (diff.is_floating_point() and 1 <= diff.shape[1] <= _STEPS):
            raise CacheError(
                f"{where}.diff.pth: {diff.dtype} of {diff.shape[1]} steps, expected floats of 1 to {_STEPS}"
            )
        prompts, seeds = _pictures(where, files["gen_args.json"], len(diff))
        yield TarSample(key, prompts, seeds, tuple(diff.flatten(3).permute(1, 0, 3, 2)))


def import_tars(folder: Path, root: Path) -> ShardCache:
    """Make a cache of all blocks' tars in `folder`, or go on with one; sample n becomes shard n.

    The cache is known by all bytes of the tars, which are therefore read once more before the first shard.

    Raises:
        CacheError: there is no tar, the tars disagree, or the cache cannot be written.
    """
    paths: dict[str, Path] = {}
    for path in sorted(folder.glob("*.tar")):
        if (block := tar_block(path)) is None:
            continue
        if block in paths:
            raise CacheError(f"{path}: is of {block}, as {paths[block].name} is; leave one of them")
        paths[block] = path
    if not paths:
        raise CacheError(f"{folder}: no tar named after a block, as down_2_1.tar or unet.mid_block.attentions.0.tar")
    for path in paths.values():
        _check_end(path)
    hashed = tqdm(paths.items(), desc="hashing", unit="tar")
    tars = {block: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for block, path in hashed}
    cache = ShardCache.create(root, {"source": "sdxl-unbox", "tars": tars})
    readers = {block: read_tar(path) for block, path in paths.items()}
    for index, first in enumerate(tqdm(readers.pop(next(iter(readers))), desc="samples", unit="sample")):
        samples = {next(iter(paths)): first}
        for block, reader in readers.items():
            sample = next(reader, None)
            if sample is None or (sample.key, sample.captions) != (first.key, first.captions):
                raise CacheError(f"{paths[block]}: has no {first.key} of the same prompts where the other tars have it")
            samples[block] = sample
        if index not in cache:
            by_block = {block: sample.updates for block, sample in samples.items()}
            timesteps = _timesteps(len(first.updates))
            cache.write(index, StoredUpdates(first.captions, first.seeds, timesteps, by_block))
    for block, reader in readers.items():
        if (more := next(reader, None)) is not None:
            raise CacheError(f"{paths[block]}: has a {more.key} that {next(iter(paths.values())).name} lacks")
    return cache


def _timesteps(steps: int) -> tuple[int, ...]:
    """What SDXL Turbo's scheduler visits, with its trailing spacing."""
    return tuple(round(1000 - step * 1000 / steps) - 1 for step in range(steps))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of each sample; the files of one follow each other, as WebDataset has it."""
    key = ""
    files: dict[str, bytes] = {}
    _check_end(path)
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    continue
                stem, _, name = Path(member.name).name.partition(".")
                if stem != key and files:
                    yield key, files
                    files = {}
                key = stem
                files[name] = content.read()
    except (tarfile.TarError, OSError) as error:
        raise CacheError(f"{path}: cannot be read as a tar ({error})") from error
    if files:
        yield key, files


def _check_end(path: Path) -> None:
    """A tar that was cut off between two members reads as a shorter one, so its end is looked for."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_END)))
        if file.read() != _END:
            raise CacheError(f"{path}: cannot be read as a tar (it is cut off: its end is missing)")


def _pictures(where: str, content: bytes, images: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Prompts and seeds of a sample's pictures."""
    try:
        arguments: Any = json.loads(content)
        prompts, seeds = arguments["prompt"], arguments.get("seed_per_sample", [arguments["seed"]] * images)
        if not (isinstance(prompts, list) and isinstance(seeds, list)):
            raise TypeError("they are no lists")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{where}.gen_args.json: no prompts and seed in it ({error!r})") from error
    if not len(prompts) == len(seeds) == images:
        raise CacheError(f"{where}: {len(prompts)} prompts and {len(seeds)} seeds for {images} pictures")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise CacheError(f"{where}.gen_args.json: a prompt is {prompt!r}, expected text")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise CacheError(f"{where}.gen_args.json: a seed is {seed!r}, expected a whole number from 0 to 2^63 - 1")
    return tuple(prompts), tuple(seeds)
