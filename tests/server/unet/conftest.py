"""A random U-Net small enough to export and build in seconds, as a folder with SAEs."""

from __future__ import annotations

import pytest

from turbolens_server.loading.load import load_engine
from turbolens_server.unet.artifacts import ArtifactCache
from turbolens_server.unet.export import ensure_graph
from turbolens_server.unet.spec import GraphSpec


@pytest.fixture(scope="session")
def small_torch(small_model):
    """The small model on PyTorch, with SAEs at two of its blocks."""
    folder, saes = small_model
    return load_engine(model=str(folder), saes=[str(saes)], backend="torch")


@pytest.fixture(scope="session")
def small_spec(small_torch) -> GraphSpec:
    parts, info = small_torch.components, small_torch.info
    return GraphSpec.of(parts.unet.config, info.hook_points, parts.vae_downscale, info.max_prompt_tokens)


@pytest.fixture(scope="session")
def half_graph(small_model, small_spec, graph_cache):
    """The small model's graph in half precision, as TensorRT takes it: (spec, entry)."""
    engine = load_engine(model=str(small_model[0]), backend="torch", dtype="float16")
    unet, model_hash = engine.components.unet, engine.info.model_hash
    return small_spec, ensure_graph(ArtifactCache(graph_cache), unet, small_spec, model_hash)
