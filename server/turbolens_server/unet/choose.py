"""Choose what runs the U-Net. What is asked for runs, or the start fails and says why: nothing falls back."""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from diffusers import UNet2DConditionModel

from turbolens_server.unet.artifacts import ArtifactCache, DamagedError, Entry
from turbolens_server.unet.backend import BackendError, UNetBackend, need
from turbolens_server.unet.export import GRAPH_FILE, ensure_graph, graph_key
from turbolens_server.unet.fused import FusedBlocks
from turbolens_server.unet.graph import GraphUNet
from turbolens_server.unet.onnx_unet import OnnxRunner
from turbolens_server.unet.spec import GraphSpec
from turbolens_server.unet.tensorrt_api import TensorRT, current_target, find_tensorrt
from turbolens_server.unet.tensorrt_build import Bucket, ensure_engine
from turbolens_server.unet.tensorrt_unet import TensorRTRunner, find_engine
from turbolens_server.unet.torch_unet import GraphedUNet, TorchUNet

BackendName = Literal["auto", "torch", "torch-compile", "onnx", "tensorrt"]
AUTO: Final[dict[str, tuple[str, str]]] = {
    "cpu": ("torch", "auto: needs nothing but PyTorch; what is faster takes minutes to compile"),
    "cuda": ("torch-compile", "auto: the fastest that is measured on a GPU, and it steers in one pass"),
}
"""What `auto` takes on each kind of device, and why; docs/performance.md has the measurements."""


def open_backend(
    name: str,
    unet: UNet2DConditionModel,
    spec: GraphSpec,
    model_hash: str,
    device: torch.device,
    cache: ArtifactCache,
    latent: tuple[int, int],
    hearing: GraphSpec | None = None,
) -> tuple[UNetBackend, str, dict[str, str]]:
    """A backend for a U-Net that is still on the CPU.

    Args:
        name: one of BackendName.
        unet: in the type to run in. Afterwards it is on `device` where the backend runs its modules, else on "meta":
            the backend has the weights, and a second copy would only take memory.
        spec: of the graph that the other backends run.
        model_hash: of the U-Net's weights.
        device: to run on.
        cache: of exported graphs and engines.
        latent: (height, width) of the latents that are served.
        hearing: of the graph that "onnx" runs what has a bias on; None: it takes none.

    Returns:
        The backend, why it is this one, and the versions of what it runs on.

    Raises:
        BackendError: it cannot run.
    """
    name, reason = AUTO[device.type] if name == "auto" else (name, f"asked for: {name}")
    if name in ("onnx", "tensorrt") and unet.config.time_cond_proj_dim is not None:
        raise BackendError("this U-Net takes its guidance as an embedding, which graphs do not; use torch")
    match name:
        case "torch" | "torch-compile":
            unet.to(device)
            blocks = FusedBlocks(unet) if name == "torch-compile" else None
            if device.type == "cuda":
                return GraphedUNet(unet, [point.name for point in spec.points], blocks, name), reason, {}
            return TorchUNet(unet, blocks, name), reason, {}
        case "onnx":
            runtime = need("onnxruntime", "onnx")
            specs = [spec] if hearing is None else [spec, hearing]
            files = [ensure_graph(cache, unet, one, model_hash).folder / GRAPH_FILE for one in specs]
            unet.to("meta")
            hears = None if hearing is None else GraphUNet("onnx", hearing, OnnxRunner(files[1], device))
            runner = OnnxRunner(files[0], device)
            return GraphUNet("onnx", spec, runner, hears), reason, {"onnxruntime": runtime.__version__}
        case "tensorrt":
            if device.type != "cuda" or (target := current_target(device)) is None:
                raise BackendError(f"TensorRT engines run on a GPU, not on {device}")
            tensorrt = find_tensorrt()
            dtype = next(unet.parameters()).dtype
            engine = _whole_engine(cache, unet, spec, model_hash, tensorrt, target, latent)
            unet.to("meta")
            compiled = TensorRTRunner(tensorrt, engine, spec, device, dtype)
            return GraphUNet("tensorrt", spec, compiled), reason, {tensorrt.flavour: tensorrt.version}
    raise BackendError(f"no such backend; use {', '.join(get_args(BackendName))}")


def _whole_engine(
    cache: ArtifactCache,
    unet: UNet2DConditionModel,
    spec: GraphSpec,
    model_hash: str,
    tensorrt: TensorRT,
    target: str,
    latent: tuple[int, int],
) -> Entry:
    """The engine that was built ahead; a damaged one is built again, for the same buckets."""
    try:
        key = graph_key(unet, spec, model_hash, next(unet.parameters()).dtype)
        return find_engine(cache, key, tensorrt, target, latent)
    except DamagedError as error:
        if (known := cache.key_of(error.folder)) is None:
            raise
        graph = ensure_graph(cache, unet, spec, model_hash)
        buckets = [Bucket(*shape) for shape in known["buckets"]]
        return ensure_engine(cache, graph, spec, tensorrt, target, buckets)
