"""Load a model and its SAEs into an engine."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline
from huggingface_hub import snapshot_download

from turbolens_server.cuda_graphs import on_device
from turbolens_server.engine.batcher import MAX_BATCH
from turbolens_server.engine.decode import GraphedVae
from turbolens_server.engine.engine import Components, Engine, EngineInfo, SaeInfo, pipelined_on
from turbolens_server.engine.half_vae import UnknownDecoder, scale_stream
from turbolens_server.engine.memory import available_bytes, memory_need
from turbolens_server.engine.sampler import UnsupportedScheduler, check_scheduler
from turbolens_server.engine.text import TextEncoder
from turbolens_server.models.random_sdxl import is_random, random_bundles, random_pipeline
from turbolens_server.sae.bundle import hash_file, hash_files
from turbolens_server.sae.formats.names import check_name, find_block
from turbolens_server.sae.formats.read import find_saes, read_sae
from turbolens_server.unet.artifacts import ArtifactCache, default_cache
from turbolens_server.unet.attention_taps import list_points, with_attention_points
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.choose import open_backend
from turbolens_server.unet.graph import GraphSpec
from turbolens_server.unet.tapped import DEFAULT_HOOK_POINTS, UnsupportedUNet, check_supported, find_hook_points

EMBEDDED: Final = "mini"
"""The name of the model that ships with the package."""
_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STEMS: Final = {"text_encoder": "model", "text_encoder_2": "model", "vae": "diffusion_pytorch_model"}
"""What the weight files of a part are called, beside the U-Net's."""
_FILE_PATTERNS: Final = ("*.json", "*.txt", "*.safetensors", "*.model")
SAE_PATTERNS: Final = (
    "*.json",
    "*.parquet",
    "*.safetensors",
    "*state_dict.pth",
    "*state_dict.pt",
    "*ae.pt",
    "*mean.pt",
)
"""Files of SAE folders of every format."""


class LoadError(RuntimeError):
    """A model or SAE cannot be served; the text is one line that says why and what to do."""


def embedded_model() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("turbolens_server.models").joinpath("mini")))


