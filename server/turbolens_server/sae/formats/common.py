"""What the readers of foreign SAE folders share: files read with one clear error, and exact folds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from turbolens_server.files import first_line
from turbolens_server.sae.bundle import BundleError, FeatureStats, Nesting, SaeWeights


@dataclasses.dataclass(frozen=True)
class ForeignSae:
    """One SAE as a reader found it, brought to our layout and meaning of every tensor."""

    architecture: Literal["topk", "jumprelu"]
    k: int | None
    """Features active at a position, at most; None for JumpReLU."""
    weights: SaeWeights
    weights_file: Path
    config: dict[str, Any]
    """Its configuration, as the folder has it."""
    named: tuple[str, ...] = ()
    """Texts of the configuration that may name the hook point."""
    model_name: str | None = None
    """Model that it says it was trained on."""
    stats: FeatureStats | None = None
    folded: tuple[str, ...] = ()
    """What was folded into the weights, in words."""
    nesting: Nesting | None = None
    """Of a Matryoshka: the sizes at which it was trained."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        BundleError: it is missing, unreadable or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BundleError(f"{path.parent}: {path.name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: unreadable ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        BundleError: it is missing or unreadable.
    """
    if not path.is_file():
        raise BundleError(f"{path.parent}: {path.name} is missing")
    try:
        return dict(load_file(path))
    except Exception as error:  # safetensors raises many kinds for broken files
        raise BundleError(f"{path}: unreadable ({first_line(error)})") from error


def read_pickle(path: Path) -> Any:
    """A pickle of tensors and plain values; what it would run is refused, never run.

    Raises:
        BundleError: it is missing, unreadable or holds anything else.
    """
    if not path.is_file():
        raise BundleError(f"{path.parent}: {path.name} is missing")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, and advises to switch the refusal off: not repeated here
        raise BundleError(
            f"{path}: refused; it is broken, or holds more than tensors and plain values (code in it was not run)"
        ) from error


def take(state: object, names: Mapping[str, str], path: Path, *, beside: frozenset[str] = frozenset()) -> SaeWeights:
    """The tensors of an SAE, float32, under our names; transposing is the caller's.

    Args:
        state: what the file holds.
        names: their name of each of our tensors.
        path: the file, for errors.
        beside: names that may be there as well, and are not read here.

    Raises:
        BundleError: a tensor is missing, unknown, or of another kind than floats of the right rank.
    """
    if not isinstance(state, dict):
        raise BundleError(f"{path}: holds a {type(state).__name__}, expected tensors by name")
    if missing := [name for name in names.values() if name not in state]:
        raise BundleError(f"{path}: lacks {', '.join(missing)}")
    if unknown := sorted(str(name) for name in state.keys() - {*names.values(), *beside}):
        raise BundleError(f"{path}: holds {', '.join(unknown[:5])}, which this format has no meaning for")
    tensors = {}
    for ours, theirs in names.items():
        tensor, rank = state[theirs], 2 if ours.startswith("W_") else 1
        if not isinstance(tensor, Tensor):
            raise BundleError(f"{path}: {theirs} is a {type(tensor).__name__}, expected a tensor")
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise BundleError(f"{path}: {theirs} is of type {tensor.dtype}, {tensor.layout}; expected dense floats")
        if tensor.dim() != rank or 0 in tensor.shape:
            raise BundleError(f"{path}: {theirs} has shape {tuple(tensor.shape)}, expected {rank} dimensions, none 0")
        tensors[ours] = tensor.float()
    return SaeWeights(**tensors)


def vectors(state: Mapping[str, Any], names: Sequence[str], size: int, path: Path) -> tuple[Tensor, ...]:
    """Further vectors of an SAE, a number for each of `size` features.

    Raises:
        BundleError: one is absent or something else.
    """
    for name in names:
        value = state.get(name)
        if not isinstance(value, Tensor) or value.shape != (size,) or not torch.isfinite(value).all():
            raise BundleError(f"{path}: {name} is missing or no {size} finite numbers")
    return tuple(state[name].float() for name in names)


def transposed(weights: SaeWeights) -> SaeWeights:
    """`nn.Linear` keeps [out, in]: both matrices the other way round."""
    return dataclasses.replace(weights, W_enc=weights.W_enc.T.contiguous(), W_dec=weights.W_dec.T.contiguous())


def whole_number(config: Mapping[str, Any], key: str, path: Path) -> int:
    """A whole number of a configuration, 1 or more.

    Raises:
        BundleError: it is absent or something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BundleError(f"{path}: {key}={value!r}, expected a whole number from 1")
    return value


def check_settings(
    config: Mapping[str, Any],
    path: Path,
    *,
    known: str,
    only: Mapping[str, tuple[Any, str]],
) -> None:
    """Refuse what a configuration says beyond what is read here: a reader that ignores it gives wrong features.

    Args:
        config: all settings.
        path: the file, for errors.
        known: names, with spaces between, of settings that the reader reads, or that change nothing of what is encoded
            and decoded.
        only: settings that are supported at one value, and why not at others. None is "not set" for all.

    Raises:
        BundleError: a setting is unknown, or has another value.
    """
    names = set(known.split())
    for key, value in config.items():
        if key in names or value is None:
            continue
        if key not in only:
            raise BundleError(
                f"{path}: {key}={value!r} is not known here, and may change what is encoded; where it does not, take "
                "it out of the file"
            )
        supported, reason = only[key]
        if value != supported:
            raise BundleError(f"{path}: {key}={value!r} is not supported: {reason}")


def scalar(state: Mapping[str, Any], name: str, path: Path) -> float:
    """A single number of a file of tensors.

    Raises:
        BundleError: it is absent or something else.
    """
    value = state.get(name)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, (int, float)):
        return float(value)
    raise BundleError(f"{path}: {name} is missing or no single number")


