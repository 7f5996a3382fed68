"""From latents to pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turbolens_server.cuda_graphs import Graphed


class GraphedVae:
    """The decoder of a VAE on a CUDA GPU, recorded for one latent: at 512 pixels one fills the GPU."""

    def __init__(self, vae: Any, *, compiled: bool) -> None:
        """`vae` is an `AutoencoderKL` or `AutoencoderTiny` on the GPU; to compile it takes about a minute."""
        self.config, self.dtype = vae.config, vae.dtype

        def decode(latents: Tensor) -> Tensor:
            decoded: Tensor = vae.decode(latents, return_dict=False)[0]
            return decoded

        if compiled:
            vae.to(memory_format=torch.channels_last)
            decode = torch.compile(decode, dynamic=False)
        self._decode = Graphed(decode)

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        """Latents [B, C, h, w] -> (pictures [B, 3, height, width],), as the VAE itself gives them."""
        return (torch.cat([self._decode(latent) for latent in latents.split(1)]),)


Picture = npt.NDArray[np.uint8]
"""[height, width, 3]"""


def decode_latents(vae: Any, latents: Tensor) -> list[Picture | None]:
    """Latents [B, C, h, w] as pictures; None where the VAE's output is not finite, which half precision can cause."""
    config = vae.config
    latents = latents.to(vae.dtype)
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (torch.tensor(v, device=latents.device, dtype=latents.dtype)[None, :, None, None]
                     for v in (config.latents_mean, config.latents_std))  # fmt: skip
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor
    decoded = vae.decode(latents, return_dict=False)[0].float()  # [B, 3, height, width]
    finite = torch.isfinite(decoded).flatten(1).all(1)
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    pictures = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [picture if good else None for picture, good in zip(pictures, finite.tolist(), strict=True)]


def decode_rows(
    vae: Any, latents: Tensor, rows: Sequence[int], live: Sequence[bool]
) -> Iterator[tuple[int, Picture | None]]:
    """Decode some rows of a batch [B, C, h, w]; yields (row, picture) of live ones.

    Each by itself: a VAE works at the picture's full size, so it takes far more memory a picture than the U-Net and
    gains nothing from more, and so a picture's bits do not depend on where it stood in its batch, nor on who is still
    there. One after the other, unless the VAE has `workers_for` such a batch.
    """
    workers = vae.workers_for(latents) if hasattr(vae, "workers_for") else None
    each = map if workers is None else workers.map
    wanted = [row for row in rows if live[row]]
    yield from zip(wanted, each(functools.partial(_decode_row, vae, latents), wanted), strict=True)


@torch.inference_mode()  # it is a thread's own
def _decode_row(vae: Any, latents: Tensor, row: int) -> Picture | None:
    (picture,) = decode_latents(vae, latents[row : row + 1])
    return picture
