"""Load a model and its SAEs into an engine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from turbolens_server.cuda_graphs import on_device
from turbolens_server.engine.batcher import MAX_BATCH
from turbolens_server.engine.decode import GraphedVae
from turbolens_server.engine.engine import Components, Engine, pipelined_on
from turbolens_server.engine.info import EngineInfo, SaeInfo
from turbolens_server.engine.modules import Modules, Read
from turbolens_server.engine.running import Running
from turbolens_server.engine.text import Encode, Encoders, TextEncoder
from turbolens_server.engine.types import MAX_REGIONS
from turbolens_server.loading.compiled import Shape, cannot_compile, ensure_compiled, find_packages
from turbolens_server.loading.described import Model
from turbolens_server.loading.device import describe, pick_device, pick_dtype, versions
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.gates import open_gates
from turbolens_server.loading.hub import embedded_saes
from turbolens_server.loading.kept import find_kept, folder_of_kept, keep, place_of
from turbolens_server.loading.memory import Asked, available_bytes, memory_need, size_of
from turbolens_server.loading.places import EMBEDDED, is_random
from turbolens_server.loading.saes import fitting, load_saes
from turbolens_server.loading.schedulers import sampling
from turbolens_server.logs import get_logger, through_ours
from turbolens_server.unet.artifacts import ArtifactCache, default_cache
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.compiled import NAME, side_by_side
from turbolens_server.unet.points import DEFAULT_HOOK_POINTS, HookPoint, is_z, layer_of, list_points
from turbolens_server.unet.spec import GraphSpec

KEPT: Final = "auto: compiled for this CPU ahead of time, and kept in the cache"
"""Why compiled code runs that an earlier start has made."""
_TRAINED_STEPS: Final = 1
"""Steps of a request that does not say: what Turbo models are distilled for."""


def load_engine(
    *,
    model: str = EMBEDDED,
    device: str = "auto",
    dtype: str = "auto",
    variant: str | None = None,
    vae: str | None = None,
    saes: Sequence[str] | None = None,
    force_sae: bool = False,
    max_steps: int = 4,
    max_batch: int = MAX_BATCH,
    size: int | None = None,
    more_sizes: Sequence[str] = (),
    backend: str = "auto",
    onnx_regions: bool = False,
    cache: Path | None = None,
    hook_points: Sequence[str] = (),
    scheduler: str | None = None,
    timestep_spacing: str | None = None,
    timesteps: Sequence[int] = (),
    embedded_guidance: float = 8.0,
    loras: Sequence[str] = (),
    model_config: str | None = None,
    gate: str | None = None,
    force_gate: bool = False,
    ahead_of_modules: bool = False,
) -> Engine:
    """Load a model with its SAEs.

    Args:
        model: "mini", a `diffusers` folder, a hub id of an SDXL-type model, a checkpoint in one `.safetensors` file, or
            "random:sdxl-turbo" (or "random:mini"), which is the architecture with random weights.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "auto" (float16 on a GPU, else float32), "float32", "float16" or "bfloat16".
        variant: file variant to load, such as "fp16".
        vae: another VAE, by folder, hub id or `.safetensors` file: an `AutoencoderKL` or an `AutoencoderTiny`.
        saes: each a bundle, the folder of an SAE of another project, a folder of several, or a hub id; `BLOCK=` in
            front says where one sits whose folder does not, `NAME=` or `NAME@BLOCK=` what requests call it.
            None: the embedded model's own, a random model's, or none.
        force_sae: serve an SAE on a model that it was not trained on.
        max_steps: most denoising steps a request may ask for.
        max_batch: pictures that run together at most, for which there must be memory.
        size: edge of the pictures in pixels, which are square; None: the model's own.
        more_sizes: served beside it, each "WIDTHxHEIGHT".
        backend: "auto", "torch", "torch-compile", "onnx" or "tensorrt": what runs the U-Net.
        onnx_regions: with "onnx" in float32: take regions, by a second graph beside the first.
        cache: folder of exported graphs, TensorRT engines and compiled code; None: `default_cache()`.
        hook_points: where updates can be read beside the SAEs' own blocks; where none is named, the published four.
        scheduler: another than the model's, by its class in `diffusers`, such as "LCM".
        timestep_spacing: "leading", "linspace" or "trailing"; None: as the model says.
        timesteps: those of runs of as many steps, falling; they are also the steps of a request that does not say.
        embedded_guidance: guidance scale of a U-Net that takes it as an embedding.
        loras: each `PATH` or `PATH=WEIGHT`, fused into the model; SAEs of the model without them need `force_sae`.
        model_config: folder or hub id of a model of the same kind as one in a single file, whose configurations,
            scheduler and vocabularies it gets; None: SDXL base.
        gate: learned region gates, a folder or a hub id, or "mini", the embedded model's own; None: none.
        force_gate: serve gates on a model that they were not trained on.
        ahead_of_modules: with "auto" or "torch-compile" on a CPU: where the cache has compiled code, serve by it and by
            what is kept of the model, and read the model when something else is asked for.

    Raises:
        LoadError: with one clear line.
    """
    start = time.monotonic()
    on = pick_device(device)
    precision = pick_dtype(dtype, on)
    if onnx_regions and (backend, precision) != ("onnx", torch.float32):
        have = f"--backend {backend} in {str(precision).removeprefix('torch.')}"
        way_out = "--backend torch serves regions as it is"
        raise LoadError(f"--onnx-regions goes with --backend onnx --dtype float32, and this is {have}; {way_out}")
    available = available_bytes(on)
    artifacts = ArtifactCache(cache or default_cache())

    def read() -> Model:
        if ahead_of_modules:
            through_ours("transformers", "diffusers")
        from turbolens_server.loading.whole import read_model  # with all that its modules are made of

        hashes = None if place is None else (place.hash, place.components_hash)
        return read_model(model, on, precision, variant, vae, loras, model_config, hashes)

    place, found = None, None
    able_to = backend in ("auto", NAME) and on.type == "cpu" and precision == torch.float32
    as_it_is = {variant, vae, model_config, scheduler, timestep_spacing} == {None} and not loras
    if ahead_of_modules and able_to and as_it_is and (folder := folder_of_kept(model)) is not None:
        settings: dict[str, object] = {
            "max_batch": max_batch,
            "max_steps": max_steps,
            "size": size,
            "more_sizes": list(more_sizes),
            "gate": gate,
            "hook_points": list(hook_points),
            "saes": saes and list(saes),
        }
        place = place_of(artifacts.root, folder, settings)
        found = find_kept(place, folder, Modules(lambda: _told(read, model))) if place else None
    parts = found or read()
    sampled = sampling(model, parts, scheduler, timestep_spacing, timesteps, max_steps)
    sampler, able, components_hash = sampled.scheduler, sampled.abilities, sampled.components_hash
    points = parts.points
    changed = "unet" in parts.fused.parts
    served = _open_saes(model, saes, points, parts.hash, fused=changed, force=force_sae, max_steps=max_steps)
    gates, ahead_of_time = None, backend in ("onnx", "tensorrt")
    if gate is not None:
        if ahead_of_time:  # now, and not when a graph was exported for minutes
            raise LoadError(f"--gate {gate}: the backend {backend} takes no gates; use --backend torch")
        gates = open_gates(gate, points, parts.unet["cross_attention_dim"], parts.hash, force=force_gate, fused=changed)
    tapped = _tapped_points(model, hook_points, served, points)
    edge = parts.edge(size)
    sizes = tuple(dict.fromkeys([(edge, edge), *map(parts.size, more_sizes)]))
    if backend == "tensorrt" and len(sizes) > 1:
        raise LoadError("--more-sizes: a TensorRT engine is built for one size; use another --backend")
    largest = max(sizes, key=math.prod)
    tokens = parts.tokenizers[0].model_max_length
    latent = (edge // parts.downscale, edge // parts.downscale)
    counted = parts.count(
        max_batch=max_batch,
        latent_size=(largest[0] // parts.downscale, largest[1] // parts.downscale),
        picture_size=largest,
        tokens=tokens,
        asked=Asked(
            regions=0 if ahead_of_time and not onnx_regions else MAX_REGIONS,
            gates=None if gates is None else gates.gates,
            opened=frozenset(() if ahead_of_time else (layer_of(point.name) for point in tapped if is_z(point.name))),
        ),
    )
    if onnx_regions:
        second = sum(map(size_of, parts.modules.get().unet.parameters()))
        counted = dataclasses.replace(counted, weights=counted.weights + second)
    beside = side_by_side(max_batch, latent) if able_to else 1  # pictures of the first size, where it is compiled
    need = memory_need(
        counted,
        saes=[sae.bundle.weights.tensors().values() for sae in served],
        gates=() if gates is None else gates.gates.tensors(),
        dictionaries=[(math.prod(points[sae.hook_point].grid(*largest)), sae.bundle.d_sae) for sae in served],
        runs=[math.prod(points[s.hook_point].grid(*largest)) * s.bundle.d_in for s in served if s.bundle.steps],
        max_batch=max_batch,
        pipelined=pipelined_on(on),
        available=available,
        decoders=math.ceil(beside * edge**2 / math.prod(largest)),
    )
    if refusal := need.refusal(describe(on), f"a batch of {max_batch} at {largest[1]}x{largest[0]}"):
        raise LoadError(f"{model}: {refusal}")
    if place is not None and found is None:
        keep(place, parts, counted, max_steps)
    with on_device(on):
        spec = GraphSpec.of(parts.unet, tapped, parts.downscale, tokens)
        strides = tuple(sorted({point.downscale for point in points.values()}))
        shape = Shape(parts.hash, components_hash, spec, latent, parts.vae)
        ran: Running | None = None
        encode: Encode
        more: dict[str, str] = {}
        if found is not None:
            ran = find_packages(shape, parts.modules, artifacts, KEPT if backend == "auto" else f"asked for: {backend}")
        if ran is not None:
            to_compile = False
            encode = ran.text or Encoders(*parts.modules.get().encoders, on)
        else:
            modules = _moved(parts.modules.get(), on)
            encode = Encoders(*modules.encoders, on)
            to_compile = backend == "torch-compile" and cannot_compile(modules.unet, on) is None
            grids = tuple(stride // parts.downscale for stride in strides)
            hearing = dataclasses.replace(spec, hearing=grids) if onnx_regions else None
            ran, more = _run_modules(
                "torch" if to_compile else backend, modules, spec, parts.hash, on, artifacts, latent, hearing
            )
        text = TextEncoder(parts.tokenizers, encode, on, zeros_for_nothing=parts.zeros_for_nothing)
        info = EngineInfo(
            model=model,
            model_hash=parts.hash,
            components_hash=components_hash,
            hook_points=tapped,
            saes={sae.name: sae for sae in served},
            default_steps=len(timesteps) or _TRAINED_STEPS,
            max_steps=max_steps,
            default_size=(edge, edge),
            sizes=sizes,
            max_prompt_tokens=text.max_tokens,
            backend=ran.unet.name,
            backend_reason=ran.reason,
            device=describe(on),
            dtype=str(precision).removeprefix("torch."),
            versions=versions() | more,
            memory=need,
            load_s=time.monotonic() - start,
            scheduler=type(sampler).__name__,
            timestep_spacing=str(sampler.config.get("timestep_spacing", "")),
            timesteps=tuple(timesteps),
            takes_timesteps=able.timesteps,
            late_starts=able.late_starts,
            train_timesteps=int(sampler.config.num_train_timesteps),
            previews=able.previews,
            loras=parts.fused.loras,
            embedded_guidance=embedded_guidance if parts.embeds_guidance else 1.0,
            takes_guidance=not parts.embeds_guidance,
            takes_pictures=able.pictures,
            latent_channels=parts.unet["in_channels"],
            vae_downscale=parts.downscale,
            made_for_guidance=sampled.made_for_guidance,
            region_strides=strides if ran.unet.takes_bias else (),
            opens_attention=not ahead_of_time,
            gate=gates,
            other_points=tuple(point for point in points.values() if point not in tapped),
        )
        engine = Engine(
            Components(text, parts.modules, sampler, parts.downscale, points, ran.decoder), ran.unet, info, on
        )
        if to_compile:
            try:
                engine.use(ensure_compiled(engine, artifacts, f"asked for: {backend}"))
            except BackendError as error:
                raise LoadError(f"--backend {backend}: {error}") from error
        return engine


def _told(read: Callable[[], Model], model: str) -> Read:
    """The modules of a model that was served without them."""
    get_logger().info("reading the model", model=model, why="something is asked for that was not compiled")
    return read().modules.get()


def _moved(modules: Read, device: torch.device) -> Read:
    """All but the U-Net, which goes where its backend wants it, on the device."""
    modules.vae.to(device)
    for encoder in modules.encoders:
        encoder.to(device)
    return modules


def _run_modules(
    backend: str,
    modules: Read,
    spec: GraphSpec,
    model_hash: str,
    device: torch.device,
    cache: ArtifactCache,
    latent: tuple[int, int],
    hearing: GraphSpec | None,
) -> tuple[Running, dict[str, str]]:
    """What runs a model's modules, and versions of what it runs on; arguments as for `open_backend`."""
    from turbolens_server.unet.choose import open_backend  # with all backends

    try:
        runner, reason, more = open_backend(backend, modules.unet, spec, model_hash, device, cache, latent, hearing)
    except BackendError as error:
        raise LoadError(f"--backend {backend}: {error}") from error
    on_gpu, compiled = device.type == "cuda", runner.name == NAME
    return Running(runner, GraphedVae(modules.vae, compiled=compiled) if on_gpu else modules.vae, reason), more


