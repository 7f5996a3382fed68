"""Read the activations that the authors of arXiv 2410.22366 collect: WebDataset tars of pickled tensors.

Their script writes one tar for each block, named after its module (`unet.down_blocks.2.attentions.1.tar`) or after the
block (`down_2_1.tar`). A sample `sample_N` is one batch of prompts: `diff.pth` is the block's update, [B, steps,
d_model, h, w] float32 (older ones without steps), and `gen_args.json` says how the pictures were made. The pickles are
read as tensors only (`weights_only=True`): code in them is never run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.unet.points import find_point
from turbolens_training.activations.cache import CacheError, ShardCache, StoredUpdates

_BLOCK: Final = re.compile(r"(?:down|up)\.\d+\.\d+|mid\.\d+")
_HEAD: Final = 2**20
"""Bytes of a tar that, with its length, say whether it is the same one: some have terabytes."""


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
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise CacheError(f"{where}.diff.pth: not a plain tensor ({why})") from error
        if not isinstance(diff, Tensor) or diff.ndim not in (4, 5):
            raise CacheError(f"{where}.diff.pth: expected a tensor [B, steps, d_model, h, w]")
        if diff.ndim == 4:
            diff = diff[:, None]
        prompts, seeds = _pictures(where, files["gen_args.json"], len(diff))
        yield TarSample(key, prompts, seeds, tuple(diff.flatten(3).permute(1, 0, 3, 2)))


def import_tars(folder: Path, root: Path) -> ShardCache:
    """Make a cache of all blocks' tars in `folder`, or go on with one; sample n becomes shard n.

    Raises:
        CacheError: there is no tar, the tars disagree, or the cache cannot be written.
    """
    paths = {block: path for path in sorted(folder.glob("*.tar")) if (block := tar_block(path)) is not None}
    if not paths:
        raise CacheError(f"{folder}: no tar named after a block, as down_2_1.tar or unet.mid_block.attentions.0.tar")
    tars = {block: {"bytes": path.stat().st_size, "head": _head(path)} for block, path in paths.items()}
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
    return cache


def _timesteps(steps: int) -> tuple[int, ...]:
    """What SDXL Turbo's scheduler visits, with its trailing spacing."""
    return tuple(round(1000 - step * 1000 / steps) - 1 for step in range(steps))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of each sample; the files of one follow each other, as WebDataset has it."""
    key = ""
    files: dict[str, bytes] = {}
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


def _pictures(where: str, content: bytes, images: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Prompts and seeds of a sample's pictures."""
    try:
        arguments: Any = json.loads(content)
        prompts = tuple(str(prompt) for prompt in arguments["prompt"])
        seeds = tuple(int(seed) for seed in arguments.get("seed_per_sample", [arguments["seed"]] * images))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{where}.gen_args.json: no prompts and seed in it ({error!r})") from error
    if not len(prompts) == len(seeds) == images:
        raise CacheError(f"{where}: {len(prompts)} prompts and {len(seeds)} seeds for {images} pictures")
    return prompts, seeds


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(_HEAD)).hexdigest()
