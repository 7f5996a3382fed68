"""LoRAs fused into a model's weights at load: W + weight * alpha / rank * B A. What serves them knows nothing of them.

`diffusers` reads the layouts, its own and kohya's. Fusing is done here: every matrix of a file finds its place or the
file is refused; each keeps its own alpha, where `diffusers` 0.42 gives attention layers of kohya's files the commonest;
and text encoders need no release of `peft` that fits the one of `transformers`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from turbolens_server.engine.info import LoraInfo
from turbolens_server.files import first_line, hash_file
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hub import resolve, snapshot

_USUAL_NAME: Final = "pytorch_lora_weights.safetensors"
_PARTS: Final = ("unet", "text_encoder", "text_encoder_2")
_OTHER: Final = ("dora_scale", "hada_", "lokr_", "oft_", "lora_magnitude_vector")
"""In names of tensors of methods that are no plain LoRA; `diffusers` would read some without them."""
_MATRIX: Final = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?=[AB]\.)|[._]lora\.|\.lora_linear_layer\.)(?P<side>[AB]|up|down)\.weight"
)
_BEYOND: Final = ("use_dora", "lora_bias", "fan_in_fan_out")
"""Settings of `peft` that make more of a LoRA than a product of two matrices."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """What became of a model."""

    loras: tuple[LoraInfo, ...] = ()
    parts: frozenset[str] = frozenset()
    """Parts whose weights are others now."""

    def rehash(self, base: str) -> str:
        """The hash of what these were fused into, as it is now."""
        told = f"{base} " + " ".join(f"{lora.hash}*{lora.weight!r}" for lora in self.loras)
        return hashlib.sha256(told.encode()).hexdigest()


@torch.no_grad()
def fuse_loras(pipeline: Any, sources: Sequence[str]) -> Fused:
    """Fuse LoRAs, each `PATH` or `PATH=WEIGHT`: a file, a folder or a hub id, in the layout of `diffusers` or kohya.

    Args:
        pipeline: a model as `diffusers` loaded it.
        sources: in any order; they add up.

    Raises:
        LoadError: one cannot be read, or does not fit the model.
    """
    loras, parts = [], set()
    for source in sources:
        path, weight = _parts_of(source)
        file = _file_of(path)
        try:
            with safe_open(file, "pt") as opened:
                other = [key for key in opened.keys() if any(word in key for word in _OTHER)]  # noqa: SIM118
            if other:
                raise ValueError(f"{other[0]} is of another kind")
            state, alphas, metadata = pipeline.lora_state_dict(
                file.parent, weight_name=file.name, unet_config=pipeline.unet.config, return_lora_metadata=True,
                local_files_only=True,
            )  # fmt: skip
        except Exception as error:  # diffusers and safetensors raise many kinds
            raise LoadError(f"--lora {path}: is no LoRA that diffusers reads ({first_line(error)})") from error
        if stray := [key for key in state if key.split(".")[0] not in _PARTS]:
            raise LoadError(f"--lora {path}: holds {stray[0]}, which is of no part of this model")
        for part in _PARTS:
            if own := _of_part(part, state):
                scales = _Scales.of(part, alphas or {}, metadata or {}, path)
                for name, change in _changes(own, scales, path):
                    _add(getattr(pipeline, part), name, weight * change, path)
                parts.add(part)
        loras.append(LoraInfo(path, weight, hash_file(file)))
    return Fused(tuple(loras), frozenset(parts))


@dataclasses.dataclass(frozen=True)
class _Scales:
    """What a LoRA's products are multiplied by."""

    alphas: Mapping[str, float]
    """By module, as kohya's layout has them."""
    settings: Mapping[str, Any]
    """Of `peft`, as the layout of `diffusers` may have them."""

    @classmethod
    def of(cls, part: str, alphas: Mapping[str, Any], metadata: Mapping[str, Any], path: str) -> _Scales:
        settings = _of_part(part, metadata)
        for name in _BEYOND:
            if settings.get(name):
                raise LoadError(f"--lora {path}: {name} is set, which makes it more than a product of two matrices")
        own = {}
        for key, value in _of_part(part, alphas).items():
            name = key.removesuffix(".alpha")
            parsed = _MATRIX.fullmatch(name)  # of attention layers diffusers names the matrix, not the module
            own[_module(parsed["module"] if parsed else name)] = float(value)
        return cls(own, settings)

    def of_module(self, name: str, rank: int) -> float:
        """Alpha over rank; 1 where nothing says otherwise."""
        patterns = self.settings.get("alpha_pattern") or {}
        fitting = next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", name)), None)
        alpha = self.alphas.get(name, patterns.get(fitting, self.settings.get("lora_alpha", rank)))
        return float(alpha) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def _of_part(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}


