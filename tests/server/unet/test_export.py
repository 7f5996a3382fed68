"""The export: what the graph looks like, and that a wrong one is not handed out."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from turbolens_server.unet import export
from turbolens_server.unet.artifacts import ArtifactCache
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.export import GRAPH_FILE, TOLERANCE, check_graph, ensure_graph, graph_key
from turbolens_server.unet.onnx_unet import OnnxRunner

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def dimensions(value) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_have_names_and_named_dimensions(half_graph):
    spec, entry = half_graph
    graph = onnx.load(entry.folder / GRAPH_FILE, load_external_data=False).graph
    inputs = {value.name: dimensions(value) for value in graph.input}
    outputs = {value.name: dimensions(value) for value in graph.output}
    assert tuple(inputs) == spec.input_names()
    assert tuple(outputs) == spec.output_names()
    assert inputs["sample"] == ["batch", 4, "2*rows", "2*columns"]
    assert inputs["text"] == ["batch", spec.tokens, spec.text_dim]
    assert inputs["gain.mid.0"] == ["batch", 1, "rows", "columns"]
    assert inputs["bias.mid.0"] == ["batch", 64, "rows", "columns"]
    assert outputs["update.mid.0"][0] == "batch"
    assert outputs["update.mid.0"][2] == 64
    assert {node.op_type for node in graph.node} >= {"Attention"}, "half precision takes attention as one node"


def test_a_graph_that_takes_a_bias_has_texts_of_any_length(small_torch, small_spec, graph_cache):
    parts, info = small_torch.components, small_torch.info
    unet, strides = parts.unet, [stride // parts.vae_downscale for stride in info.region_strides]
    spec = dataclasses.replace(small_spec, hearing=tuple(strides))
    entry = ensure_graph(ArtifactCache(graph_cache), unet, spec, info.model_hash)
    graph = onnx.load(entry.folder / GRAPH_FILE, load_external_data=False).graph
    inputs = {value.name: dimensions(value) for value in graph.input}
    assert tuple(inputs) == spec.input_names()
    assert inputs["text"] == ["batch", "tokens", spec.text_dim]
    assert inputs["hearing.2"] == ["batch", "rows", "columns", "tokens"]
    assert max(entry.notes["differs_by"].values()) <= TOLERANCE[torch.float32]


def test_groups_far_from_zero_keep_their_precision(half_graph, tmp_path):
    """As real activations have them; random normal ones would hide it."""
    _, entry = half_graph
    graph = onnx.load(entry.folder / GRAPH_FILE, load_external_data=False).graph
    assert "GroupNormalization" not in {node.op_type for node in graph.node}
    norm = torch.nn.GroupNorm(2, 8).eval()
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)) + 1000
    path = tmp_path / "norm.onnx"
    torch.onnx.export(
        norm, (x,), dynamo=True, opset_version=23, verbose=False,
        custom_translation_table={torch.ops.aten.group_norm.default: export._group_norm},
    ).save(path)  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = norm.double()(x.double()).float()
    assert (torch.from_numpy(found) - expected).abs().max() < 5e-3


def test_the_measured_differences_are_kept(half_graph):
    spec, entry = half_graph
    assert entry.notes["differs_by"].keys() == set(spec.output_names())
    assert 0 < max(entry.notes["differs_by"].values()) <= TOLERANCE[torch.float16]


def test_a_graph_that_drifts_is_refused(half_graph, small_torch):
    spec, entry = half_graph
    unet = copy.deepcopy(small_torch.components.unet).half()
    path = entry.folder / GRAPH_FILE
    check_graph(path, unet, spec)
    weight = unet.mid_block.attentions[0].proj_out.weight
    with torch.no_grad():
        weight.mul_(1.05)
        with pytest.raises(BackendError, match=r"does not give what PyTorch gives: .* differs by .* is allowed"):
            check_graph(path, unet, spec)
        weight.fill_(torch.nan)
        with pytest.raises(BackendError, match="does not give"):
            check_graph(path, unet, spec)


def test_a_refused_graph_is_not_kept(half_graph, small_torch, monkeypatch, tmp_path):
    spec, _ = half_graph
    monkeypatch.setattr("turbolens_server.unet.export.write_graph", lambda *arguments: None)
    cache = ArtifactCache(tmp_path)
    with pytest.raises(BackendError, match="cannot load"):
        ensure_graph(cache, small_torch.components.unet, spec, "hash")
    assert list(cache.entries()) == []


def test_all_that_decides_a_graph_is_in_its_key(half_graph, small_torch):
    spec, _ = half_graph
    unet = small_torch.components.unet
    keys = [
        graph_key(unet, spec, "one", torch.float16),
        graph_key(unet, spec, "two", torch.float16),
        graph_key(unet, spec, "one", torch.float32),
        graph_key(unet, dataclasses.replace(spec, points=spec.points[:1]), "one", torch.float16),
        graph_key(unet, dataclasses.replace(spec, hearing=(2,)), "one", torch.float16),
    ]
    assert len({str(key) for key in keys}) == len(keys)
    assert keys[0]["opset"] == 23
    assert keys[2]["opset"] == 20, "TensorRT has no attention kernel in float32"


def test_bfloat16_is_refused(small_torch, half_graph, tmp_path):
    unet = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="--dtype float32 or float16"):
        ensure_graph(ArtifactCache(tmp_path), unet, half_graph[0], "hash")


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "unet.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"ONNX Runtime .* cannot load"):
        OnnxRunner(tmp_path / "unet.onnx", torch.device("cpu"))
    onnx_has_no_gpu = "CUDAExecutionProvider" not in pytest.importorskip("onnxruntime").get_available_providers()
    if onnx_has_no_gpu:
        with pytest.raises(BackendError, match="has no CUDAExecutionProvider"):
            OnnxRunner(tmp_path / "unet.onnx", torch.device("cuda"))
