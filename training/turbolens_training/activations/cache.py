"""A cache of updates on disk, for those who train on the same pictures more than once; `docs/activation-cache.md`.

One shard holds one chunk of a stream: raw float16 files that are mapped into memory, one for each hook point and step,
with the prompts and seeds beside them. A shard is written under another name, and gets its own when it is whole, so
that what is read was never half-written; any number of processes may write to one cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from turbolens_server.files import WriteError, first_line, hash_file, whole_folder, write_file
from turbolens_training.activations.stream import StepUpdates

VERSION: Final = 1
_MANIFEST: Final = "manifest.json"
_SHARDS: Final = "shards"
_SHARD_MANIFEST: Final = "shard.json"
_SIDECAR: Final = "pictures.parquet"
_SIDECAR_SCHEMA: Final = pa.schema(
    [
        ("image", pa.int32()),
        ("step", pa.int32()),
        ("timestep", pa.int32()),
        ("seed", pa.int64()),
        ("prompt", pa.string()),
    ]
)


class CacheError(ValueError):
    """A cache cannot be read or written; the text is one line that names the file."""


@dataclasses.dataclass(frozen=True)
class StoredUpdates:
    """The updates of one shard, mapped into memory."""

    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    timesteps: tuple[int, ...]
    """Of the T steps, falling."""
    by_block: dict[str, tuple[Tensor, ...]]
    """By hook point: T of [N, P, d_model] float16."""


class ShardCache:
    """One cache: shards by number, all made by one recipe."""

    def __init__(self, folder: Path) -> None:
        """Open a cache.

        Raises:
            CacheError: the folder is none, or of another version of the format.
        """
        self.folder = folder
        manifest = _read_json(folder / _MANIFEST)
        if manifest.get("version") != VERSION or manifest.get("format") != "turbolens-activations":
            raise CacheError(f"{folder / _MANIFEST}: not version {VERSION} of the cache's format")
        self.recipe: dict[str, Any] = manifest.get("recipe", {})
        self.key: str = manifest.get("key", "")
        if not isinstance(self.recipe, dict) or not isinstance(self.key, str):
            raise CacheError(f"{folder / _MANIFEST}: its recipe or key is of another form")

    @classmethod
    def create(cls, root: Path, recipe: Mapping[str, Any]) -> ShardCache:
        """The cache of a recipe below `root`, which is made where there is none yet.

        Args:
            root: a folder of caches.
            recipe: all that decides what shard n holds, as JSON's own types.
        """
        key = cache_key(recipe)
        folder = root / key
        if not (folder / _MANIFEST).exists():
            manifest = {"format": "turbolens-activations", "version": VERSION, "key": key, "recipe": dict(recipe)}
            try:
                (folder / _SHARDS).mkdir(parents=True, exist_ok=True)
                write_file(folder / _MANIFEST, json.dumps(manifest, indent=1))
            except WriteError as error:
                raise CacheError(str(error)) from error
            except OSError as error:
                raise CacheError(f"{folder}: cannot be written ({error.strerror})") from error
        return cls(folder)

    def shards(self) -> list[int]:
        """The numbers of the shards that are there, rising."""
        found = (path.name for path in (self.folder / _SHARDS).iterdir())
        return sorted(int(name) for name in found if name.isdigit())

    def __contains__(self, index: int) -> bool:
        return self._path(index).exists()

    def write(self, index: int, updates: StepUpdates) -> None:
        """Write shard `index`; where another process was faster, its shard stays.

        Raises:
            CacheError: a value is not finite in float16, or the disk is full or fails. No part of the shard stays.
        """
        try:
            with whole_folder(self._path(index)) as folder:
                self._write_files(folder, updates)
        except WriteError as error:
            raise CacheError(
                f"{error}; make room or use another cache folder, the shards before it are whole"
            ) from error

    def read(self, index: int) -> StoredUpdates:
        """Shard `index`, mapped into memory; its checksums are looked at by :meth:`problems` only.

        Raises:
            CacheError: it is not there, or a file of it is missing or of another length than when it was written.
        """
        folder = self._path(index)
        if index not in self:
            raise CacheError(f"{self.folder}: no shard {index}; it has {len(self.shards())}")
        try:
            return _read_shard(folder, _read_json(folder / _SHARD_MANIFEST))
        except (KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{folder / _SHARD_MANIFEST}: malformed ({error!r})") from error

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with the cache, a line each; every byte is read."""
        if cache_key(self.recipe) != self.key or self.folder.name != self.key:
            yield f"{self.folder}: its name, key and recipe do not agree"
        for path in sorted((self.folder / _SHARDS).iterdir()):
            if not path.name.isdigit():
                yield f"{path}: left by a writer that was cut off; nothing reads it, delete it"
                continue
            try:
                files = _read_json(path / _SHARD_MANIFEST)["files"]
                for name, entry in files.items():
                    if (path / name).exists() and hash_file(path / name) != entry["sha256"]:
                        yield f"{path / name}: the content is not what was written"
                self.read(int(path.name))
            except CacheError as error:
                yield str(error)
            except (KeyError, TypeError, AttributeError) as error:
                yield f"{path / _SHARD_MANIFEST}: malformed ({error!r})"

    def _path(self, index: int) -> Path:
        return self.folder / _SHARDS / f"{index:08d}"

    @staticmethod
    def _write_files(folder: Path, updates: StepUpdates) -> None:
        """Write the files of a shard, its manifest last."""
        files = {}
        for block, at_steps in updates.by_block.items():
            for step, update in enumerate(at_steps):
                half = update.to("cpu", torch.float16).contiguous()
                if not torch.isfinite(half).all():
                    most = update.abs().max().item()
                    raise CacheError(f"{block}, step {step}: the update reaches {most:.3g}; float16 ends at 65504")
                name = _file(block, step)
                files[name] = _write(folder / name, half.numpy().tobytes())
        rows = [
            {"image": image, "step": step, "timestep": timestep, "seed": seed, "prompt": caption}
            for step, timestep in enumerate(updates.timesteps)
            for image, (caption, seed) in enumerate(zip(updates.captions, updates.seeds, strict=True))
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SIDECAR_SCHEMA), sink)
        files[_SIDECAR] = _write(folder / _SIDECAR, sink.getvalue().to_pybytes())
        manifest = {
            "images": len(updates.captions),
            "timesteps": list(updates.timesteps),
            "blocks": {block: list(at_steps[0].shape[1:]) for block, at_steps in updates.by_block.items()},
            "files": files,
        }
        _write(folder / _SHARD_MANIFEST, json.dumps(manifest, indent=1).encode())


