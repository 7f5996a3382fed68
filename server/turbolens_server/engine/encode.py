"""From pictures to latents."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class PictureEncoder:
    """The encoder of a VAE, in float32 where the VAE says that half precision is not enough for it."""

    def __init__(self, vae: Any) -> None:
        """`vae`: an `AutoencoderKL` or `AutoencoderTiny`, on its device."""
        self.config, self._given = vae.config, vae.dtype
        self._vae = encoder_alone(vae).float() if upcasts(vae) else vae

    @property
    def own_weights(self) -> bool:
        """Whether it keeps weights beside the VAE's."""
        return bool(self._vae.dtype != self._given)

    def distribution(self, picture: npt.NDArray[Any], dtype: torch.dtype) -> Any:
        """A picture, uint8 [height, width, 3], coded: a distribution over latents to draw from, or [1, C, h, w].

        Args:
            picture: at a size that the VAE halves as often as it does.
            dtype: of the latents; pixels are rounded to it, as the pipelines of `diffusers` do.
        """
        # Laid out as the pipelines have them, channels last: convolutions of another layout round otherwise.
        pixels = torch.from_numpy((picture.astype(np.float32) / 255.0)[None].transpose(0, 3, 1, 2))
        device = next(self._vae.parameters()).device
        coded = self._vae.encode((2.0 * pixels - 1.0).to(device, dtype).to(self._vae.dtype))
        return coded.latent_dist if hasattr(coded, "latent_dist") else coded.latents

    def scaled(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Latents [B, C, h, w] of the VAE as the U-Net has them."""
        config, latents = self.config, latents.to(dtype)
        if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
            plain: Tensor = config.scaling_factor * latents
            return plain
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=dtype)[None, :, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        scaled: Tensor = (latents - mean) * config.scaling_factor / std
        return scaled


def upcasts(vae: Any) -> bool:
    """Whether half precision is not enough for a VAE that is in it: its encoder is then copied in float32."""
    return bool(vae.dtype in (torch.float16, torch.bfloat16) and getattr(vae.config, "force_upcast", False))


def encoder_alone(vae: Any) -> Any:
    """A copy of a VAE that cannot decode, so that the decoder is not copied."""
    decoder, vae.decoder = vae.decoder, None
    try:
        return copy.deepcopy(vae)
    finally:
        vae.decoder = decoder
