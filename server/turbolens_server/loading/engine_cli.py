"""`turbolens engine`: build TensorRT engines ahead of time, and look after the folder they are kept in."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import tyro

if TYPE_CHECKING:
    from turbolens_server.unet.artifacts import Entry
    from turbolens_server.unet.spec import GraphSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cached:
    cache: str = ""
    """Folder of exported graphs and engines; empty: ~/.cache/turbolens."""

    json: bool = False
    """Print JSON: a line for each thing told."""

    def tell(self, line: str, **told: Any) -> None:
        """Print for people or for programs, as asked."""
        print(json.dumps(told) if self.json else line, flush=True)

    def root(self) -> Path:
        """The folder."""
        from turbolens_server.unet.artifacts import default_cache

        return Path(self.cache).expanduser() if self.cache else default_cache()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build(_Cached):
    """Export the U-Net to ONNX, check it against PyTorch, and build a TensorRT engine from it.

    Give the model, SAEs and size that will be served: hook points and shapes are part of the engine. TensorRT builds
    for the GPU of this machine; TensorRT-RTX also without a GPU, for a --target.

    Example: turbolens engine build --model ./sdxl-turbo --sae ./sdxl-saes --target sm89 --batches 1 4 8
    """

    model: str = "mini"
    """As for `turbolens serve`."""
    sae: tuple[str, ...] = ()
    """As for `turbolens serve`."""
    force_sae: bool = False
    """As for `turbolens serve`."""
    variant: str | None = None
    """As for `turbolens serve`."""
    dtype: str = "float16"
    """Type of the graph: `float16` or `float32`."""
    target: str = ""
    """Compute capability to build for, such as `sm89`; empty: that of this machine's GPU."""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    """Batch sizes to build for; a batch between two runs as the larger."""
    size: int | None = None
    """As for `turbolens serve`; left out: the model's own."""

    def run(self) -> None:
        from turbolens_server.files import check_writable
        from turbolens_server.unet.artifacts import ArtifactCache
        from turbolens_server.unet.backend import BackendError
        from turbolens_server.unet.export import MAX_BATCH
        from turbolens_server.unet.tensorrt_api import current_target, find_tensorrt
        from turbolens_server.unet.tensorrt_build import Bucket, ensure_engine

        if not self.batches or not all(1 <= batch <= MAX_BATCH for batch in self.batches):
            raise ValueError(f"--batches {' '.join(map(str, self.batches))}: name one or more, from 1 to {MAX_BATCH}")
        tensorrt = find_tensorrt()
        if not (target := self.target or current_target()):
            raise BackendError("this machine has no GPU to build for; name a compute capability by --target")
        check_writable(self.root())
        # In a process of its own: the build takes several times the weights, and what a process once held in many
        # pieces it does not give back.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as exporter:
            graph, spec, shape, took = exporter.submit(_export, self).result()
        line = f"graph   {graph.folder}  {_size(graph.size)}  {took:.0f} s"
        self.tell(line, kind="graph", folder=str(graph.folder), bytes=graph.size, seconds=took)
        cache = ArtifactCache(self.root())
        start = time.monotonic()
        buckets = [Bucket(batch, *shape) for batch in self.batches]
        built = ensure_engine(cache, graph, spec, tensorrt, target, buckets, _waiting)
        took = time.monotonic() - start
        line = f"engine  {built.folder}  {_size(built.size)}  {took:.0f} s"
        self.tell(line, kind="engine", folder=str(built.folder), bytes=built.size, seconds=took)


def _waiting() -> None:
    print("waiting for the cache", file=sys.stderr)


