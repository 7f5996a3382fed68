"""The usual way to serve SAE features of a diffusion model, as research code does it: the thing to beat.

Forward hooks are put on the pipeline's own modules for the length of a request, and taken off again; so requests
cannot run together, and one lock lets them in one at a time. Every hook encodes its block's update densely: all
`d_sae` pre-activations, the k largest scattered back into a row of that width. An edit is a dense map of the same
width, decoded by the whole decoder. Features come back as dense float32 arrays.

It is right (tests hold its features and pictures to ours) and slow, and it runs in the caller's process: nothing is
sent, coded or queued.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turbolens_server.sae.bundle import Bundle
from turbolens_server.unet.points import HookPoint

FloatArray = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class AddEdit:
    """Add a feature's decoder row at a block."""

    block: str
    index: int
    amount: float
    """Activation to add."""
    mask: FloatArray
    """[height, width] of the block's grid, in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A picture and every block's features."""

    picture: npt.NDArray[np.uint8]
    """[height, width, 3]."""
    features: Mapping[str, FloatArray]
    """By block: [steps, height, width, d_sae] of the block's grid, dense; before the request's own edits there."""


class ReferenceServer:
    """One pipeline, one lock, one request at a time."""

    def __init__(self, pipeline: Any, points: Sequence[HookPoint], bundles: Mapping[str, Bundle]) -> None:
        """Serve a `StableDiffusionXLPipeline` with a TopK SAE for each block that `bundles` names.

        Raises:
            ValueError: an SAE is no TopK.
        """
        for block, bundle in bundles.items():
            if bundle.k is None:
                raise ValueError(f"{block}: {bundle.architecture}, expected topk")
        self._pipeline = pipeline
        self._modules = {point.name: pipeline.unet.get_submodule(point.module) for point in points}
        self._bundles = bundles
        self._weights = {
            block: {name: tensor.to(pipeline.device) for name, tensor in bundle.weights.tensors().items()}
            for block, bundle in bundles.items()
        }
        self._lock = threading.Lock()

    def generate(self, prompt: str, seed: int, steps: int, edits: Sequence[AddEdit] = ()) -> Reply:
        """Make a picture with its features; waits until every earlier request is done."""
        with self._lock:
            kept: dict[str, list[FloatArray]] = {block: [] for block in self._bundles}
            handles = [
                self._modules[block].register_forward_hook(self._hook(block, edits, kept[block]))
                for block in self._bundles
            ]
            try:
                (image,) = self._pipeline(
                    prompt,
                    num_inference_steps=steps,
                    guidance_scale=0.0,
                    generator=torch.Generator().manual_seed(seed),
                ).images
            finally:
                for handle in handles:
                    handle.remove()
        return Reply(np.asarray(image), {block: np.stack(maps) for block, maps in kept.items()})

    def _hook(self, block: str, edits: Sequence[AddEdit], kept: list[FloatArray]) -> Any:
        weights, k = self._weights[block], self._bundles[block].k or 0

        def hook(_: torch.nn.Module, arguments: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> Any:
            update = (output[0] - arguments[0]).permute(0, 2, 3, 1)  # [1, h, w, d_model]
            dense = _encode(weights, k, update)  # [1, h, w, d_sae]
            kept.append(dense[0].float().cpu().numpy())
            steered = output[0]
            for edit in edits:
                if edit.block == block:
                    amounts = torch.zeros_like(dense)
                    amounts[..., edit.index] = edit.amount * torch.from_numpy(edit.mask).to(dense.device)
                    steered = steered + (amounts @ weights["W_dec"]).permute(0, 3, 1, 2).to(steered.dtype)
            return (steered, *output[1:])

        return hook


def _encode(weights: Mapping[str, Tensor], k: int, update: Tensor) -> Tensor:
    """Dense activations [..., d_sae] of updates [..., d_in]."""
    pre = (update.float() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())
