"""Native code for an engine on a CPU: found in the cache, or made and kept there."""

from __future__ import annotations

import time

import torch

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.running import Running
from turbolens_server.logs import get_logger
from turbolens_server.unet.artifacts import ArtifactCache, Entry
from turbolens_server.unet.backend import BackendError, UNetBackend
from turbolens_server.unet.compiled import (
    CompiledDecoder,
    CompiledParts,
    CompiledUNet,
    compile_into,
    compiled_key,
    compiler_missing,
)
from turbolens_server.unet.graph import GraphSpec
from turbolens_server.unet.torch_unet import TorchUNet

_MOST_BYTES = 2**30
_COPIES = 5
"""Of the weights: one in the decoder's or each chain's packages, and what is written beside them on the way."""


def cannot_compile(unet: object, device: torch.device) -> str | None:
    """Why a U-Net is not compiled ahead for a device, in words; None where it is."""
    weights = list(unet.parameters())  # type: ignore[attr-defined]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if device.type != "cpu":
        return "it is compiled ahead for CPUs alone"
    if weights[0].dtype != torch.float32:
        return f"it is compiled ahead in float32, not in {str(weights[0].dtype).removeprefix('torch.')}"
    if unet.config.time_cond_proj_dim is not None:  # type: ignore[attr-defined]
        return "its U-Net takes guidance as an embedding"
    if size > _MOST_BYTES:
        return f"of a U-Net of {size / 2**30:.1f} GiB no gain is measured"
    return None


def find_compiled(engine: Engine, cache: ArtifactCache, reason: str) -> Running | None:
    """What runs an engine's model faster, from the cache; None where nothing fits. What is damaged is set aside."""
    spec, latent = _shape(engine)
    key = _key(engine, spec, latent)
    try:
        entry = cache.find("packages", key)
        return None if entry is None else _running(engine, entry, spec, latent, reason)
    except BackendError as error:
        get_logger().warning("compiled code set aside", why=str(error))
        cache.set_aside("packages", key)
        return None


def ensure_compiled(engine: Engine, cache: ArtifactCache, reason: str) -> Running:
    """The same; made where nothing fits, which takes minutes.

    Raises:
        BackendError: it cannot be made.
    """
    if (found := find_compiled(engine, cache, reason)) is not None:
        return found
    if (missing := compiler_missing()) is not None:
        raise BackendError(f"{missing}; install one, or use torch")
    spec, latent = _shape(engine)
    parts, log = engine.components, get_logger()
    weights = [*parts.unet.parameters(), *parts.vae.parameters()]
    log.info("compiling", model=engine.info.model, why="nothing in the cache fits; it takes minutes, once")
    began = time.monotonic()
    entry = cache.add(
        "packages",
        _key(engine, spec, latent),
        lambda folder: compile_into(
            folder, parts.unet, parts.vae, spec, latent, torch.get_num_threads(),
            lambda what: log.info("compiling", part=what, seconds=round(time.monotonic() - began)),
        ),
        needs_bytes=_COPIES * sum(weight.numel() * weight.element_size() for weight in weights),
        on_wait=lambda: log.info("compiling", why="another process compiles; waiting for it"),
    )  # fmt: skip
    return _running(engine, entry, spec, latent, reason)


def _running(engine: Engine, entry: Entry, spec: GraphSpec, latent: tuple[int, int], reason: str) -> Running:
    parts = CompiledParts.load(entry.folder)
    plain: UNetBackend = TorchUNet(engine.components.unet)
    unet = CompiledUNet(parts, plain, spec, latent)
    return Running(unet, CompiledDecoder(parts, engine.components.vae, latent), reason)


def _shape(engine: Engine) -> tuple[GraphSpec, tuple[int, int]]:
    """The spec of an engine's U-Net, and the (height, width) of its first size's latents."""
    info, parts = engine.info, engine.components
    spec = GraphSpec.of(parts.unet, info.hook_points, parts.vae_downscale, info.max_prompt_tokens)
    height, width = info.default_size
    return spec, (height // parts.vae_downscale, width // parts.vae_downscale)


def _key(engine: Engine, spec: GraphSpec, latent: tuple[int, int]) -> dict[str, object]:
    info = engine.info
    return compiled_key(spec, info.model_hash, info.components_hash, latent, torch.get_num_threads())
