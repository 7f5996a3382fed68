"""TensorRT-RTX reads and builds the graph without a GPU; what goes wrong is one clear line."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.loading.engine_cli import main
from turbolens_server.loading.load import load_engine
from turbolens_server.unet import choose, tensorrt_build
from turbolens_server.unet.artifacts import ArtifactCache
from turbolens_server.unet.backend import BackendError
from turbolens_server.unet.export import GRAPH_FILE
from turbolens_server.unet.tensorrt_api import TensorRT, current_target, find_tensorrt
from turbolens_server.unet.tensorrt_build import PLAN_FILE, Bucket, build_plan, engine_key, ensure_engine
from turbolens_server.unet.tensorrt_unet import buckets_of, deserialize, find_engine, split_batch

TARGET = "sm89"
BUCKETS = [Bucket(1, 16, 16)]
LATENT = (16, 16)


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
    assert find_engine(cache, graph.key, tensorrt, TARGET, LATENT) == engine
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
        with pytest.raises(
            BackendError, match=rf"{tensorrt.version} on {TARGET} for latents of 16x16\); run `turbolens engine build`"
        ):
            find_engine(cache, graph.key, other, target, LATENT)
    with pytest.raises(BackendError, match=r"holds no engine of this model .*; run"):
        find_engine(cache, {**graph.key, "model": "another"}, tensorrt, TARGET, LATENT)


def test_a_truncated_engine_is_refused(built, tensorrt, tmp_path):
    _, graph, engine = built
    copy = ArtifactCache(tmp_path)
    whole = (engine.folder / PLAN_FILE).read_bytes()
    bad = copy.add("engines", engine.key, lambda folder: _write(folder, whole))
    (bad.folder / PLAN_FILE).write_bytes(whole[:-1])
    with pytest.raises(BackendError, match=r"bytes, .* were written"):
        find_engine(copy, graph.key, tensorrt, TARGET, LATENT)


ANY = TensorRT("tensorrt_rtx", "1.7", None)
GRAPH = {"model": "a" * 64}


def kept(cache, graph=GRAPH, buckets=((1, 16, 16),), target=TARGET):
    """An entry as a build leaves it, with a plan that is none."""
    key = {**engine_key(graph, ANY, target), "buckets": [list(bucket) for bucket in buckets]}
    return cache.add("engines", key, lambda folder: _write(folder, b"plan"))


def test_the_engine_is_the_one_for_the_size_that_is_served(tmp_path):
    cache = ArtifactCache(tmp_path)
    small = kept(cache, buckets=((1, 16, 16), (8, 16, 16)))
    large = kept(cache, buckets=((1, 24, 24),))
    both = kept(cache, buckets=((2, 24, 24), (9, 32, 32)))
    kept(cache, buckets=((4, 16, 16),))
    assert find_engine(cache, GRAPH, ANY, TARGET, (16, 16)) == small
    assert find_engine(cache, GRAPH, ANY, TARGET, (24, 24)) == both, "the larger batches at that size"
    assert find_engine(cache, GRAPH, ANY, TARGET, (32, 32)) == both
    shutil.rmtree(both.folder)
    assert find_engine(cache, GRAPH, ANY, TARGET, (24, 24)) == large
    with pytest.raises(BackendError, match=r"for latents of 48x48 \(there is one for .*24x24.*and --size"):
        find_engine(cache, GRAPH, ANY, TARGET, (48, 48))


def test_damage_to_an_engine_that_is_not_wanted_does_not_matter(tmp_path):
    cache = ArtifactCache(tmp_path)
    wanted = kept(cache)
    others = [kept(cache, {"model": "b" * 64}), kept(cache, target="sm90"), kept(cache, buckets=((1, 24, 24),))]
    for entry in others:
        (entry.folder / PLAN_FILE).unlink()
    nothing = kept(cache, {"model": "c" * 64})
    (nothing.folder / "manifest.json").write_text("{")
    assert find_engine(cache, GRAPH, ANY, TARGET, LATENT) == wanted
    (wanted.folder / PLAN_FILE).write_bytes(b"nalp")
    with pytest.raises(BackendError, match="has changed"):
        find_engine(cache, GRAPH, ANY, TARGET, LATENT)


def test_a_damaged_engine_is_built_again_for_the_same_shapes(small_model, half_graph, tmp_path, monkeypatch, log_lines):
    """As a start does it; the GPU and its library are played."""
    model = load_engine(model=str(small_model[0]), backend="torch", dtype="float16")
    unet, model_hash = model.components.unet, model.info.model_hash
    spec, graph = half_graph
    cache = ArtifactCache(tmp_path)
    shutil.copytree(graph.folder, cache.folder("graphs", graph.key))
    whole = kept(cache, graph.key, ((1, 16, 16), (8, 16, 16)))
    (whole.folder / PLAN_FILE).write_bytes(b"nalp")
    ran = []
    monkeypatch.setattr(choose, "find_tensorrt", lambda: ANY)
    monkeypatch.setattr(choose, "current_target", lambda _: TARGET)
    monkeypatch.setattr(choose, "TensorRTRunner", lambda _, engine, *__: ran.append(engine))
    monkeypatch.setattr(tensorrt_build, "build_plan", lambda *given: memoryview(b"plan"))
    choose.open_backend("tensorrt", unet, spec, model_hash, torch.device("cuda"), cache, LATENT)
    assert [(engine.folder, engine.key) for engine in ran] == [(whole.folder, whole.key)]
    assert (whole.folder / PLAN_FILE).read_bytes() == b"plan"
    (event,) = {line["event"] for line in log_lines if line["level"] == "warning"}
    assert event == "cache entry set aside"


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
