"""Export the U-Net to ONNX: one graph for every batch and size, checked against PyTorch before anybody may use it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from turbolens_server.unet.artifacts import ArtifactCache, Entry
from turbolens_server.unet.backend import BackendError, need
from turbolens_server.unet.graph import SteerableUNet
from turbolens_server.unet.onnx_unet import OnnxRunner
from turbolens_server.unet.spec import GraphSpec
from turbolens_server.unet.tapped import attention_blocks

GRAPH_FILE: Final = "unet.onnx"
"""Within an entry; the weights are beside it in a file of its own."""
TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 2e-2}
"""Most that an output may differ from PyTorch's, as a share of the largest magnitude in it."""
MAX_BATCH: Final = 63
"""From 64 rows on, diffusers' upsampler takes another path."""
_VERSION: Final = 2
"""Of the graph's inputs, outputs and meaning: raise it when one of them changes."""
_OFFSET: Final = 64.0
"""Added to the latents of one row when a graph is checked: groups of channels with means far above their spread."""
_MAX_ROWS: Final = 64  # of the coarsest grid: pictures of 2,048 pixels


def opset_for(unet: UNet2DConditionModel, dtype: torch.dtype) -> int:
    """The ONNX opset to export in.

    From opset 23 attention is one node, for which TensorRT has kernels in half precision and for heads of width 64
    only; it refuses to build the node for others, so those are written out in the nodes of opset 20.
    """
    widths = {attention.config.attention_head_dim for _, _, attention in attention_blocks(unet)}
    return 23 if dtype == torch.float16 and widths == {64} else 20