def cache_key(recipe: Mapping[str, Any]) -> str:
    """The name of the cache of a recipe: the SHA-256 of the format's version and the recipe, as sorted JSON."""
    text = json.dumps({"version": VERSION, "recipe": recipe}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def find_caches(path: Path) -> list[ShardCache]:
    """The cache at `path`, or those below it.

    Raises:
        CacheError: there is none.
    """
    folders = [path] if (path / _MANIFEST).exists() else sorted(found.parent for found in path.glob(f"*/{_MANIFEST}"))
    if not folders:
        raise CacheError(f"{path}: no activation cache here or one folder below ({_MANIFEST} is missing)")
    return [ShardCache(folder) for folder in folders]


def _read_shard(folder: Path, manifest: Mapping[str, Any]) -> StoredUpdates:
    for name, entry in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != entry["bytes"]:
            raise CacheError(f"{path}: {'missing' if size is None else f'{size} bytes'}, not {entry['bytes']}")
    try:
        rows = pq.read_table(folder / _SIDECAR, schema=_SIDECAR_SCHEMA).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CacheError(f"{folder / _SIDECAR}: cannot be read ({first_line(error)})") from error
    pictures = [row for row in rows if row["step"] == 0]
    timesteps = tuple(manifest["timesteps"])
    by_block = {
        block: tuple(_map(folder / _file(block, step), (manifest["images"], *shape)) for step in range(len(timesteps)))
        for block, shape in manifest["blocks"].items()
    }
    captions, seeds = tuple(row["prompt"] for row in pictures), tuple(row["seed"] for row in pictures)
    return StoredUpdates(captions, seeds, timesteps, by_block)


def _file(block: str, step: int) -> str:
    return f"{block}.{step}.f16"


def _map(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A raw float16 file as a tensor; what is written to the tensor never reaches the file."""
    size = torch.Size(shape).numel()
    if size * 2 != path.stat().st_size:
        raise CacheError(f"{path}: {path.stat().st_size} bytes are not {' x '.join(map(str, shape))} float16 values")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.float16).view(shape)


def _write(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file of a shard; returns its length and checksum."""
    path.write_bytes(content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CacheError(f"{path}: not an object")
    return content
