"""The parts of `mini`, untrained: SDXL's architecture family, small enough for a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from turbolens_training.mini.tokenizer import CONTEXT_LENGTH, build_tokenizer

PICTURE_SIZE: Final = 128
LATENT_SIZE: Final = 32
TEXT_DIM: Final = 128
POOLED_DIM: Final = 128
TIME_IDS: Final = (PICTURE_SIZE, PICTURE_SIZE, 0, 0, PICTURE_SIZE, PICTURE_SIZE)
"""SDXL's size conditioning as the pipeline passes it for an uncropped picture: original size, crop, target size."""
SCALING_FACTOR: Final = 1.5


SPARE_BLOCKS: Final = ("down.2.0", "up.0.2")
"""Transformer blocks that are no hook points; see `MiniConfig.block_dropout`."""


def build_unet() -> UNet2DConditionModel:
    """A U-Net with SDXL's hook points by name: 6 M parameters, attention heads of width 64, 8x8 deepest grid.

    What a caption says can reach the picture only through the blocks on the deepest grid: there is no other
    cross-attention, and the pooled text is not listened to. A first model that had both drew as well, but its
    features at the hook points were read-outs that caused nothing.
    """
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(1, 1, 2),  # diffusers reads this as the number of heads
        cross_attention_dim=2 * TEXT_DIM,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + POOLED_DIM,
        norm_num_groups=8,
    )
    with torch.no_grad():
        unet.add_embedding.linear_1.weight[:, :POOLED_DIM] = 0  # the pooled text comes before the size conditioning
    return unet


def build_text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two CLIP text encoders, as in SDXL: hidden states of both, pooled output of the second."""
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=4 * TEXT_DIM,
        projection_dim=POOLED_DIM,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_vae() -> AutoencoderKL:
    """A small VAE: 128 px to a 32x32 latent of four channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=PICTURE_SIZE,
        scaling_factor=SCALING_FACTOR,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_scheduler() -> EulerAncestralDiscreteScheduler:
    """SDXL Turbo's scheduler with zero terminal SNR, so that the first step's input is pure noise."""
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        steps_offset=1,
    )


class TextEncoders(torch.nn.Module):
    """Both text encoders as the SDXL pipeline uses them."""

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self._tokenizers = (build_tokenizer(), build_tokenizer(pad_token="!"))

    def tokenize(self, captions: list[str], length: int = CONTEXT_LENGTH) -> tuple[Tensor, Tensor]:
        """Captions as token ids of the two tokenizers, int64 [B, length] each."""
        first, second = (
            tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            for tokenizer in self._tokenizers
        )
        return first.input_ids, second.input_ids

    def forward(self, ids: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, 77, 2 * TEXT_DIM] and pooled text [B, POOLED_DIM]."""
        first = self.first(ids[0], output_hidden_states=True)
        second = self.second(ids[1], output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return hidden, second.text_embeds


def save_pipeline(
    folder: Path, text: TextEncoders, unet: UNet2DConditionModel, vae: AutoencoderKL, dtype: torch.dtype
) -> None:
    """Write the model as a `diffusers` folder that `StableDiffusionXLPipeline.from_pretrained` loads."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text.first,
        text_encoder_2=text.second,
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(pad_token="!"),
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.to(dtype=dtype)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2"):
        _for_every_transformers(folder / name)


def _for_every_transformers(folder: Path) -> None:
    """A text encoder's folder as every release of `transformers` reads it.

    Version 5 leaves out the level `text_model.`, without which version 4 finds no weights and draws noise; and it loads
    the type that the configuration says, which must be that of the U-Net beside it where nobody says one.
    """
    weights, settings = folder / "model.safetensors", folder / "config.json"
    tensors = {
        name if name.startswith("text_") else f"text_model.{name}": value for name, value in load_file(weights).items()
    }
    save_file(tensors, weights, {"format": "pt"})
    config = {**json.loads(settings.read_text()), "dtype": "float32"}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
