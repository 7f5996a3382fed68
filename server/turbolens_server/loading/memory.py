"""How much memory serving takes, told before the first request instead of found out by a crash.

Activations are not guessed by a formula: the model's own code runs once on PyTorch's `meta` device, where tensors
have shapes and no contents, and the bytes that are alive at the same time are counted. The slow twin of that count is
a real run, which the tests hold it to.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbolens_server.engine.encode import encoder_alone, upcasts
from turbolens_server.engine.info import MemoryNeed
from turbolens_server.engine.modules import Read
from turbolens_server.engine.text import PROMPTS_KEPT
from turbolens_server.files import available_host_bytes
from turbolens_server.gating.gates import Gates
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.points import inner_names, z_name

_SLACK: Final = 1.25
"""Over the counted activations: kernels have scratch space of their own, and allocators round up."""


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still referred to."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """On `meta`, attention would be spelt out with its scores; every device that is served fuses it without them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query: Tensor = args[0]
            return torch.empty_like(query)
        return func(*args, **(kwargs or {}))


def peak_bytes(run: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Most bytes alive at once of the tensors that `run` makes, `weights` not counted."""
    counter = _LiveBytes(weights)
    with torch.no_grad(), counter, _FusedAttention():
        run()
    return counter.peak


def _twin(module: Any) -> Any:
    """A copy of a module whose weights have shapes and no contents."""
    empty: dict[int, Tensor] = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    for weight in module.parameters():
        empty[id(weight)] = torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    return copy.deepcopy(module, empty)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What requests may ask of a pass of the U-Net beside a picture, at most."""

    regions: int = 0
    gates: Gates | None = None
    opened: frozenset[str] = frozenset()
    """Attention layers whose patterns are read, for attributions."""


_NOTHING: Final = Asked()


def unet_bytes(unet: Any, batch: int, height: int, width: int, tokens: int, asked: Asked = _NOTHING) -> int:
    """Activations of one pass of an SDXL-type U-Net over latents [batch, C, height, width] and `tokens` of text.

    Counted with it, where they are asked for: regions' phrases and their bias, what gates compute, and what
    attributions keep to the pass's end, of each row what they read in one layer.
    """
    from turbolens_server.unet.tapped import attention_blocks, tapped_forward  # with diffusers, which not all need

    twin, options = _twin(unet), {"dtype": unet.dtype, "device": "meta"}
    text_width, time_width = unet.config.cross_attention_dim, 6 * unet.config.addition_time_embed_dim
    pooled = torch.empty(batch, unet.config.projection_class_embeddings_input_dim - time_width, **options)
    time_ids = torch.empty(batch, 6, **options)
    sample = torch.empty(batch, unet.config.in_channels, height, width, **options)
    timestep = torch.empty((), device="meta")
    prompts = torch.empty(batch, tokens, text_width, **options)
    gates = None if asked.gates is None else asked.gates.to(torch.device("meta"))
    inner = frozenset(name for layer in asked.opened for name in (z_name(layer), *inner_names(layer)))

    def run() -> None:
        kept: list[Tensor] = []
        text, bias = prompts, {}
        if asked.regions:
            length = tokens * (1 + asked.regions)
            text = torch.empty(batch, length, text_width, **options)
            grids = {2**halvings for _, halvings, _ in attention_blocks(unet)}
            positions = {halving: (height // halving) * (width // halving) for halving in grids}
            added = {halving: torch.empty(batch, count, length, **options) for halving, count in positions.items()}
            bias = {(height // halving, width // halving): grid for halving, grid in added.items()}
        gating = None if gates is None else gates.of(text)
        conditions = Conditions(text, pooled, time_ids, bias=bias, gating=gating)

        def keep(_: str, update: Tensor, __: tuple[int, int]) -> Tensor:
            if not kept or update.nbytes > kept[0].nbytes:
                kept[:] = [update]
            return update

        tapped_forward(twin, sample, timestep, conditions, tap=keep, at=inner)

    return peak_bytes(run, twin.parameters())


def vae_bytes(vae: Any, batch: int, height: int, width: int) -> int:
    """Activations of decoding latents [batch, C, height, width]."""
    twin = _twin(vae)
    latents = torch.empty(batch, vae.config.latent_channels, height, width, dtype=vae.dtype, device="meta")
    return peak_bytes(lambda: twin.decode(latents), twin.parameters())


def encoder_bytes(vae: Any, height: int, width: int) -> tuple[int, int]:
    """What reading a picture of so many pixels takes: the weights that the encoder copies, and activations."""
    twin = encoder_alone(_twin(vae))
    copied = 0
    if upcasts(vae):
        twin = twin.float()
        copied = sum(map(size_of, twin.parameters()))
    pixels = torch.empty(1, vae.config.in_channels, height, width, dtype=twin.dtype, device="meta")
    return copied, peak_bytes(lambda: twin.encode(pixels), twin.parameters())


def text_bytes(unet: Any, dtype: torch.dtype, prompts: int, tokens: int) -> int:
    """Encoded prompts of `tokens` each: hidden states and pooled text."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return int(prompts * (tokens * config.cross_attention_dim + pooled) * dtype.itemsize)


def encoding_bytes(dictionaries: Iterable[tuple[int, int]], runs: Iterable[int], max_batch: int) -> int:
    """What reading SAEs takes; arguments as for `memory_need`."""
    # One SAE is encoded at a time: its pre-activations and what the selection makes of them, in float32.
    encoding = max((2 * 4 * max_batch * positions * d_sae for positions, d_sae in dictionaries), default=0)
    # All are kept at once; one at a time is laid side by side, and its changes are taken, in float32.
    kept = [4 * max_batch * values for values in runs]
    return encoding + sum(kept) + 2 * max(kept, default=0)


def slack(counted: int) -> int:
    """Bytes that counted activations really take."""
    return int(counted * _SLACK)


@dataclasses.dataclass(frozen=True)
class Counted:
    """What the modules of a model take, in bytes, for the batches and sizes that they were counted with."""

    weights: int
    """With the copies that the VAE's encoder makes."""
    denoising: int
    """Activations of a pass of the U-Net."""
    reading: int
    """Activations of the VAE's encoder."""
    decoding: int
    """Of its decoder, for one picture."""
    texts: int
    """Of the encoded prompts that are kept."""


def count(
    modules: Read,
    *,
    max_batch: int,
    latent_size: tuple[int, int],
    picture_size: tuple[int, int],
    tokens: int,
    asked: Asked = _NOTHING,
) -> Counted:
    """Count by the modules' own code.

    Args:
        modules: of the model, loaded.
        max_batch: pictures of a batch.
        latent_size: (height, width) of the largest latents.
        picture_size: of their pictures.
        tokens: text tokens of a prompt.
        asked: the most that requests may ask of a pass beside pictures.
    """
    height, width = latent_size
    copied, reading = encoder_bytes(modules.vae, *picture_size)  # one by one, before their walk begins
    parts = (modules.unet, modules.vae, *modules.encoders)
    return Counted(
        weights=copied + sum(size_of(weight) for part in parts for weight in part.parameters()),
        denoising=unet_bytes(modules.unet, max_batch, height, width, tokens, asked),
        reading=reading,
        decoding=vae_bytes(modules.vae, 1, height, width),
        texts=text_bytes(modules.unet, modules.encoders[0].dtype, PROMPTS_KEPT, tokens),
    )


def memory_need(
    counted: Counted,
    *,
    saes: Iterable[Iterable[Tensor]],
    gates: Iterable[Tensor] = (),
    dictionaries: Iterable[tuple[int, int]],
    runs: Iterable[int],
    max_batch: int,
    pipelined: bool,
    available: int | None,
    decoders: int = 1,
) -> MemoryNeed:
    """What it takes to serve a model.

    Args:
        counted: what its modules take.
        saes: the tensors of each SAE.
        gates: the tensors of learned region gates.
        dictionaries: (positions, d_sae) of each SAE at that size.
        runs: values of the updates that each temporal SAE keeps of a picture until its last step.
        max_batch: pictures of a batch.
        pipelined: whether a batch is decoded while the next is denoised.
        available: bytes that were free before anything was loaded.
        decoders: pictures that are decoded at once, as many of the counted size as take what they take.
    """
    decoding = decoders * counted.decoding
    denoising = max(counted.denoising + encoding_bytes(dictionaries, runs, max_batch), counted.reading)
    activations = denoising + decoding if pipelined else max(denoising, decoding)
    return MemoryNeed(
        weights=counted.weights + sum(map(size_of, gates)),
        saes=sum(size_of(tensor) for tensors in saes for tensor in tensors),
        activations=slack(activations) + counted.texts,
        available=available,
    )


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def available_bytes(device: torch.device) -> int | None:
    """Memory free on a device; None where the platform does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_host_bytes(Path("/"))