def _export(build: Build) -> tuple[Entry, GraphSpec, tuple[int, int], float]:
    """The graph of the model to build for, its spec, the latent's height and width, and the seconds it took."""
    from turbolens_server.loading.load import load_engine
    from turbolens_server.unet.artifacts import ArtifactCache
    from turbolens_server.unet.export import ensure_graph
    from turbolens_server.unet.spec import GraphSpec

    engine = load_engine(
        model=build.model, device="cpu", dtype=build.dtype, variant=build.variant, saes=build.sae or None,
        force_sae=build.force_sae, size=build.size, backend="torch",
    )  # fmt: skip
    info, parts = engine.info, engine.components
    spec = GraphSpec.of(parts.unet.config, info.hook_points, parts.vae_downscale, info.max_prompt_tokens)
    height, width = info.default_size
    start = time.monotonic()
    graph = ensure_graph(ArtifactCache(build.root()), parts.unet, spec, info.model_hash)
    shape = height // parts.vae_downscale, width // parts.vae_downscale
    return graph, spec, shape, time.monotonic() - start


@dataclasses.dataclass(frozen=True, kw_only=True)
class List(_Cached):
    """List what the folder holds.

    Example: turbolens engine list
    """

    def run(self) -> None:
        from turbolens_server.unet.artifacts import ArtifactCache
        from turbolens_server.unet.backend import BackendError

        cache = ArtifactCache(self.root())
        for folder in cache.entries():
            try:
                entry = cache.verify(folder, contents=False)
            except BackendError as error:
                kind = folder.parent.name[:-1]
                self.tell(f"{kind:7} {folder.name}  damaged: {error}", kind=kind, name=folder.name, damaged=str(error))
                continue
            key = entry.key
            if entry.kind == "graphs":
                what = f"opset {key['opset']}, {key['dtype']}, model {key['model'][:12]}, {' '.join(key['points'])}"
            elif entry.kind == "packages":
                what = f"torch {key['torch']}, {key['cpu']}, {key['threads']} threads, model {key['model'][:12]}"
            else:
                shapes = " ".join("x".join(map(str, bucket)) for bucket in key["buckets"])
                graph = key["graph"]
                what = f"{key['tensorrt']} {key['version']}, {key['target']}, {graph['dtype']}, "
                what += f"model {graph['model'][:12]}, batch x latent {shapes}"
            line = f"{entry.kind[:-1]:7} {folder.name}  {_size(entry.size):>10}  {what}"
            self.tell(line, kind=entry.kind[:-1], name=folder.name, bytes=entry.size, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(_Cached):
    """Check every file in the folder against the hash it was written with.

    Example: turbolens engine verify
    """

    def run(self) -> None:
        from turbolens_server.unet.artifacts import ArtifactCache
        from turbolens_server.unet.backend import BackendError

        cache = ArtifactCache(self.root())
        damaged = 0
        for folder in cache.entries():
            try:
                whole = cache.verify(folder).folder
                self.tell(f"  ok  {whole}", folder=str(whole), state="ok")
            except BackendError as error:
                damaged += 1
                self.tell(f"fail  {error}", folder=str(folder), state="fail", why=str(error))
        if damaged:
            sys.exit(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(_Cached):
    """Remove what is damaged and what a killed build left.

    Example: turbolens engine prune
    """

    everything: bool = False
    """Remove whole entries too."""

    def run(self) -> None:
        from turbolens_server.unet.artifacts import ArtifactCache

        for folder in ArtifactCache(self.root()).prune(everything=self.everything):
            self.tell(f"removed {folder}", removed=str(folder))


Command = Annotated[
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Prune, tyro.conf.subcommand("prune")],
    tyro.conf.subcommand("engine"),
]
_PROG: Final = "turbolens engine"


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def main(argv: list[str]) -> None:
    """Entry point; what cannot be done is one line and exit code 1."""
    command: Build | List | Verify | Prune = tyro.cli(Command, args=argv, prog=_PROG)
    # Imported late: a command's help and a mistyped setting must not wait for torch.
    from turbolens_server.files import WriteError
    from turbolens_server.loading.errors import LoadError
    from turbolens_server.unet.backend import BackendError

    try:
        command.run()
    except (BackendError, LoadError, ValueError, WriteError) as error:
        sys.exit(f"{_PROG}: {error}")
