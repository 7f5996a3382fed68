"""The attention layers as hook points, held to the modules of diffusers' own forward."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.bundle import SaeWeights, save_bundle
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.unet.attention_taps import with_attention_points
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.fused import FusedBlocks
from turbolens_server.unet.points import block_of, is_z, list_points
from turbolens_server.unet.tapped import find_hook_points, tapped_forward
from turbolens_server.unet.torch_unet import TorchUNet
from turbolens_training.activations.stream import collect_updates


def arguments(engine: Engine) -> tuple[Tensor, Tensor, Conditions]:
    unet, g = engine.components.unet, torch.Generator().manual_seed(0)
    edge = unet.config.sample_size
    sample = torch.randn(2, unet.config.in_channels, edge, edge, generator=g)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=g)
    pooled = engine.components.text.encode("a star").pooled.repeat(2, 1)
    return sample, torch.tensor(499), Conditions(text, pooled, torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2))


def points_of(engine: Engine):
    unet = engine.components.unet
    return with_attention_points(unet, find_hook_points(unet, engine.components.vae_downscale))


@pytest.fixture(params=["mini", "tiny"])
def either(request: pytest.FixtureRequest, engine: Engine, tiny_engine: Engine) -> Engine:
    return {"mini": engine, "tiny": tiny_engine}[request.param]


@torch.inference_mode()
def test_every_layer_gives_what_the_module_gives_and_changes_no_bit(either: Engine) -> None:
    unet, args = either.components.unet, arguments(either)
    points = points_of(either)
    sample, timestep, conditions = args
    expected: dict[str, Tensor] = {}
    layers = [point for name, point in points.items() if name != block_of(name)]
    hooks = [
        unet.get_submodule(f"{point.module.removesuffix('.z')}.to_out.0").register_forward_hook(
            lambda _, given, output, name=point.name: expected.__setitem__(name, given[0] if is_z(name) else output)
        )
        for point in layers
    ]
    try:
        added = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
        prediction = unet(sample, timestep, conditions.hidden, added_cond_kwargs=added, return_dict=False)[0]
    finally:
        for hook in hooks:
            hook.remove()

    seen: list[str] = []

    def tap(name: str, update: Tensor, grid: tuple[int, int]) -> Tensor:
        seen.append(name)
        point = points[name]
        assert update.shape == (2, grid[0] * grid[1], point.d_model)
        assert grid == point.grid(*(edge * either.components.vae_downscale for edge in sample.shape[2:]))
        if name in expected:
            assert torch.equal(update, expected[name])
        return update

    assert torch.equal(prediction, tapped_forward(unet, *args, tap=tap, at=frozenset(points)))
    assert seen == list(points), "the order of the points is the order of execution"
    assert len(expected) == len(layers) > 0
    assert sum(map(is_z, expected)) == len(layers) / 2


@torch.inference_mode()
def test_steering_one_layer_reaches_the_picture_and_no_earlier_point(tiny_engine: Engine) -> None:
    args, points = arguments(tiny_engine), list(points_of(tiny_engine))
    at = "mid.0.attn2.0"

    def run(change: float) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def tap(name: str, update: Tensor, _: tuple[int, int]) -> Tensor:
            seen[name] = update
            return update + change if name == at else update

        prediction = tapped_forward(tiny_engine.components.unet, *args, tap=tap, at=frozenset(points))
        assert prediction is not None
        return prediction, seen

    (plain, before), (steered, after) = run(0.0), run(1.0)
    assert not torch.equal(plain, steered)
    changed = [name for name in points if not torch.equal(before[name], after[name])]
    assert changed == points[points.index(at) + 1 :]


@torch.inference_mode()
@pytest.mark.parametrize("at", ["mid.0.attn2.0.z", "up.0.0.attn1.0.z"])
def test_what_is_added_at_z_reaches_the_layers_output_through_its_projection(tiny_engine: Engine, at: str) -> None:
    """x' = x + Δ there is o' = o + W_O Δ behind it, and nothing else, for the rows that are steered alone."""
    args, layer = arguments(tiny_engine), at.removesuffix(".z")
    point = points_of(tiny_engine)[layer]
    projection = tiny_engine.components.unet.get_submodule(f"{point.module}.to_out.0")
    delta = torch.randn(point.d_model, generator=torch.Generator().manual_seed(1))

    def run(change: Tensor) -> tuple[Tensor, Tensor]:
        seen: dict[str, Tensor] = {}

        def tap(name: str, update: Tensor, _: tuple[int, int]) -> Tensor:
            seen[name] = update
            return update + torch.stack([0 * change, change])[:, None] if name == at else update

        prediction = tapped_forward(tiny_engine.components.unet, *args, tap=tap, at=frozenset([at, layer]))
        assert prediction is not None
        return prediction, seen[layer]

    (plain, before), (steered, after) = run(0 * delta), run(delta)
    torch.testing.assert_close(
        after[1] - before[1], (projection.weight @ delta).expand_as(before[1]), atol=2e-5, rtol=0
    )
    assert torch.equal(after[0], before[0])
    assert torch.equal(plain[0], steered[0])
    assert not torch.equal(plain[1], steered[1])


@torch.inference_mode()
def test_regions_are_heard_the_same_where_z_is_tapped(tiny_engine: Engine) -> None:
    sample, timestep, heard = arguments(tiny_engine)
    unet, points = tiny_engine.components.unet, points_of(tiny_engine)
    grids = {point.grid(*(edge * tiny_engine.components.vae_downscale for edge in sample.shape[2:])) for point in
             points.values()}  # fmt: skip
    g = torch.Generator().manual_seed(2)
    bias = {grid: torch.randn(2, grid[0] * grid[1], 7, generator=g) for grid in grids}
    conditions = Conditions(heard.hidden, heard.pooled, heard.time_ids, bias=bias)
    at = frozenset(filter(is_z, points))
    assert torch.equal(
        tapped_forward(unet, sample, timestep, conditions, tap=lambda _, x, __: x, at=at),
        tapped_forward(unet, sample, timestep, conditions),
    )


def test_an_attention_of_another_kind_has_no_z(tiny_engine: Engine) -> None:
    unet = copy.deepcopy(tiny_engine.components.unet)
    layer = unet.mid_block.attentions[0].transformer_blocks[0]
    layer.attn1.norm_q, layer.attn2.processor = torch.nn.LayerNorm(4), AttnProcessor()
    points = with_attention_points(unet, find_hook_points(unet, 8))
    assert "up.0.0.attn1.0.z" in points
    assert "mid.0.attn1.0" in points
    assert not {"mid.0.attn1.0.z", "mid.0.attn2.0.z"} & {*points}


@pytest.mark.parametrize("at", ["up.0.0.attn2.0", "up.0.0.attn2.0.z"])
def test_training_collects_and_the_server_reads_and_steers_there(
    small_model: tuple[Path, Path], tmp_path: Path, at: str
) -> None:
    """On PyTorch as it is, and compiled."""
    model = str(small_model[0])
    collecting = load_engine(model=model, saes=[], hook_points=[at, "mid.0"])
    assert [point.name for point in collecting.info.hook_points] == ["mid.0", at]
    updates = collect_updates(collecting, ["a star", "b"], [1, 2], 2)
    update = updates.by_block[at]
    (point,) = (point for point in collecting.info.hook_points if point.name == at)
    assert update.shape[:2] == (2, 2)
    assert update.shape[3] == point.d_model

    d = point.d_model
    save_bundle(
        tmp_path / at,
        hook_point=at,
        hook_module=point.module,
        model_name="tiny",
        model_hash=collecting.info.model_hash,
        architecture="topk",
        k=d,
        weights=SaeWeights(torch.eye(d), torch.zeros(d), torch.eye(d), torch.zeros(d)),
        stats=None,
        provenance={},
    )
    serving = load_engine(model=model, saes=[str(tmp_path)])
    size = serving.info.default_size
    edit = Edit("add", (WeightedFeature(at, 0),), 50.0, Unit.RAW)
    jobs = [Job("a star", 1, 2, *size, saes=(at,)), Job("a star", 1, 2, *size, edits=(edit,))]
    plain, steered = serving.run(jobs)
    assert plain is not None
    assert steered is not None
    assert not np.array_equal(plain.picture, steered.picture)
    parts, info = serving.components, serving.info
    unet = copy.deepcopy(parts.unet)
    fused = TorchUNet(unet, FusedBlocks(unet, backend="eager"))
    compiled = Engine(parts, fused, info, torch.device("cpu")).run(jobs)
    for ours, theirs in zip((plain, steered), compiled, strict=True):
        assert theirs is not None
        assert np.abs(ours.latents - theirs.latents).max() <= 1e-5 * np.abs(ours.latents).max()
    values = update[0, 0].clamp(min=0)
    assert np.abs(np.sort(plain.features[0].values) - np.sort(values[values > 0].numpy())).max() < 1e-4


def test_a_hook_point_that_is_not_there_is_one_line(tiny_folder: Path, tiny_engine: Engine) -> None:
    with pytest.raises(LoadError, match=r"no hook point up\.0\.0\.attn3\.0; it has .* attention layers from"):
        load_engine(model=str(tiny_folder), saes=[], hook_points=["up.0.0.attn3.0"])
    assert "attn" not in list_points(find_hook_points(tiny_engine.components.unet, 8))