def embedded_saes() -> Path:
    """Folder of the embedded model's SAE bundles."""
    return Path(str(files("turbolens_server.models").joinpath("mini-saes")))


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
    backend: str = "auto",
    cache: Path | None = None,
    hook_points: Sequence[str] = (),
) -> Engine:
    """Load a model with its SAEs.

    Args:
        model: "mini", a `diffusers` folder, a hub id of an SDXL-type model, or "random:sdxl-turbo" (or "random:mini"),
            which is the architecture with random weights.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "auto" (float16 on a GPU, else float32), "float32", "float16" or "bfloat16".
        variant: file variant to load, such as "fp16".
        vae: another VAE, by folder or hub id: an `AutoencoderKL` or an `AutoencoderTiny`.
        saes: each a bundle, the folder of an SAE of another project, a folder of several, or a hub id; `BLOCK=` in
            front says where one sits whose folder does not, `NAME=` or `NAME@BLOCK=` what requests call it.
            None: the embedded model's own, a random model's, or none.
        force_sae: serve an SAE on a model that it was not trained on.
        max_steps: most denoising steps a request may ask for.
        max_batch: pictures that run together at most, for which there must be memory.
        size: edge of the pictures in pixels, which are square; None: the model's own.
        backend: "auto", "torch", "torch-compile", "onnx" or "tensorrt": what runs the U-Net.
        cache: folder of exported graphs and TensorRT engines; None: `default_cache()`.
        hook_points: where updates can be read beside the SAEs' own blocks; where none is named, the published four.

    Raises:
        LoadError: with one clear line.
    """
    start = time.monotonic()
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    available = available_bytes(torch_device)
    folder = _folder_of(model, variant)
    vae_folder = None if vae is None else resolve(vae, "--vae")
    pipeline, model_hash = _read_pipeline(model, folder, torch_device, torch_dtype, variant)
    components_hash = model_hash if folder is None else hash_components(folder, variant, vae_folder)
    unet = pipeline.unet.eval()
    try:
        check_supported(unet)
        check_scheduler(pipeline.scheduler, max_steps)
    except (UnsupportedUNet, UnsupportedScheduler) as error:
        raise LoadError(f"{model}: {error}") from error
    decoder = _vae(vae_folder, pipeline.vae, torch_dtype).eval()
    downscale = pipeline.vae_scale_factor
    encoders = (pipeline.text_encoder.eval(), pipeline.text_encoder_2.eval())
    points = with_attention_points(unet, find_hook_points(unet, downscale))
    sources = [str(embedded_saes())] if saes is None and model == EMBEDDED else list(saes or ())
    loaded = [sae for source in sources for sae in _load_saes(source, points.keys(), model_hash, force_sae)]
    if saes is None and is_random(model):
        loaded = [SaeInfo(b.name, b.hook_point, b, forced=False) for b in random_bundles(model, points, model_hash)]
    for sae in loaded:
        d_model = points[sae.hook_point].d_model
        if sae.bundle.d_model != d_model:
            raise LoadError(f"SAE {sae.name}: reads {sae.bundle.d_model} dimensions, {sae.hook_point} has {d_model}")
        if (sae.bundle.steps or 1) > max_steps:
            raise LoadError(
                f"SAE {sae.name}: serves runs of {sae.bundle.steps} steps alone, and requests may have {max_steps}; "
                "raise --max-steps"
            )
    names = [sae.name for sae in loaded]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise LoadError(f"two SAEs are called {', '.join(sorted(doubled))}; name one by --sae NAME=PATH")
    if unknown := [name for name in hook_points if name not in points]:
        raise LoadError(f"{model}: no hook point {', '.join(unknown)}; it has {list_points(points)}")
    used = {
        *(hook_points or (DEFAULT_HOOK_POINTS if set(DEFAULT_HOOK_POINTS) <= points.keys() else ())),
        *(sae.hook_point for sae in loaded),
    }
    order = [name for name in points if name in used]
    edge = unet.config.sample_size * downscale if size is None else _edge(size, unet, downscale)
    served, latent = (edge, edge), (edge // downscale, edge // downscale)
    memory = memory_need(
        unet=unet,
        vae=decoder,
        texts=encoders,
        saes=[sae.bundle.weights.tensors().values() for sae in loaded],
        dictionaries=[(math.prod(points[sae.hook_point].grid(*served)), sae.bundle.d_sae) for sae in loaded],
        runs=[math.prod(points[sae.hook_point].grid(*served)) * sae.bundle.d_in for sae in loaded if sae.bundle.steps],
        max_batch=max_batch,
        latent_size=latent,
        tokens=pipeline.tokenizer.model_max_length,
        pipelined=pipelined_on(torch_device),
        available=available,
    )
    if refusal := memory.refusal(_describe(torch_device), f"a batch of {max_batch} at {edge}x{edge}"):
        raise LoadError(f"{model}: {refusal}")
    with on_device(torch_device):
        text = TextEncoder(
            (pipeline.tokenizer, pipeline.tokenizer_2),
            (encoders[0].to(torch_device), encoders[1].to(torch_device)),
            torch_device,
        )
        decoder = decoder.to(torch_device)
        tapped = tuple(points[name] for name in order)
        spec = GraphSpec.of(unet, tapped, downscale, text.max_tokens)
        artifacts = ArtifactCache(cache or default_cache())
        try:
            runner, reason, more = open_backend(backend, unet, spec, model_hash, torch_device, artifacts, latent)
        except BackendError as error:
            raise LoadError(f"--backend {backend}: {error}") from error
        info = EngineInfo(
            model=model,
            model_hash=model_hash,
            components_hash=components_hash,
            hook_points=tapped,
            saes={sae.name: sae for sae in sorted(loaded, key=lambda sae: order.index(sae.hook_point))},
            default_steps=1,
            max_steps=max_steps,
            default_size=served,
            sizes=(served,),
            max_prompt_tokens=text.max_tokens,
            backend=runner.name,
            backend_reason=reason,
            device=_describe(torch_device),
            dtype=str(torch_dtype).removeprefix("torch."),
            versions=versions() | more,
            memory=memory,
            load_s=time.monotonic() - start,
        )
        on_gpu = torch_device.type == "cuda"
        pictures = GraphedVae(decoder, compiled=runner.name == "torch-compile") if on_gpu else decoder
        parts = Components(text, unet, decoder, pipeline.scheduler, downscale, pictures)
        return Engine(parts, runner, info, torch_device)


def load_pipeline(
    model: str, device: torch.device, dtype: torch.dtype, variant: str | None = None
) -> tuple[StableDiffusionXLPipeline, str]:
    """A model as `diffusers` loads it, and the hash of its U-Net's weights; random weights are made on `device`.

    Raises:
        LoadError: with one clear line.
    """
    return _read_pipeline(model, _folder_of(model, variant), device, dtype, variant)


def _folder_of(model: str, variant: str | None) -> Path | None:
    """Where a model is; None for random weights, which are nowhere."""
    if is_random(model):
        if variant is not None:
            raise LoadError(f"--variant {variant}: {model} has no weight files")
        return None
    return model_folder(model, variant)


def model_folder(model: str, variant: str | None = None) -> Path:
    """The `diffusers` folder of a model: the embedded one's, a local one, or the snapshot of a hub id.

    Of a hub id only what is loaded is fetched: neither the weights of other variants, nor a whole model in one file.

    Raises:
        LoadError: it is none of these.
    """

    def fetch(name: str) -> str:
        folder: str = StableDiffusionXLPipeline.download(name, variant=variant, use_safetensors=True)
        return folder

    folder = embedded_model() if model == EMBEDDED else resolve(model, "--model", fetch)
    if not (folder / "model_index.json").exists():
        raise LoadError(f"{folder} is no diffusers folder: model_index.json is missing")
    return folder


def _read_pipeline(
    model: str, folder: Path | None, device: torch.device, dtype: torch.dtype, variant: str | None
) -> tuple[StableDiffusionXLPipeline, str]:
    if folder is None:
        try:
            return random_pipeline(model, device, dtype)
        except ValueError as error:
            raise LoadError(f"--model {error}") from error
    try:
        with _quiet(model == EMBEDDED):
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                folder, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
            )
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise LoadError(f"{model}: cannot be loaded as an SDXL pipeline ({_first_line(error)})") from error
    return pipeline, hash_unet(folder, variant)