def _open_saes(
    model: str,
    sources: Sequence[str] | None,
    points: Mapping[str, HookPoint],
    model_hash: str,
    *,
    fused: bool,
    force: bool,
    max_steps: int,
) -> list[SaeInfo]:
    """The SAEs to serve, in order of their blocks in the U-Net.

    Raises:
        LoadError: one of them does not fit the model, or two have one name.
    """
    if sources is None and is_random(model):
        from turbolens_server.loading.random_sdxl import random_bundles

        found = [SaeInfo(b.name, b.hook_point, b, forced=False) for b in random_bundles(model, points, model_hash)]
    else:
        named = [str(embedded_saes())] if sources is None and model == EMBEDDED else sources or ()
        found = [sae for source in named for sae in load_saes(source, points.keys(), model_hash, force, fused)]
    return fitting(found, points, max_steps)


def _tapped_points(
    model: str, asked: Sequence[str], saes: Sequence[SaeInfo], points: Mapping[str, HookPoint]
) -> tuple[HookPoint, ...]:
    """The hook points of the SAEs, and those asked for or the published four, in order of execution.

    Raises:
        LoadError: the model has no such hook point.
    """
    if unknown := [name for name in asked if name not in points]:
        raise LoadError(f"{model}: no hook point {', '.join(unknown)}; it has {list_points(points)}")
    published = [name for name in DEFAULT_HOOK_POINTS if name in points]
    used = {*(asked or published), *(sae.hook_point for sae in saes)}
    if not used:
        get_logger().warning(
            "no hook points", model=model, published=list(DEFAULT_HOOK_POINTS), has=list_points(points)
        )
    return tuple(point for name, point in points.items() if name in used)