def graph_key(unet: UNet2DConditionModel, spec: GraphSpec, model_hash: str, dtype: torch.dtype) -> dict[str, Any]:
    """All that decides a graph, in values that JSON can hold."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    hearing = {"hearing": list(spec.hearing)} if spec.hearing else {}
    return hearing | {
        "version": _VERSION,
        "model": model_hash,
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "points": [point.name for point in spec.points],
        "tokens": spec.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "opset": opset_for(unet, dtype),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def ensure_graph(cache: ArtifactCache, unet: UNet2DConditionModel, spec: GraphSpec, model_hash: str) -> Entry:
    """The exported graph of a U-Net on the CPU, from the cache or made and checked now.

    Raises:
        BackendError: a package is missing, the U-Net's type cannot be exported, the graph does not give what PyTorch
            gives, or the cache cannot be used.
    """
    dtype = next(unet.parameters()).dtype
    if dtype not in TOLERANCE:
        raise BackendError(f"{dtype} is not exported; use --dtype float32 or float16")
    key = graph_key(unet, spec, model_hash, dtype)

    def make(folder: Path) -> dict[str, Any]:
        write_graph(unet, spec, folder / GRAPH_FILE, key["opset"])
        return {"differs_by": check_graph(folder / GRAPH_FILE, unet, spec)}

    weights = sum(tensor.numel() * tensor.element_size() for tensor in unet.parameters())
    return cache.add("graphs", key, make, needs_bytes=weights)


@torch.no_grad()
def write_graph(unet: UNet2DConditionModel, spec: GraphSpec, path: Path, opset: int) -> None:
    """Export a U-Net; inputs and outputs as in :class:`SteerableUNet`, by the names that the spec tells."""
    for module in ("onnx", "onnxscript"):
        need(module, "onnx")
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    rows = torch.export.Dim("rows", min=2, max=_MAX_ROWS)
    columns = torch.export.Dim("columns", min=2, max=_MAX_ROWS)
    tokens = torch.export.Dim("tokens", min=2)

    def grid_dims(stride: int) -> dict[int, Any]:
        """Named after the coarsest grid, of which every other is a multiple."""
        finer = spec.stride // stride
        return {0: batch, 2: finer * rows if finer > 1 else rows, 3: finer * columns if finer > 1 else columns}

    def hearing_dims(stride: int) -> dict[int, Any]:
        _, rows, columns = grid_dims(stride).values()
        return {0: batch, 1: rows, 2: columns, 3: tokens}

    # Shapes of the trace: no two dynamic dimensions alike, or the graph could take one for the other.
    inputs = random_inputs(spec, next(unet.parameters()).dtype, batch=2, rows=4, columns=3)
    shapes: dict[str, Any] = {"sample": grid_dims(1)}
    shapes |= {name: {0: batch} for name in ("timestep", "text", "pooled", "time_ids")}
    if spec.hearing:
        shapes["text"] = {0: batch, 1: tokens}
        shapes["hearing"] = tuple(hearing_dims(stride) for stride in spec.hearing)
    if at_points := tuple(grid_dims(point.stride) for point in spec.points):
        shapes |= {"gains": at_points, "biases": at_points}
    program = torch.onnx.export(
        SteerableUNet(unet, spec).eval(),
        kwargs=_as_arguments(inputs, spec),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=list(spec.input_names()),
        output_names=list(spec.output_names()),
        opset_version=opset,
        custom_translation_table={torch.ops.aten.group_norm.default: _group_norm},
        verbose=False,
    )
    if program is None:
        raise AssertionError("a dynamo export gives a program")
    program.save(path, external_data=True)


def _group_norm(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001, part of the operator
) -> Any:
    """Group normalization as ONNX has it up to opset 20.

    The node of opset 21 takes variances as differences of large numbers in ONNX Runtime's CPU code: where a group's
    mean is 1,000 times its spread, errors are .4 and more, and 5e-4 so (`findings/onnx-group-normalization.sh`).
    """
    import onnxscript

    op: Any = onnxscript.opset20

    def per_group(value: float) -> Any:
        number = op.CastLike(op.Constant(value_float=value), input)
        return op.Expand(number, op.Constant(value_ints=[num_groups]))

    groups = op.Reshape(input, op.Constant(value_ints=[0, num_groups, -1]))
    normed = op.Reshape(op.InstanceNormalization(groups, per_group(1.0), per_group(0.0), epsilon=eps), op.Shape(input))
    axes = op.Constant(value_ints=[1, 2])
    return op.Add(op.Mul(normed, op.Unsqueeze(weight, axes)), op.Unsqueeze(bias, axes))


@torch.no_grad()
def check_graph(path: Path, unet: UNet2DConditionModel, spec: GraphSpec) -> dict[str, float]:
    """Compare an exported graph with the U-Net it came from: on another batch, size and, where it takes any, number of
    tokens than it was traced at, steered.

    Returns:
        By output, the largest difference as a share of the largest magnitude.

    Raises:
        BackendError: an output differs by more than TOLERANCE.
    """
    dtype = next(unet.parameters()).dtype
    asked = dataclasses.replace(spec, tokens=3 * spec.tokens) if spec.hearing else spec
    inputs = random_inputs(asked, dtype, batch=3, rows=2, columns=4)
    inputs["sample"][-1] += _OFFSET
    expected = dict(zip(spec.output_names(), SteerableUNet(unet, spec)(**_as_arguments(inputs, spec)), strict=True))
    given = {name: tensor.new_empty(tensor.shape) for name, tensor in expected.items()}
    # As written, without ONNX Runtime's own rewriting: less memory, and it is the graph that is on trial.
    OnnxRunner(path, torch.device("cpu"), optimize=False)(inputs, given)
    found = {name: _difference(given[name], tensor) for name, tensor in expected.items()}
    if wrong := {name: share for name, share in found.items() if not share <= TOLERANCE[dtype]}:
        name, share = max(wrong.items(), key=lambda item: item[1])
        raise BackendError(
            f"the exported graph does not give what PyTorch gives: {name} differs by {share:.1e} of its largest value, "
            f"{TOLERANCE[dtype]:.0e} is allowed in {dtype}"
        )
    return found


def random_inputs(spec: GraphSpec, dtype: torch.dtype, *, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
    """Normal inputs of a graph, steering included, for `rows` x `columns` cells of its coarsest grid."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name in spec.input_names():
        shape = spec.input_shape(name, batch, rows * spec.stride, columns * spec.stride)
        inputs[name] = torch.randn(shape, generator=generator).to(spec.input_dtype(name, dtype))
        if name.startswith("hearing."):  # half of the tokens are not heard
            inputs[name] = inputs[name].clamp(min=0).log()
    inputs["timestep"] = torch.linspace(0, 999, batch)
    return inputs


def _as_arguments(inputs: dict[str, Tensor], spec: GraphSpec) -> dict[str, Any]:
    """Named inputs as the arguments of :class:`SteerableUNet`; the exporter takes no empty tuples."""
    groups = {"hearing": "hearing", "gain": "gains", "bias": "biases"}
    found: dict[str, Any] = {}
    for name in spec.input_names():
        kind, _, which = name.partition(".")
        if which:
            found[groups[kind]] = (*found.get(groups[kind], ()), inputs[name])
        else:
            found[kind] = inputs[name]
    return found


def _difference(given: Tensor, expected: Tensor) -> float:
    return float((given.double() - expected.double()).abs().max() / expected.double().abs().max())