def hash_unet(folder: Path, variant: str | None = None) -> str:
    """SHA-256 over the U-Net's weight files, in order of name.

    Raises:
        LoadError: there are none.
    """
    return hash_files(_weight_files(folder / "unet", "diffusion_pytorch_model", variant))


def hash_components(folder: Path, variant: str | None = None, vae: Path | None = None) -> str:
    """SHA-256 over all that draws beside the U-Net's weights, as it is loaded: weights, vocabularies, configurations.

    Args:
        folder: of the model.
        variant: of the weight files.
        vae: of the VAE that stands in for the model's own.

    Raises:
        LoadError: weights are missing.
    """
    found = [("unet", folder / "unet" / "config.json")]
    for part in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        replaced = part == "vae" and vae is not None
        at = vae if part == "vae" and vae is not None else folder / part
        settings = [p for p in at.glob("*") if p.suffix in (".json", ".txt", ".model") and ".index." not in p.name]
        if stem := _STEMS.get(part):
            settings += _weight_files(at, stem, None if replaced else variant)
        found += [(part, path) for path in sorted(settings)]
    lines = "".join(f"{part}/{path.name} {hash_file(path)}\n" for part, path in found)
    return hashlib.sha256(lines.encode()).hexdigest()


def _weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The weight files that `diffusers` loads: the variant's where the folder has it, shards where there is an index.

    A pipeline may have a variant of some parts only, so a part without it is loaded as it is.
    """
    names = {path.name for path in folder.glob("*") if path.is_file()}
    if not variant or not any("." in name and name.split(".")[1].startswith(variant) for name in names):
        variant = None
    dot = f".{variant}" if variant else ""
    # The second is how older versions of diffusers named it.
    for index in (f"{stem}.safetensors.index{dot}.json", f"{stem}.safetensors{dot}.index.json"):
        if index in names:
            wanted = sorted(set(_weight_map(folder / index).values()))
            break
    else:
        wanted = [f"{stem}{dot}.safetensors"]
    if missing := [name for name in wanted if name not in names]:
        raise LoadError(f"{folder}: {missing[0]} is missing, and the model is known by the hash of its weights")
    return [folder / name for name in wanted]


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor, of an index of shards."""
    try:
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("no files by tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: no index of shards ({_first_line(error)})") from error
    return found


def versions() -> dict[str, str]:
    """Versions of what decides numerics."""
    try:
        own = version("turbolens")
    except PackageNotFoundError:
        own = "unknown"
    libraries = (torch, diffusers, transformers)
    return {"turbolens": own} | {library.__name__: library.__version__ for library in libraries}


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Load without progress bars: a model of some megabytes is there before one can be read."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries if quiet else ():
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was in zip(libraries, shown, strict=True):
            if quiet and was:
                library.enable_progress_bar()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LoadError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"--device {name}: this PyTorch ({torch.__version__}) sees no GPU; use --device cpu")
    return device


