"""Phrases under masks, and learned region gates."""

from __future__ import annotations

from collections.abc import Sequence

from turbolens_proto.v1 import run_pb2
from turbolens_server.engine.types import Region
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.rpc.validation.masks import MaskChecks
from turbolens_server.rpc.validation.sources import check_prompt
from turbolens_server.steering.masks import GridMask


def check_regions(
    checks: Checks, masks: MaskChecks, field: str, regions: Sequence[run_pb2.Region], size: tuple[int, int]
) -> tuple[Region, ...]:
    """The regions, each with its mask on the grids of this run.

    Args:
        checks: where what is wrong goes.
        masks: of the request, which share a bound.
        field: path of the list.
        regions: as many as are allowed at most.
        size: (height, width) of the picture in pixels.
    """
    if regions and not checks.info.region_strides:
        other = " or --onnx-regions --dtype float32" if checks.info.backend == "onnx" else ""
        checks.wrong(field, f"the backend {checks.info.backend} serves none; serve with --backend torch{other}")
        return ()
    found = []
    for i, region in enumerate(regions):
        path = f"{field}[{i}]"
        if not region.prompt:
            checks.wrong(f"{path}.prompt", "is empty; say what is to be there")
        check_prompt(checks, f"{path}.prompt", region.prompt)
        if not region.HasField("mask"):
            checks.wrong(f"{path}.mask", "is missing; a phrase that is heard everywhere belongs in the prompt")
            continue
        before, mask = len(checks.violations), masks.mask(f"{path}.mask", region.mask)
        if mask is None or len(checks.violations) > before:
            continue
        grids = {(size[0] // stride, size[1] // stride) for stride in checks.info.region_strides}
        found.append(Region(GridMask({grid: mask.on_grid(*grid) for grid in grids}), region.prompt))
    return tuple(found)


def check_gate(checks: Checks, field: str, *, gate: bool) -> None:
    """Whether the text can be heard through learned gates."""
    if gate and checks.info.gate is None:
        takes = "no learned region gates are served; serve with --gate PATH"
        none = f"the backend {checks.info.backend} takes no learned region gates; serve with --backend torch"
        checks.wrong(field, takes if checks.info.opens_attention else none)
