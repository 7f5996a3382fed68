"""Load a model and its SAEs into an engine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from turbolens_server.cuda_graphs import on_device
from turbolens_server.engine.batcher import MAX_BATCH
from turbolens_server.engine.decode import GraphedVae
from turbolens_server.engine.engine import Components, Engine, pipelined_on
from turbolens_server.engine.info import EngineInfo, SaeInfo
from turbolens_server.engine.sampler import UnsupportedScheduler, check_scheduler
from turbolens_server.engine.text import TextEncoder
from turbolens_server.files import hash_file
from turbolens_server.loading.compiled import cannot_compile, ensure_compiled
from turbolens_server.loading.device import describe, pick_device, pick_dtype, versions
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.gates import open_gates
from turbolens_server.loading.hashes import hash_components
from turbolens_server.loading.hub import config_folder, embedded_saes, file_of, resolve
from turbolens_server.loading.lora import Fused, fuse_loras
from turbolens_server.loading.memory import available_bytes, memory_need
from turbolens_server.loading.model import folder_of, read_pipeline
from turbolens_server.loading.places import EMBEDDED
from turbolens_server.loading.random_sdxl import is_random, random_bundles
from turbolens_server.loading.saes import fitting, load_saes
from turbolens_server.loading.schedulers import choose_scheduler, hash_with
from turbolens_server.loading.single_file import read_single_file
from turbolens_server.loading.vae import load_vae
from turbolens_server.logs import get_logger
from turbolens_server.unet.artifacts import ArtifactCache, default_cache
from turbolens_server.unet.attention_taps import with_attention_points
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.choose import open_backend
from turbolens_server.unet.graph import GraphSpec
from turbolens_server.unet.points import DEFAULT_HOOK_POINTS, HookPoint, list_points
from turbolens_server.unet.tapped import UnsupportedUNet, check_supported, find_hook_points

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

    Raises:
        LoadError: with one clear line.
    """
    start = time.monotonic()
    on = pick_device(device)
    precision = pick_dtype(dtype, on)
    available = available_bytes(on)
    parts = _read_parts(model, on, precision, variant, vae, loras, model_config)
    try:
        check_supported(parts.unet)
        sampler = choose_scheduler(parts.pipeline.scheduler, scheduler, timestep_spacing)
        able = check_scheduler(sampler, max_steps, timesteps)
    except (UnsupportedUNet, UnsupportedScheduler) as error:
        raise LoadError(f"{model}: {error}") from error
    if max_steps < len(timesteps):
        raise LoadError(f"--timesteps: {len(timesteps)} of them, and requests may have {max_steps}; raise --max-steps")
    embeds_guidance = parts.unet.config.time_cond_proj_dim is not None
    made_for_guidance = sampler.config.get("timestep_spacing") == "leading" and not timesteps and not embeds_guidance
    if made_for_guidance:
        get_logger().warning(
            "few steps from little noise",
            model=model,
            reason="timesteps are spaced as for models of many steps with guidance",
            way_out="if it is distilled, --timestep-spacing trailing; else --max-steps 50, and guidance in requests",
        )
    other = sampler is not parts.pipeline.scheduler
    components_hash = hash_with(parts.components_hash, sampler) if other else parts.components_hash
    points = with_attention_points(parts.unet, find_hook_points(parts.unet, parts.downscale))
    changed = "unet" in parts.fused.parts
    served = _open_saes(model, saes, points, parts.hash, fused=changed, force=force_sae, max_steps=max_steps)
    gates = None
    if gate is not None:
        if backend in ("onnx", "tensorrt"):  # now, and not when a graph was exported for minutes
            raise LoadError(f"--gate {gate}: the backend {backend} takes no gates; use --backend torch")
        width = parts.unet.config.cross_attention_dim
        gates = open_gates(gate, points, width, parts.hash, force=force_gate, fused=changed)
    tapped = _tapped_points(model, hook_points, served, points)
    edge = parts.edge(size)
    sizes = tuple(dict.fromkeys([(edge, edge), *map(parts.size, more_sizes)]))
    if backend == "tensorrt" and len(sizes) > 1:
        raise LoadError("--more-sizes: a TensorRT engine is built for one size; use another --backend")
    largest = max(sizes, key=math.prod)
    need = memory_need(
        unet=parts.unet,
        vae=parts.vae,
        texts=parts.encoders,
        saes=[sae.bundle.weights.tensors().values() for sae in served],
        gates=() if gates is None else gates.bundle.tensors().values(),
        dictionaries=[(math.prod(points[sae.hook_point].grid(*largest)), sae.bundle.d_sae) for sae in served],
        runs=[math.prod(points[s.hook_point].grid(*largest)) * s.bundle.d_in for s in served if s.bundle.steps],
        max_batch=max_batch,
        latent_size=(largest[0] // parts.downscale, largest[1] // parts.downscale),
        picture_size=largest,
        tokens=parts.pipeline.tokenizer.model_max_length,
        pipelined=pipelined_on(on),
        available=available,
    )
    if refusal := need.refusal(describe(on), f"a batch of {max_batch} at {largest[1]}x{largest[0]}"):
        raise LoadError(f"{model}: {refusal}")
    with on_device(on):
        text = TextEncoder(
            (parts.pipeline.tokenizer, parts.pipeline.tokenizer_2),
            (parts.encoders[0].to(on), parts.encoders[1].to(on)),
            on,
            zeros_for_nothing=bool(parts.pipeline.config.force_zeros_for_empty_prompt),
        )
        decoder = parts.vae.to(on)
        spec = GraphSpec.of(parts.unet, tapped, parts.downscale, text.max_tokens)
        latent = (edge // parts.downscale, edge // parts.downscale)
        artifacts = ArtifactCache(cache or default_cache())
        ahead = backend == "torch-compile" and cannot_compile(parts.unet, on) is None
        try:
            runner, reason, more = open_backend(
                "torch" if ahead else backend, parts.unet, spec, parts.hash, on, artifacts, latent
            )
        except BackendError as error:
            raise LoadError(f"--backend {backend}: {error}") from error
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
            backend=runner.name,
            backend_reason=reason,
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
            embedded_guidance=embedded_guidance if embeds_guidance else 1.0,
            takes_guidance=not embeds_guidance,
            takes_pictures=able.pictures,
            latent_channels=parts.unet.config.in_channels,
            vae_downscale=parts.downscale,
            made_for_guidance=made_for_guidance,
            region_strides=tuple(sorted({point.downscale for point in points.values()})) if runner.takes_bias else (),
            opens_attention=runner.takes_bias,  # both where the layers run as written, and not as a graph of old
            gate=gates,
            other_points=tuple(point for point in points.values() if point not in tapped),
        )
        pictures = GraphedVae(decoder, compiled=runner.name == "torch-compile") if on.type == "cuda" else decoder
        engine = Engine(Components(text, parts.unet, decoder, sampler, parts.downscale, pictures), runner, info, on)
        if ahead:
            try:
                engine.use(ensure_compiled(engine, artifacts, f"asked for: {backend}"))
            except BackendError as error:
                raise LoadError(f"--backend {backend}: {error}") from error
        return engine


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A model on the host, before anything is moved."""

    pipeline: Any
    unet: Any
    vae: Any
    """The one that serves: the pipeline's own or another."""
    encoders: tuple[Any, Any]
    downscale: int
    """Picture pixels for each pixel of a latent, each way."""
    hash: str
    components_hash: str
    fused: Fused

    def edge(self, size: int | None) -> int:
        """A picture's edge: the model's own, or one that the U-Net can halve as often as it does.

        Raises:
            LoadError: it cannot, or the exported graph would not take it.
        """
        if size is None:
            own = self.unet.config.sample_size
            own = own[0] if isinstance(own, list | tuple) and len({*own}) == 1 else own
            if not isinstance(own, int):
                raise LoadError(f"the U-Net says sample_size={own!r}, and pictures are square; give --size in pixels")
            return own * self.downscale
        if size % self._cell or size < 2 * self._cell:
            raise LoadError(f"--size {size}: must be a multiple of {self._cell}, from {2 * self._cell}")
        return size

    def size(self, text: str) -> tuple[int, int]:
        """A further size, (height, width), of "WIDTHxHEIGHT"; raises as `edge`."""
        width, _, height = text.partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise LoadError(f"--more-sizes {text}: write WIDTHxHEIGHT, such as 640x384")
        found = int(height), int(width)
        if any(edge % self._cell or edge < 2 * self._cell for edge in found):
            raise LoadError(f"--more-sizes {text}: must be multiples of {self._cell}, from {2 * self._cell}")
        return found

    @property
    def _cell(self) -> int:
        """What the U-Net can halve as often as it does."""
        return int(self.downscale * 2 ** (len(self.unet.config.block_out_channels) - 1))


def _read_parts(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None,
    vae: str | None,
    loras: Sequence[str],
    model_config: str | None,
) -> _Parts:
    file = file_of(model)
    vae_at = None if vae is None else file_of(vae) or resolve(vae, "--vae")
    folder: Path | None
    if file is None:
        if model_config is not None:
            raise LoadError(f"--model-config {model_config}: is for a --model that is one .safetensors file")
        folder = folder_of(model, variant)
        pipeline, unet_hash = read_pipeline(model, folder, device, dtype, variant)
    else:
        if variant is not None:
            raise LoadError(f"--variant {variant}: {file} is one file, which has no variants")
        folder = config_folder(model_config)
        pipeline, unet_hash = read_single_file(file, folder, dtype), hash_file(file)
    fused = fuse_loras(pipeline, loras)
    components = unet_hash if folder is None else hash_components(folder, variant, vae_at, file)
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        # A tokenizer that does not say has a limit beyond all bounds; the encoder reads no more than this.
        tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return _Parts(
        pipeline=pipeline,
        unet=pipeline.unet.eval(),
        vae=load_vae(vae_at, pipeline.vae, dtype).eval(),
        encoders=(pipeline.text_encoder.eval(), pipeline.text_encoder_2.eval()),
        downscale=pipeline.vae_scale_factor,
        hash=fused.rehash(unet_hash) if "unet" in fused.parts else unet_hash,
        components_hash=fused.rehash(components) if fused.parts - {"unet"} else components,
        fused=fused,
    )


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
