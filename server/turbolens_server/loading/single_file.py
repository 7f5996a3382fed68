"""A model, or a VAE, that is one file in SDXL's original layout, as most sites hand them out.

Such a file holds weights alone. Configurations, scheduler and vocabularies are read from the folder of a model of its
kind, whose own weights need not be there. `diffusers` knows how names of tensors correspond; that each one has its
place, and each place one, is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    create_diffusers_clip_model_from_ldm,
    infer_diffusers_model_type,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from turbolens_server.files import first_line
from turbolens_server.loading.errors import LoadError

_UNET: Final = "model.diffusion_model."
_VAE: Final = "first_stage_model."
_TEXTS: Final = ("conditioner.embedders.0.", "conditioner.embedders.1.")
_NO_WEIGHTS: Final = (".position_ids", ".logit_scale")
"""What text encoders are saved with and nothing reads."""
_SHOWN: Final = 3


def read_single_file(file: Path, config: Path, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """A checkpoint as a pipeline.

    Args:
        file: in the original layout, `.safetensors`.
        config: `diffusers` folder of a model of its kind: of it, all but the weights is read.
        dtype: of the tensors.

    Raises:
        LoadError: the file is something else, or its tensors and the configurations do not fit.
    """
    tensors = _read(file)
    unet, vae = _part(tensors, _UNET), _part(tensors, _VAE)
    texts = [_part(tensors, prefix) for prefix in _TEXTS]
    if not (unet and vae and all(texts)):
        raise LoadError(f"{file}: {_what_else(tensors)}")
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    parts: dict[str, Any] = {}
    try:
        for (name, kind), own in zip(kinds.items(), texts, strict=True):
            parts[name] = create_diffusers_clip_model_from_ldm(
                kind, own, subfolder=name, config=str(config), torch_dtype=dtype, local_files_only=True
            )
            if empty := [at for at, tensor in parts[name].named_parameters() if tensor.is_meta]:
                raise LoadError(f"lacks tensors of {name}: {_some(empty)}")
            _check_used(name, own, dict(parts[name].named_parameters()))
        of_unet = UNet2DConditionModel.load_config(config / "unet", local_files_only=True)
        found = convert_ldm_unet_checkpoint(unet, of_unet)
        parts["unet"] = _filled(UNet2DConditionModel, of_unet, found, dtype)
        _check_used("the U-Net", unet, found)
        of_vae = AutoencoderKL.load_config(config / "vae", local_files_only=True)
        found = convert_ldm_vae_checkpoint(vae, of_vae)
        parts["vae"] = _filled(AutoencoderKL, of_vae, found, dtype)
        _check_used("the VAE", vae, found)
        pipeline: StableDiffusionXLPipeline = StableDiffusionXLPipeline.from_pretrained(
            config, **parts, dtype=dtype, local_files_only=True
        )
    except LoadError as error:
        raise LoadError(f"{file}, with the configurations of {config}: {error}") from error
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise LoadError(f"{file}: does not fit the configurations of {config} ({first_line(error)})") from error
    return pipeline


def read_single_vae(file: Path, own: Any, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE that is one file, in the original layout or in that of `diffusers`.

    Args:
        file: `.safetensors`.
        own: the model's VAE, whose configuration it has.
        dtype: of the tensors.

    Raises:
        LoadError: it is no VAE of that configuration.
    """
    tensors = _read(file)
    try:
        config = dict(own.config)
        state = tensors if any(".down_blocks." in name for name in tensors) else convert_ldm_vae_checkpoint(
            _part(tensors, _VAE) or tensors, config
        )  # fmt: skip
        return _filled(AutoencoderKL, config, state, dtype)
    except LoadError as error:
        raise LoadError(f"{file}: {error}") from error
    except Exception as error:
        raise LoadError(f"{file}: is no VAE of this model's kind ({first_line(error)})") from error


def _filled(kind: Any, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A part with every tensor from the file, and every tensor of the file in it."""
    with init_empty_weights():
        part = kind.from_config(config)
    missing, unexpected = part.load_state_dict(state, strict=False, assign=True)
    for what, names in (("lacks", missing), ("has unknown", unexpected)):
        if names:
            raise LoadError(f"{what} tensors of {kind.__name__}: {_some(names)}")
    return part.to(dtype).eval()


def _check_used(what: str, given: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> None:
    """Raise LoadError where some of a part's values have no place: other names change nothing of their number."""
    more = sum(t.numel() for name, t in given.items() if not name.endswith(_NO_WEIGHTS))
    if more := more - sum(tensor.numel() for tensor in taken.values()):
        raise LoadError(f"has {more:+} values of {what} against what there is a place for: the kinds differ")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:  # safetensors raises many kinds
        raise LoadError(f"{file}: cannot be read as safetensors ({first_line(error)})") from error
    return tensors


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _what_else(tensors: Mapping[str, Tensor]) -> str:
    """What a file is that is no whole SDXL checkpoint."""
    if any(".lora_" in name or "lora_A" in name for name in tensors):
        return "is a LoRA; give it by --lora"
    if not any(name.startswith(_UNET) for name in tensors):
        if any(name.startswith(("down_blocks.", "up_blocks.")) for name in tensors):
            return "is a part of a model in the layout of diffusers; put it into the folder of a whole model"
        return "holds no U-Net in SDXL's original layout"
    if not any(name.startswith(_VAE) for name in tensors) and _part(tensors, _TEXTS[1]):
        return "lacks a VAE"
    return f"is a checkpoint of {infer_diffusers_model_type(dict(tensors))}, and SDXL-type models are served"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more
