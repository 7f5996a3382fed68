"""A model whose modules are read at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from turbolens_server.engine.modules import Modules, Read
from turbolens_server.files import hash_file
from turbolens_server.loading.described import Model
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hashes import hash_components
from turbolens_server.loading.hub import config_folder, file_of, resolve
from turbolens_server.loading.lora import fuse_loras
from turbolens_server.loading.memory import count
from turbolens_server.loading.model import folder_of, read_pipeline
from turbolens_server.loading.parts import check_finite
from turbolens_server.loading.vae import load_vae
from turbolens_server.unet.attention_taps import with_attention_points
from turbolens_server.unet.tapped import UnsupportedUNet, check_supported, find_hook_points


def read_model(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    vae: str | None = None,
    loras: Sequence[str] = (),
    model_config: str | None = None,
    hashes: tuple[str, str] | None = None,
) -> Model:
    """A model on the host, before anything is moved; arguments as for `load_engine`, with `device` to make random
    weights on, and `hashes` of a folder's U-Net and of all else that draws, where they are known: its files are large.

    Raises:
        LoadError: with one clear line.
    """
    file = file_of(model)
    vae_at = None if vae is None else file_of(vae) or resolve(vae, "--vae")
    folder: Path | None
    if file is None:
        if model_config is not None:
            raise LoadError(f"--model-config {model_config}: is for a --model that is one .safetensors file")
        folder = folder_of(model, variant)
        pipeline, unet_hash = read_pipeline(model, folder, device, dtype, variant, hashes[0] if hashes else None)
    else:
        if variant is not None:
            raise LoadError(f"--variant {variant}: {file} is one file, which has no variants")
        from turbolens_server.loading.single_file import read_single_file

        folder = config_folder(model_config)
        pipeline, unet_hash = read_single_file(file, folder, dtype), hash_file(file)
    fused = fuse_loras(pipeline, loras)
    if hashes is not None:
        components = hashes[1]
    else:
        components = unet_hash if folder is None else hash_components(folder, variant, vae_at, file)
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        # A tokenizer that does not say has a limit beyond all bounds; the encoder reads no more than this.
        tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    encoders = (pipeline.text_encoder.eval(), pipeline.text_encoder_2.eval())
    read = Read(pipeline.unet.eval(), load_vae(vae_at, pipeline.vae, dtype).eval(), encoders)
    try:
        check_supported(read.unet)
        named = {"text_encoder": encoders[0], "text_encoder_2": encoders[1], "unet": read.unet, "vae": read.vae}
        check_finite(named)
    except (UnsupportedUNet, LoadError) as error:
        raise LoadError(f"{model}: {error}") from error
    downscale = pipeline.vae_scale_factor
    modules = Modules(lambda: read)
    modules.get()
    return Model(
        hash=fused.rehash(unet_hash) if "unet" in fused.parts else unet_hash,
        components_hash=fused.rehash(components) if fused.parts - {"unet"} else components,
        fused=fused,
        unet=read.unet.config,
        vae=read.vae.config,
        points=with_attention_points(read.unet, find_hook_points(read.unet, downscale)),
        downscale=downscale,
        tokenizers=(pipeline.tokenizer, pipeline.tokenizer_2),
        zeros_for_nothing=bool(pipeline.config.force_zeros_for_empty_prompt),
        scheduler=pipeline.scheduler,
        modules=modules,
        count=functools.partial(count, read),
    )
