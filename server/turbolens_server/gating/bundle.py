"""Learned region gates as a folder.

gates.json          format, version, model_hash, threshold, closed, blocks (head -> blocks of the U-Net)
gates.safetensors   of each head HEAD.features.* and HEAD.tokens.* (norm_weight, norm_bias [d]; in_weight [h, d],
                    in_bias [h]; out_weight [h, h], out_bias [h]) and HEAD.bias []
provenance.json     recipe, data, measured quality   (optional)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from turbolens_server.files import first_line, hash_files, read_object, whole_folder
from turbolens_server.gating.gates import Gates
from turbolens_server.gating.maths import GateHead, GateMlp

FORMAT: Final = "turbolens-gates"
_VERSION: Final = 1
CONFIG_FILE: Final = "gates.json"
_WEIGHTS_FILE: Final = "gates.safetensors"
_PROVENANCE_FILE: Final = "provenance.json"


class GateError(ValueError):
    """A folder that holds no gates; the text names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class GateBundle:
    """Gates with everything in their folder, on the CPU in float32."""

    heads: Mapping[str, GateHead]
    blocks: Mapping[str, tuple[str, ...]]
    """The blocks of each head, by their hook points: every cross-attention in them has its gate."""
    threshold: float
    closed: float
    model_hash: str | None
    """Hash of the U-Net they were trained on; None where the folder does not say."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hash: str = ""
    """SHA-256 of configuration and weights."""

    @property
    def head_of(self) -> dict[str, str]:
        """The head of each block."""
        return {block: head for head, blocks in self.blocks.items() for block in blocks}

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name."""
        found: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            for part in ("features", "tokens"):
                found |= {f"{name}.{part}.{w}": t for w, t in getattr(head, part)._asdict().items()}
            found[f"{name}.bias"] = head.bias
        return found

    def gates(self, layers: Mapping[str, list[str]]) -> Gates:
        """Ready to run; `layers` are the cross-attentions of each block by their hook points, in order of execution."""
        of = {layer: self.head_of[block] for block, within in layers.items() for layer in within}
        return Gates(self.heads, of, self.threshold, self.closed)


def save_gates(folder: Path, bundle: GateBundle) -> None:
    """Write gates, whole or not at all, in place of those that were there.

    Raises:
        WriteError: they cannot be written; the older ones stay as they were.
    """
    config = {
        "format": FORMAT,
        "version": _VERSION,
        "model_hash": bundle.model_hash,
        "threshold": bundle.threshold,
        "closed": bundle.closed,
        "blocks": {head: list(blocks) for head, blocks in bundle.blocks.items()},
    }
    with whole_folder(folder, replace=True) as whole:
        (whole / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (whole / _WEIGHTS_FILE).write_bytes(save({n: t.float().contiguous() for n, t in bundle.tensors().items()}))
        (whole / _PROVENANCE_FILE).write_text(json.dumps(dict(bundle.provenance), indent=2) + "\n")


def load_gates(folder: Path) -> GateBundle:
    """Read gates.

    Raises:
        GateError: a file is missing, malformed or disagrees with another.
    """
    for name in (CONFIG_FILE, _WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise GateError(f"{folder}: {name} is missing")
    config = read_object(folder / CONFIG_FILE, GateError)
    where = f"{folder / CONFIG_FILE}"
    if config.get("format") != FORMAT or config.get("version") != _VERSION:
        told = f"{config.get('format')!r}, version {config.get('version')!r}"
        raise GateError(f"{where}: format {told}; read is {FORMAT!r}, version {_VERSION}")
    threshold, closed, model_hash = (config.get(key) for key in ("threshold", "closed", "model_hash"))
    if not (_number(threshold) and 0 <= threshold <= 1):
        raise GateError(f"{where}: threshold is {threshold!r}, expected 0 to 1")
    if not (_number(closed) and -6e4 <= closed < 0):  # in half precision too
        raise GateError(f"{where}: closed is {closed!r}, expected below 0, at least -60000")
    if not (model_hash is None or isinstance(model_hash, str)):
        raise GateError(f"{where}: model_hash is {model_hash!r}, expected text")
    blocks = _read_blocks(config.get("blocks"), where)
    try:
        tensors = load_file(folder / _WEIGHTS_FILE)
    except Exception as error:  # safetensors raises many kinds for broken files
        raise GateError(f"{folder / _WEIGHTS_FILE}: unreadable ({first_line(error)})") from error
    heads = _read_heads(tensors, list(blocks), f"{folder / _WEIGHTS_FILE}")
    provenance = read_object(folder / _PROVENANCE_FILE, GateError) if (folder / _PROVENANCE_FILE).exists() else {}
    hashed = hash_files([folder / CONFIG_FILE, folder / _WEIGHTS_FILE])
    return GateBundle(heads, blocks, float(threshold), float(closed), model_hash, provenance, hashed)


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_blocks(value: object, where: str) -> dict[str, tuple[str, ...]]:
    if not (isinstance(value, dict) and value):
        raise GateError(f"{where}: blocks is {value!r}, expected an object of heads with their blocks")
    found = {}
    for head, blocks in value.items():
        if not (isinstance(blocks, list) and blocks and all(isinstance(block, str) for block in blocks)):
            raise GateError(f"{where}: blocks of head {head} are {blocks!r}, expected a list of names")
        found[head] = tuple(blocks)
    every = [block for blocks in found.values() for block in blocks]
    if doubled := {block for block in every if every.count(block) > 1}:
        raise GateError(f"{where}: blocks named twice: {', '.join(sorted(doubled))}")
    return found


def _read_heads(tensors: Mapping[str, Tensor], names: list[str], where: str) -> dict[str, GateHead]:
    parts = [f"{part}.{field}" for part in ("features", "tokens") for field in GateMlp._fields]
    expected = {f"{name}.{part}" for name in names for part in (*parts, "bias")}
    if set(tensors) != expected:
        missing, more = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise GateError(f"{where}: missing are {missing}, and nobody knows {more}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise GateError(f"{where}: {name} holds values that are not floating-point, or not finite")
    heads = {}
    for name in names:
        mlps = [
            GateMlp(*(tensors[f"{name}.{part}.{field}"].float() for field in GateMlp._fields))
            for part in ("features", "tokens")
        ]
        heads[name] = GateHead(mlps[0], mlps[1], tensors[f"{name}.bias"].float())
        hidden = mlps[0].out_bias.numel()
        for part, mlp in zip(("features", "tokens"), mlps, strict=True):
            d = mlp.norm_weight.numel()
            shapes = ((d,), (d,), (hidden, d), (hidden,), (hidden, hidden), (hidden,))
            for field, tensor, shape in zip(GateMlp._fields, mlp, shapes, strict=True):
                if tuple(tensor.shape) != shape:
                    raise GateError(f"{where}: {name}.{part}.{field} has shape {tuple(tensor.shape)}, expected {shape}")
        if heads[name].bias.ndim:
            raise GateError(f"{where}: {name}.bias has shape {tuple(heads[name].bias.shape)}, expected ()")
    return heads
