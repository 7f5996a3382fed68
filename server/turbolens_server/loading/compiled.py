"""Native code for a model on a CPU: found in the cache, or made and kept there."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from turbolens_server.engine import text
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.modules import Modules
from turbolens_server.engine.running import Running
from turbolens_server.engine.text import Encoders
from turbolens_server.loading.memory import size_of
from turbolens_server.logs import get_logger
from turbolens_server.unet.artifacts import ArtifactCache, Entry
from turbolens_server.unet.backend import BackendError, UNetBackend
from turbolens_server.unet.compiled import (
    CompiledDecoder,
    CompiledParts,
    CompiledText,
    CompiledUNet,
    compiled_key,
    compiler_missing,
)
from turbolens_server.unet.spec import GraphSpec

_MOST_BYTES = 2**30
_COPIES = 5
"""Of the weights: one in the decoder's or each chain's packages, and what is written beside them on the way."""


def cannot_compile(unet: object, device: torch.device) -> str | None:
    """Why a model is not compiled ahead for a device, by its U-Net, in words; None where it is."""
    weights = list(unet.parameters())  # type: ignore[attr-defined]
    size = sum(map(size_of, weights))
    if device.type != "cpu":
        return "it is compiled ahead for CPUs alone"
    if weights[0].dtype != torch.float32:
        return f"it is compiled ahead in float32, not in {str(weights[0].dtype).removeprefix('torch.')}"
    if unet.config.time_cond_proj_dim is not None:  # type: ignore[attr-defined]
        return "its U-Net takes guidance as an embedding"
    if size > _MOST_BYTES:
        return f"of a U-Net of {size / 2**30:.1f} GiB no gain is measured"
    return None


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that decides what a model's packages are, beside this machine."""

    model: str
    """Hash of the U-Net's weights."""
    components: str
    """Of all else that draws."""
    spec: GraphSpec
    latent: tuple[int, int]
    """(height, width) of the first size's latents."""
    vae: Any
    """The VAE's configuration."""

    @classmethod
    def of(cls, engine: Engine) -> Shape:
        """That of an engine's model."""
        info, parts = engine.info, engine.components
        spec = GraphSpec.of(parts.unet.config, info.hook_points, parts.vae_downscale, info.max_prompt_tokens)
        height, width = info.default_size
        latent = (height // parts.vae_downscale, width // parts.vae_downscale)
        return cls(info.model_hash, info.components_hash, spec, latent, parts.vae.config)

    @property
    def key(self) -> dict[str, Any]:
        """Of the entry in the cache."""
        key = compiled_key(self.spec, self.model, self.components, self.latent, torch.get_num_threads())
        return key | {"text": hashlib.sha256(Path(str(text.__file__)).read_bytes()).hexdigest()}


def find_packages(shape: Shape, modules: Modules, cache: ArtifactCache, reason: str) -> Running | None:
    """What runs a model faster, from the cache; None where nothing fits. What is damaged is set aside.

    Args:
        shape: of the model.
        modules: of it, asked for what was not compiled.
        cache: to look in.
        reason: why it is these.
    """
    try:
        entry = cache.find("packages", shape.key)
        return None if entry is None else _running(shape, modules, entry, reason)
    except BackendError as error:
        get_logger().warning("compiled code set aside", why=str(error))
        cache.set_aside("packages", shape.key)
        return None


def find_compiled(engine: Engine, cache: ArtifactCache, reason: str) -> Running | None:
    """The same for an engine's model."""
    return find_packages(Shape.of(engine), engine.components.modules, cache, reason)


def ensure_compiled(engine: Engine, cache: ArtifactCache, reason: str) -> Running:
    """The same; made where nothing fits, which takes minutes.

    Raises:
        BackendError: it cannot be made.
    """
    shape, modules = Shape.of(engine), engine.components.modules
    if (found := find_packages(shape, modules, cache, reason)) is not None:
        return found
    if (missing := compiler_missing()) is not None:
        raise BackendError(f"{missing}; install one, or use torch")
    from turbolens_server.unet.compiling import compile_into  # with all of inductor

    read, log = modules.get(), get_logger()
    weights = [*read.unet.parameters(), *read.vae.parameters()]
    texts = Encoders(*read.encoders, engine.device)
    encoders = texts if sum(map(size_of, texts.parameters())) <= _MOST_BYTES else None
    if encoders is not None:
        weights += encoders.parameters()
    log.info("compiling", model=engine.info.model, why="nothing in the cache fits; it takes minutes, once")
    began = time.monotonic()
    entry = cache.add(
        "packages",
        shape.key,
        lambda folder: compile_into(
            folder, encoders, read.unet, read.vae, shape.spec, shape.latent, torch.get_num_threads(),
            lambda what: log.info("compiling", part=what, seconds=round(time.monotonic() - began)),
        ),
        needs_bytes=_COPIES * sum(map(size_of, weights)),
        on_wait=lambda: log.info("compiling", why="another process compiles; waiting for it"),
    )  # fmt: skip
    return _running(shape, modules, entry, reason)


def _running(shape: Shape, modules: Modules, entry: Entry, reason: str) -> Running:
    parts = CompiledParts.load(entry.folder)

    def plain() -> UNetBackend:
        from turbolens_server.unet.torch_unet import TorchUNet  # with the modules that it walks

        return TorchUNet(modules.get().unet)

    def encoders() -> Encoders:
        return Encoders(*modules.get().encoders, torch.device("cpu"))

    unet = CompiledUNet(parts, plain, shape.spec, shape.latent)
    decoder = CompiledDecoder(parts, lambda: modules.get().vae, shape.vae, shape.latent)
    text_encoders = CompiledText(parts, encoders, shape.spec) if parts.text else None
    return Running(unet, decoder, reason, text_encoders, parts.pick)