def _describe(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise LoadError(f"--dtype {name}: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def snapshot(patterns: Sequence[str]) -> Callable[[str], str]:
    """Fetches the files of a hub id whose names fit."""
    return lambda name: snapshot_download(name, allow_patterns=list(patterns))


def resolve(name: str, flag: str, fetch: Callable[[str], str] | None = None) -> Path:
    """A local folder, or the snapshot of a hub id (from the cache where it is complete, else downloaded).

    Args:
        name: the folder or hub id.
        flag: what asked for it, which begins the error.
        fetch: gives the local folder of a hub id; None: with all configurations and safetensors.

    Raises:
        LoadError: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise LoadError(f"{flag} {name}: no such folder, and not a hub id like owner/name")
    try:
        return Path((fetch or snapshot(_FILE_PATTERNS))(name))
    except Exception as error:  # offline, gated, missing: the hub's client raises many kinds
        raise LoadError(
            f"{flag} {name}: not a local folder, and the hub gave nothing ({_first_line(error)}); download it where "
            f"there is a network (`hf download {name}`) and pass the folder, or set HF_HOME to a cache that holds it"
        ) from error


def _edge(size: int, unet: Any, downscale: int) -> int:
    """A picture's edge that the U-Net can halve as often as it does, and that the exported graph takes."""
    cell = downscale * 2 ** (len(unet.config.block_out_channels) - 1)
    if size % cell or size < 2 * cell:
        raise LoadError(f"--size {size}: must be a multiple of {cell}, from {2 * cell}")
    return size


def _vae(folder: Path | None, own: Any, dtype: torch.dtype) -> Any:
    """The VAE, made to stay finite: models say by `force_upcast` that half precision is not enough for it as it is."""
    if folder is None:
        return _fit(own, dtype)
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
        loader = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[kind]
        vae = loader.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except Exception as error:
        raise LoadError(
            f"--vae {folder}: not an AutoencoderKL or AutoencoderTiny folder ({_first_line(error)})"
        ) from error
    for what, mine, theirs in (
        ("latent channels", vae.config.latent_channels, own.config.latent_channels),
        ("times the latent's size", _upscale(vae), _upscale(own)),
    ):
        if mine != theirs:
            raise LoadError(f"--vae {folder}: {mine} {what}; this model needs {theirs}")
    return _fit(vae, dtype)


def _fit(vae: Any, dtype: torch.dtype) -> Any:
    """A VAE that says that it overflows half precision: with its stream scaled, or in float32 if that is not known."""
    if dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        return vae
    try:
        scale_stream(vae.decoder)
    except UnknownDecoder:
        return vae.float()
    return vae


def _upscale(vae: Any) -> int:
    """Picture pixels for each pixel of a latent, each way."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _parts_of(source: str, points: Any) -> tuple[str | None, str | None, str]:
    """What one `--sae` says: (name, hook point, folder or hub id), of `[NAME][@][BLOCK]=PATH` or a path alone."""
    front, _, path = source.partition("=")
    if not front or not path or "/" in front or Path(source).expanduser().exists():
        return None, None, source
    name, at, block = front.rpartition("@")
    if not at and front not in points and find_block(front) != front:
        return front, None, path
    if block not in points:
        raise LoadError(f"--sae {source}: the model has no block {block}; it has {list_points(points)}")
    return name or None, block, path


def _load_saes(source: str, points: Any, model_hash: str, force: bool) -> list[SaeInfo]:
    """Every SAE that one `--sae` names."""
    name, hook_point, path = _parts_of(source, points)
    folder = resolve(path, "--sae", snapshot(SAE_PATTERNS))
    found = find_saes(folder)
    if not found:
        raise LoadError(f"--sae {source}: no SAE in {folder} (no cfg.json, and the weights of no known format)")
    if (name or hook_point) and len(found) > 1:
        raise LoadError(f"--sae {source}: {folder} holds {len(found)} SAEs; name one of them")
    try:
        bundles = [read_sae(path, hook_point) for path in found]
        if name is not None:
            bundles = [dataclasses.replace(b, name=check_name(name, b.hook_point)) for b in bundles]
    except ValueError as error:
        raise LoadError(f"--sae {error}") from error
    infos = []
    for bundle in bundles:
        if bundle.hook_point not in points:
            raise LoadError(
                f"SAE {bundle.name}: the model has no block {bundle.hook_point}; it has {list_points(points)}"
            )
        foreign = bundle.model_hash is not None and bundle.model_hash != model_hash
        if foreign and not force:
            raise LoadError(
                f"SAE {bundle.name}: trained on the model with hash {str(bundle.model_hash)[:12]}, but this one has "
                f"{model_hash[:12]}; pass --force-sae to serve it all the same (every result will say so)"
            )
        infos.append(SaeInfo(bundle.name, bundle.hook_point, bundle, foreign))
    return infos


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
