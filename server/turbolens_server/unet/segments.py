"""A pass of the U-Net as a chain of graphs that end at the hook points.

The tapped walk is traced once, whole, with a mark at every hook point. Between two marks lies a segment: a graph of its
own that takes what earlier ones left for it, so that each can be compiled by itself, and between two of them a tap
reads and steers the update in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, fx, nn

from turbolens_server.unet.compiled import MOST, STEERED, Segment
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.tapped import tapped_forward


@torch.library.custom_op("turbolens::hook_point", mutates_args=())
def _mark(update: Tensor, point: str, rows: int, columns: int) -> Tensor:  # noqa: ARG001  # read in the graph
    """Where a segment ends; it is traced and never runs."""
    return update.clone()


@_mark.register_fake
def _(update: Tensor, point: str, rows: int, columns: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(update)


class _Whole(nn.Module):
    def __init__(self, unet: UNet2DConditionModel, points: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self._at = frozenset(points)

    def forward(self, sample: Tensor, timestep: Tensor, *heard: Tensor) -> Tensor:
        def mark(point: str, update: Tensor, grid: tuple[int, int]) -> Tensor:
            marked: Tensor = _mark(update, point, *grid)
            return marked

        prediction = tapped_forward(self.unet, sample, timestep, Conditions(*heard), tap=mark, at=self._at)
        if prediction is None:
            raise AssertionError("a pass that is not stopped predicts")
        return prediction


def cut_at_points(
    unet: UNet2DConditionModel, points: Sequence[str], inputs: Sequence[Tensor]
) -> tuple[tuple[str, ...], list[Segment]]:
    """Trace a pass and cut it.

    Args:
        unet: whose weights the segments share.
        points: hook points at which to cut.
        inputs: sample [B, C, h, w], timestep [B] and the tensors of :class:`Conditions`. Their shapes are then fixed,
            but the batch where it is more than 1, which stays open from 2 to `MOST`.

    Returns:
        Names of the inputs, and the segments in order.
    """
    whole = _Whole(unet, points).eval()
    traced = trace(whole, inputs)
    graph = traced.module(check_guards=False)
    nodes = list(graph.graph.nodes)
    names = tuple(node.name for node in nodes if node.op == "placeholder")
    segment_of, marks = _place(nodes)
    (result,) = next(node for node in nodes if node.op == "output").args
    (prediction,) = result if isinstance(result, tuple | list) else (result,)
    segments = []
    for number in range(len(marks) + 1):
        mark = marks[number] if number < len(marks) else None
        last: Any = prediction if mark is None else mark.args[0]
        own = [node for node in nodes if segment_of.get(node) == number]
        gives = [
            node
            for node in own
            if node is not last
            and not _is_batch(node)
            and any(segment_of.get(user, number) > number for user in node.users)
        ]
        segments.append(_segment(graph, own, [*gives, last], marks[number - 1] if number else None, mark))
    return names, segments


def trace(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """A module as `torch.export` has it, for the shapes of the inputs; see `cut_at_points` of their batch."""
    batch = len(inputs[0])
    shapes = [{0: torch.export.Dim("batch", min=2, max=MOST)} if batch > 1 else None for _ in inputs]
    # Its one argument is variadic where the number of inputs varies.
    variadic = isinstance(module, _Whole)
    dynamic = (*shapes[:2], tuple(shapes[2:])) if variadic else tuple(shapes)
    with torch.no_grad():
        return torch.export.export(module, tuple(inputs), dynamic_shapes=dynamic, strict=False)


def _is_batch(node: fx.Node) -> bool:
    """Whether a node is the batch's size, the one number that is open."""
    return node.target is torch.ops.aten.sym_size.int


def _place(nodes: Sequence[fx.Node]) -> tuple[dict[fx.Node, int], list[fx.Node]]:
    """The number of each computing node's segment, and the marks in order."""
    segment_of: dict[fx.Node, int] = {}
    marks: list[fx.Node] = []
    for node in nodes:
        if node.target is torch.ops.turbolens.hook_point.default:
            marks.append(node)
        elif node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue  # of types, which do not change
        elif node.op == "call_function":
            segment_of[node] = len(marks)
        elif node.op not in ("placeholder", "get_attr", "output"):
            raise AssertionError(f"a traced pass has no {node.op}")
    return segment_of, marks


def _segment(
    root: fx.GraphModule, own: Sequence[fx.Node], gives: Sequence[fx.Node], before: fx.Node | None, end: fx.Node | None
) -> Segment:
    inside = set(own)
    needed = list(dict.fromkeys(n for node in own for n in node.all_input_nodes if n not in inside))
    taken = [node for node in needed if node.op != "get_attr" and not _is_batch(node)]
    graph = fx.Graph()
    copies = {node: graph.placeholder(STEERED if node is before else node.name) for node in taken}
    for node in needed:
        if node.op == "get_attr":
            copies[node] = graph.get_attr(str(node.target))
        elif _is_batch(node):
            copies[node] = graph.call_function(torch.ops.aten.sym_size.int, (copies[taken[0]], 0))
    for node in own:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in gives))
    return Segment(
        takes=tuple(copies[node].name for node in taken),
        gives=tuple(node.name for node in gives),
        point=None if end is None else str(end.args[1]),
        grid=(0, 0) if end is None else (int(end.args[2]), int(end.args[3])),  # type: ignore[arg-type]
        module=fx.GraphModule(root, graph),
    )