def check_size(config: Mapping[str, Any], key: str, size: int, path: Path) -> None:
    """Raise BundleError where a configuration states another size than the weights have; absent is fine."""
    if (stated := config.get(key)) is not None and stated != size:
        raise BundleError(f"{path}: {key}={stated!r}, but the weights have {size}")


def plain_relu(weights: SaeWeights) -> SaeWeights:
    """ReLU is JumpReLU with all thresholds at 0."""
    return dataclasses.replace(weights, threshold=torch.zeros_like(weights.b_enc))


def gated_as_jump_relu(weights: SaeWeights, b_gate: Tensor, r_mag: Tensor) -> SaeWeights:
    """JumpReLU weights from those of a gated SAE whose `b_enc` is the magnitudes' bias.

    With u = (x - b_dec) W_enc and r = exp(r_mag) > 0, the gate u + b_gate > 0 is r u + b_mag > b_mag - r b_gate: the
    magnitude r u + b_mag against a threshold of its own (Rajamanoharan et al. 2024, arXiv 2404.16014).
    """
    rescale, b_mag = r_mag.double().exp(), weights.b_enc.double()
    return dataclasses.replace(
        weights,
        W_enc=(weights.W_enc.double() * rescale).float(),
        threshold=(b_mag - rescale * b_gate.double()).relu().float(),
    )


def scale_input(weights: SaeWeights, factor: float) -> SaeWeights:
    """Weights that read x, from weights that read factor * x and whose output is divided by the factor."""
    return dataclasses.replace(
        weights, W_enc=weights.W_enc * factor, W_dec=weights.W_dec / factor, b_dec=weights.b_dec / factor
    )


def fold_input_bias(weights: SaeWeights) -> SaeWeights:
    """Weights that read x - b_dec, from weights that read x: x W + b = (x - b_dec) W + (b + b_dec W)."""
    b_enc = weights.b_enc.double() + weights.b_dec.double() @ weights.W_enc.double()
    return dataclasses.replace(weights, b_enc=b_enc.float())


def fold_decoder_norm(weights: SaeWeights, path: Path) -> SaeWeights:
    """Unit decoder rows, from weights whose activations are meant times their decoder row's norm n.

    relu(n u) = n relu(u) and n u > n threshold wherever u > threshold, so scaling the encoder's side by n and the
    decoder's by 1 / n changes nothing; a selection among n u is the selection among the new pre-activations.

    Raises:
        BundleError: a row is zero, so that there is nothing to divide by.
    """
    norm = weights.W_dec.double().norm(dim=1)  # [d_sae]
    if (norm == 0).any():
        raise BundleError(
            f"{path}: decoder row {int((norm == 0).nonzero()[0])} is zero, and activations are divided by its norm"
        )
    threshold = weights.threshold
    return SaeWeights(
        W_enc=(weights.W_enc.double() * norm).float(),
        b_enc=(weights.b_enc.double() * norm).float(),
        W_dec=(weights.W_dec.double() / norm[:, None]).float(),
        b_dec=weights.b_dec,
        threshold=None if threshold is None else (threshold.double() * norm).float(),
    )
