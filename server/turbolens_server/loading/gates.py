"""The learned region gates that `--gate` names."""

from __future__ import annotations

from collections.abc import Mapping

from turbolens_server.engine.info import GateInfo
from turbolens_server.gating.bundle import CONFIG_FILE, GateError, load_gates
from turbolens_server.loading.checks import is_foreign
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hub import embedded_gates, resolve, snapshot
from turbolens_server.loading.places import EMBEDDED
from turbolens_server.unet.points import HookPoint, block_of, is_cross_attention, list_points

_PATTERNS = ("*.json", "*.safetensors")


def open_gates(
    source: str, points: Mapping[str, HookPoint], text_width: int, model_hash: str, *, force: bool, fused: bool = False
) -> GateInfo:
    """The gates of a folder or hub id, or `mini`'s own, checked against the model.

    Args:
        source: what `--gate` says.
        points: every hook point of the model, attention layers included.
        text_width: of the text's hidden states.
        model_hash: of the model's U-Net.
        force: take gates of another model too.
        fused: the model is not the one of its folder.

    Raises:
        LoadError: they cannot be read, or do not fit the model.
    """
    folder = embedded_gates() if source == EMBEDDED else resolve(source, "--gate", snapshot(_PATTERNS))
    if not (folder / CONFIG_FILE).is_file():
        raise LoadError(f"--gate {source}: no gates in {folder} ({CONFIG_FILE} is missing)")
    try:
        bundle = load_gates(folder)
    except GateError as error:
        raise LoadError(f"--gate {error}") from error
    what, flag = f"--gate {source}", None if force else "--force-gate"
    foreign = is_foreign(what, "them", bundle.model_hash, model_hash, fused=fused, force=flag)
    layers: dict[str, list[str]] = {}
    for block, head in bundle.head_of.items():
        layers[block] = [name for name in points if is_cross_attention(name) and block_of(name) == block]
        if not layers[block]:
            has = list_points({block_of(name): None for name in points if is_cross_attention(name)})
            raise LoadError(f"--gate {source}: the model has no cross-attention in {block}; it has some in {has}")
        widths = (bundle.heads[head].features.norm_bias.numel(), bundle.heads[head].tokens.norm_bias.numel())
        expected = (points[layers[block][0]].d_model, text_width)
        if widths != expected:
            raise LoadError(
                f"--gate {source}: head {head} reads positions of {widths[0]} and tokens of {widths[1]} dimensions, "
                f"and {block} has {expected[0]} and {expected[1]}"
            )
    gates = bundle.gates({block: layers[block] for block in points if block in layers})
    return GateInfo(bundle, gates, foreign, source)
