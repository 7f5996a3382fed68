"""Models with random weights: the whole path at a real model's size, where its weights cannot be had.

`random:sdxl-turbo` is SDXL Turbo's architecture to the last parameter, with four SAEs of the published shape. Its
pictures are noise and its features mean nothing; its shapes, its costs and the code that runs are the real model's.
`random:mini` is the embedded model's architecture, for tests of the same path that must be quick.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from turbolens_server.loading.hub import embedded_model
from turbolens_server.loading.places import RANDOM
from turbolens_server.sae.bundle import Bundle, FeatureStats, SaeWeights
from turbolens_server.unet.points import DEFAULT_HOOK_POINTS, HookPoint

_TIMESTEPS: Final = (999, 749, 499, 249)
"""Where trailing spacing puts four steps."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a model of SDXL's family is built from: its parts' configurations as `diffusers` writes them."""

    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    d_sae: int
    """Features of each SAE."""
    k: int
    """Features active at a position."""


SDXL_TURBO: Final = Architecture(
    unet={
        "sample_size": 64,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),  # diffusers reads this as the number of heads
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    text_encoder={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
        "eos_token_id": 49407,
    },
    text_encoder_2={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
        "eos_token_id": 49407,
    },
    vae={
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    scheduler={
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
    },
    d_sae=5120,
    k=10,
)
"""SDXL Turbo with the SAEs of arXiv 2410.22366."""


def architecture(model: str) -> Architecture:
    """The architecture of `random:sdxl-turbo` or `random:mini`.

    Raises:
        ValueError: no such model.
    """
    match model.removeprefix(RANDOM):
        case "sdxl-turbo":
            return SDXL_TURBO
        case "mini":
            parts = ("unet", "text_encoder", "text_encoder_2", "vae")
            configs = {part: json.loads((embedded_model() / part / "config.json").read_text()) for part in parts}
            scheduler = json.loads((embedded_model() / "scheduler" / "scheduler_config.json").read_text())
            return Architecture(**configs, scheduler=scheduler, d_sae=1024, k=10)
        case _:
            raise ValueError(f"{model}: no such model; there are {RANDOM}sdxl-turbo and {RANDOM}mini")


def random_pipeline(
    model: str, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[StableDiffusionXLPipeline, str]:
    """Build a model with random weights in place: on `device`, in `dtype`, and never in another form.

    Returns:
        The pipeline as `diffusers` would have loaded it, and a hash that stands for its weights.

    Raises:
        ValueError: no such model.
    """
    parts = architecture(model)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(dict(parts.unet))
        vae = AutoencoderKL.from_config(dict(parts.vae))
        first = CLIPTextModel(CLIPTextConfig.from_dict(dict(parts.text_encoder)))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(parts.text_encoder_2)))
    generator = torch.Generator(device).manual_seed(seed)
    pipeline = StableDiffusionXLPipeline(
        vae=_fill(vae, device, dtype, generator),
        text_encoder=_fill(first, device, dtype, generator),
        text_encoder_2=_fill(second, device, dtype, generator),
        tokenizer=_tokenizer(model, "tokenizer", "<|endoftext|>"),
        tokenizer_2=_tokenizer(model, "tokenizer_2", "!"),
        unet=_fill(unet, device, dtype, generator),
        scheduler=EulerAncestralDiscreteScheduler.from_config(dict(parts.scheduler)),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    # Generators differ between kinds of device and types, and so do the weights.
    made_from = json.dumps([dataclasses.asdict(parts), seed, device.type, str(dtype)], default=list, sort_keys=True)
    return pipeline, hashlib.sha256(made_from.encode()).hexdigest()


def random_bundles(model: str, points: Mapping[str, HookPoint], model_hash: str, seed: int = 0) -> list[Bundle]:
    """A random TopK SAE at each of the four hook points, with statistics made up in the published SAEs' range."""
    parts = architecture(model)
    return [
        _random_bundle(points[name], parts.d_sae, parts.k, model_hash, seed + rank)
        for rank, name in enumerate(DEFAULT_HOOK_POINTS)
    ]


def _fill(module: Any, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Any:
    """Give a model built without weights its values: uniform by fan-in, which keeps residual networks finite."""
    values = {}
    for name, parameter in module.named_parameters():
        value = torch.empty(parameter.shape, device=device, dtype=dtype)
        if value.dim() > 1:
            bound = value[0].numel() ** -0.5
            values[name] = value.uniform_(-bound, bound, generator=generator)
        else:  # norms start as identities
            values[name] = value.fill_(1 if name.endswith("weight") else 0)
    module.load_state_dict(values, assign=True)
    return module.to(device).eval()


def _tokenizer(model: str, part: str, pad_token: str) -> CLIPTokenizer:
    """CLIP's tokenizer without its merges: one token a byte, with CLIP's ids for bytes and for both ends."""
    if model == f"{RANDOM}mini":
        return CLIPTokenizer.from_pretrained(embedded_model() / part)
    # In CLIP's order the printable bytes come first, then those that stand in for the others.
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(
        vocab=ids | {"<|startoftext|>": 49406, "<|endoftext|>": 49407},
        merges=[],
        pad_token=pad_token,
        model_max_length=77,
    )


def _random_bundle(point: HookPoint, d_sae: int, k: int, model_hash: str, seed: int) -> Bundle:
    generator = torch.Generator().manual_seed(seed)
    W_dec = nn.functional.normalize(torch.randn(d_sae, point.d_model, generator=generator), dim=-1)
    weights = SaeWeights(
        W_enc=W_dec.T.contiguous(),
        b_enc=torch.zeros(d_sae),
        W_dec=W_dec,
        b_dec=0.1 * torch.randn(point.d_model, generator=generator),
    )
    mean = np.random.default_rng(seed).uniform(10, 30, d_sae).astype(np.float32)
    rms = float(np.sqrt(k) * mean.mean())  # of k orthogonal features at their means
    stats = FeatureStats(
        mean=mean,
        max=3 * mean,
        frequency=np.full(d_sae, k / d_sae, np.float32),
        timesteps=np.array(_TIMESTEPS),
        update_rms=np.full(len(_TIMESTEPS), rms, np.float32),
    )
    digest = hashlib.sha256(f"{model_hash} {point.name} {d_sae} {k} {seed}".encode())
    return Bundle(
        name=point.name,
        hook_point=point.name,
        architecture="topk",
        k=k,
        weights=weights,
        stats=stats,
        hash=digest.hexdigest(),
        model_hash=model_hash,
        provenance={"weights": "random", "seed": seed},
    )
