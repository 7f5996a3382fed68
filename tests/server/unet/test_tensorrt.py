"""TensorRT-RTX reads and builds the graph without a GPU; what goes wrong is one clear line."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.unet import tensorrt_build
from turbolens_server.unet.artifacts import ArtifactCache
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.cli import main
from turbolens_server.unet.export import GRAPH_FILE
from turbolens_server.unet.tensorrt_api import current_target, find_tensorrt
from turbolens_server.unet.tensorrt_build import PLAN_FILE, Bucket, build_plan, ensure_engine
from turbolens_server.unet.tensorrt_unet import buckets_of, deserialize, find_engine, split_batch

TARGET = "sm89"
BUCKETS = [Bucket(1, 16, 16)]


@pytest.fixture(scope="module")
def tensorrt():
    pytest.importorskip("tensorrt_rtx_bindings")
    return find_tensorrt()


@pytest.fixture(scope="module")
def built(tensorrt, half_graph, graph_cache):
    """An engine of the small model: (cache, graph, engine)."""
    spec, graph = half_graph
    cache = ArtifactCache(graph_cache)
    return cache, graph, ensure_engine(cache, graph, spec, tensorrt, TARGET, BUCKETS)


def test_an_engine_is_built_without_a_gpu_and_found_again(built, tensorrt, half_graph):
    cache, graph, engine = built
    assert (engine.folder / PLAN_FILE).stat().st_size > graph.size / 2
    assert find_engine(cache, graph.key, tensorrt, TARGET) == engine
    assert buckets_of(engine) == BUCKETS
    assert ensure_engine(cache, graph, half_graph[0], tensorrt, TARGET, BUCKETS) == engine
    assert engine.notes["build_s"] > 0


def test_the_command_builds_the_embedded_model_and_checks_it(tensorrt, graph_cache, capsys):
    where = ["--cache", str(graph_cache)]
    build = ["build", "--dtype", "float32", "--target", TARGET, "--batches", "1", "2", *where]
    main(build)
    main(build)  # from the cache
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("engine"))
    assert first.split()[:2] == second.split()[:2]
    main(["verify", *where])
    assert first.split()[1] in capsys.readouterr().out


def test_an_engine_for_another_gpu_version_or_model_is_not_taken(built, tensorrt):
    cache, graph, _ = built
    newer = dataclasses.replace(tensorrt, version="99.0")
    for other, target in ((newer, TARGET), (tensorrt, "sm90")):
        with pytest.raises(BackendError, match=rf"{tensorrt.version} on {TARGET}\); run `turbolens engine build`"):
            find_engine(cache, graph.key, other, target)
    with pytest.raises(BackendError, match=r"holds no engine of this model .*; run"):
        find_engine(cache, {**graph.key, "model": "another"}, tensorrt, TARGET)


def test_a_truncated_engine_is_refused(built, tensorrt, tmp_path):
    _, graph, engine = built
    copy = ArtifactCache(tmp_path)
    whole = (engine.folder / PLAN_FILE).read_bytes()
    bad = copy.add("engines", engine.key, lambda folder: _write(folder, whole))
    (bad.folder / PLAN_FILE).write_bytes(whole[:-1])
    with pytest.raises(BackendError, match=r"bytes, .* were written"):
        find_engine(copy, graph.key, tensorrt, TARGET)


def _write(folder, data):
    (folder / PLAN_FILE).write_bytes(data)
    return {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_running_needs_a_gpu_and_says_so(built, tensorrt):
    with pytest.raises(BackendError, match=r"cannot load .*unet.plan"):
        deserialize(tensorrt, built[2].folder / PLAN_FILE)
    assert current_target() is None


def test_unknown_targets_are_refused(tensorrt, half_graph):
    spec, graph = half_graph
    with pytest.raises(BackendError, match=r"--target sm10: .* builds for .*sm89"):
        build_plan(tensorrt, graph.folder / GRAPH_FILE, spec, "sm10", BUCKETS)


def test_an_operator_that_tensorrt_does_not_know_is_named(tensorrt, half_graph, tmp_path):
    onnx = pytest.importorskip("onnx")
    spec, graph = half_graph
    model = onnx.load(graph.folder / GRAPH_FILE)
    model.graph.node.append(onnx.helper.make_node("FromTheFuture", ["sample"], ["x"], name="future"))
    onnx.save(model, tmp_path / "unet.onnx")
    with pytest.raises(BackendError, match=r"cannot read .*FromTheFuture"):
        build_plan(tensorrt, tmp_path / "unet.onnx", spec, TARGET, BUCKETS)


def test_too_little_memory_is_told_before_the_build(tensorrt, half_graph, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_build, "available_host_bytes", lambda root: 2**29)
    spec, graph = half_graph
    cache = ArtifactCache(tmp_path)
    with pytest.raises(BackendError, match=r"takes about .* GiB of memory and 0.5 GiB are free"):
        ensure_engine(cache, graph, spec, tensorrt, TARGET, BUCKETS)
    assert list(cache.entries()) == []


@given(st.integers(1, 40), st.sets(st.integers(1, 16), min_size=1))
def test_a_batch_is_cut_into_buckets(batch, sizes):
    buckets = [Bucket(size, 16, 16) for size in sorted(sizes)]
    runs = split_batch(batch, buckets)
    assert [row for start, stop, _ in runs for row in range(start, stop)] == list(range(batch))
    for start, stop, bucket in runs:
        assert stop - start <= bucket.batch
        assert not any(stop - start <= other.batch < bucket.batch for other in buckets), "a smaller one would do"
    assert len(runs) == -(-batch // max(sizes))