def _module(name: str) -> str:
    """A layer's name in the model, from any of the spellings of `diffusers`."""
    name = name.replace(".processor.", ".")
    front, _, last = name.rpartition(".")
    if ".self_attn." in name:
        last = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}.get(last, last)
    elif last == "to_out":
        last = "to_out.0"
    return f"{front}.{last}" if front else last


def _changes(state: Mapping[str, Tensor], scales: _Scales, path: str) -> Iterator[tuple[str, Tensor]]:
    """Module and change of its weight, for every pair of matrices."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        parsed = _MATRIX.fullmatch(key)
        if parsed is None:
            raise LoadError(f"--lora {path}: {key} is no matrix of a LoRA, and these alone are fused")
        if not tensor.is_floating_point():
            raise LoadError(f"--lora {path}: {key} is {tensor.dtype}, expected floating-point weights")
        side = {"A": "down", "B": "up"}.get(parsed["side"], parsed["side"])
        pairs.setdefault(_module(parsed["module"]), {})[side] = tensor.float()
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise LoadError(f"--lora {path}: of {name} there is one matrix, and a LoRA is of two")
        down, up = pair["down"], pair["up"]
        rank = down.shape[0]
        if rank != up.shape[1]:
            raise LoadError(f"--lora {path}: the matrices of {name} are of ranks {rank} and {up.shape[1]}")
        change = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
        yield name, scales.of_module(name, rank) * change


def _add(module: Any, name: str, change: Tensor, path: str) -> None:
    """Add a change to the weight of a layer, in float32."""
    # transformers has dropped this level from some of its text models.
    name = name if hasattr(module, "text_model") else name.removeprefix("text_model.")
    try:
        weight = module.get_submodule(name).weight
    except AttributeError as error:
        raise LoadError(f"--lora {path}: this model has no {name}") from error
    if change.numel() != weight.numel() or change.shape[:2] != weight.shape[:2]:
        shapes = f"{tuple(change.shape)}, and the model's are {tuple(weight.shape)}"
        raise LoadError(f"--lora {path}: the weights of {name} are {shapes}")
    weight.copy_(weight.float() + change.reshape(weight.shape).to(weight.device))


def _parts_of(source: str) -> tuple[str, float]:
    path, equals, text = source.rpartition("=")
    if not equals:
        return source, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise LoadError(f"--lora {source}: the weight after = is {text!r}, expected a number")
    return path, weight


def _file_of(path: str) -> Path:
    """The one weights file that a path, folder or hub id means."""
    given = Path(path).expanduser()
    if given.is_file():
        if given.suffix != ".safetensors":
            raise LoadError(f"--lora {path}: is no .safetensors file; pickles are not read")
        return given
    folder = resolve(path, "--lora", snapshot(("*.safetensors",)))
    found = sorted(folder.glob("*.safetensors"))
    if (usual := folder / _USUAL_NAME) in found:
        return usual
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise LoadError(f"--lora {path}: name one of the .safetensors files in {folder} ({names})")
    return found[0]
