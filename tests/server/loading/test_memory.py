"""What memory serving takes: counted without contents, and held to a real run."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from turbolens_server.engine.encode import PictureEncoder
from turbolens_server.engine.info import MemoryNeed, SaeInfo
from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.plan import BatchPlan
from turbolens_server.engine.tap import StepTap
from turbolens_server.engine.text import PROMPTS_KEPT
from turbolens_server.engine.types import Attribute, Job
from turbolens_server.files import available_host_bytes
from turbolens_server.loading import load, memory
from turbolens_server.loading.memory import (
    Asked,
    Counted,
    count,
    encoder_bytes,
    memory_need,
    peak_bytes,
    text_bytes,
    unet_bytes,
    vae_bytes,
)
from turbolens_server.sae.sae import Sae
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.points import layer_of
from turbolens_server.unet.tapped import tapped_forward


def test_the_count_is_that_of_a_real_run(engine):
    unet, vae = engine.components.unet, engine.components.vae
    config = unet.config
    sample, text = torch.randn(2, config.in_channels, 16, 16), torch.randn(2, 5, config.cross_attention_dim)
    pooled = torch.randn(2, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    conditions = Conditions(text, pooled, torch.zeros(2, 6))
    with torch.no_grad(), memory._LiveBytes(unet.parameters()) as counted:
        tapped_forward(unet, sample, torch.tensor(999.0), conditions)
    assert unet_bytes(unet, 2, 16, 16, 5) == pytest.approx(counted.peak, rel=0.05)
    with torch.no_grad(), memory._LiveBytes(vae.parameters()) as counted:
        vae.decode(torch.randn(2, vae.config.latent_channels, 16, 16))
    assert vae_bytes(vae, 2, 16, 16) == pytest.approx(counted.peak, rel=0.05)
    with torch.no_grad(), memory._LiveBytes(vae.parameters()) as counted:
        vae.encode(torch.randn(1, 3, 128, 128))
    assert encoder_bytes(vae, 128, 128) == (0, pytest.approx(counted.peak, rel=0.05))


def test_what_requests_ask_beside_pictures_is_counted_as_in_a_real_run(gated_engine):
    """Regions, gates and attributions together: the walk itself, over tensors with contents."""
    parts, tokens, batch, edge = gated_engine.components, 5, 2, 16
    layer = "up.0.1.attn2.0"
    gates = gated_engine.info.gate.gates
    config = parts.unet.config
    width = config.cross_attention_dim
    asked = Asked(regions=3, gates=gates, opened=frozenset([layer]))
    length = tokens * (1 + asked.regions)
    pooled = torch.zeros(batch, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    sample = torch.randn(batch, config.in_channels, edge, edge)
    grids = {edge * parts.vae_downscale // stride for stride in gated_engine.info.region_strides}
    kept = []

    def keep(point, update, grid):
        kept.append(update) if point.endswith(".pattern") else None
        return update

    with torch.no_grad(), memory._LiveBytes((*parts.unet.parameters(), *gates.tensors())) as counted:
        text = torch.randn(batch, length, width)
        bias = {(grid, grid): torch.zeros(batch, grid**2, length) for grid in grids}
        given = Conditions(text, pooled, torch.zeros(batch, 6), bias=bias, gating=gates.of(text))
        at = frozenset([f"{layer}.z", f"{layer}.pattern", f"{layer}.v"])
        tapped_forward(parts.unet, sample, torch.tensor(999.0), given, tap=keep, at=at)
    found = unet_bytes(parts.unet, batch, edge, edge, tokens, asked)
    assert found == pytest.approx(counted.peak, rel=0.1)
    alone = unet_bytes(parts.unet, batch, edge, edge, tokens)
    for one in (Asked(regions=3), Asked(gates=gates), Asked(opened=asked.opened)):
        assert alone <= unet_bytes(parts.unet, batch, edge, edge, tokens, one) <= found
    assert unet_bytes(parts.unet, batch, edge, edge, 77, Asked(regions=8)) > unet_bytes(
        parts.unet, batch, edge, edge, 77
    )


def test_gates_count_with_the_weights_and_in_a_batch(engine, gated_engine):
    told, plain = gated_engine.info.memory, engine.info.memory
    assert told.weights - plain.weights == sum(weight.nbytes for weight in gated_engine.info.gate.gates.tensors())
    assert told.activations > plain.activations


def test_an_attribution_keeps_no_more_than_the_rows_that_asked(engine):
    """Else a batch of one that asks and of seven that do not would hold eight patterns to the pass's end."""
    z = "up.0.1.attn2.0.z"
    bundle = dataclasses.replace(engine.info.saes["up.0.1"].bundle, name=z, hook_point=z)
    info = dataclasses.replace(engine.info, saes={z: SaeInfo(z, z, bundle, forced=False)})
    jobs = [Job("a star", row, 1, *info.default_size, attribute=Attribute(z, 3, 0) if row == 1 else None)
            for row in range(3)]  # fmt: skip
    saes = {z: Sae(bundle, engine.device)}
    tap = StepTap(BatchPlan(jobs, Lanes.of(jobs), info, saes, engine.device, [999]), 0)
    pattern = torch.randn(3, 4, 64, 77)
    assert tap(f"{layer_of(z)}.pattern", pattern, (8, 8)) is pattern
    (kept,) = tap._seen.values()
    assert torch.equal(kept, pattern[1])
    assert kept.untyped_storage().nbytes() == pattern[1].nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_encoders_own_copy_is_counted(engine, dtype):
    half = copy.deepcopy(engine.components.vae).to(dtype)
    half.register_to_config(force_upcast=True)
    encoder = PictureEncoder(half)
    assert encoder.own_weights
    weights = sum(weight.nbytes for weight in encoder._vae.parameters())
    assert encoder_bytes(half, 64, 64)[0] == weights > 2**18
    assert encoder_bytes(half, 64, 64)[1] == encoder_bytes(engine.components.vae, 64, 64)[1]  # it runs in float32
    half.register_to_config(force_upcast=False)
    assert encoder_bytes(half, 64, 64)[0] == 0
    assert half.decoder is not None


def test_reading_a_picture_counts_where_it_takes_more_than_a_walk(engine):
    """Of the same model and batch, at pictures so large that the encoder takes more than the U-Net at small latents."""
    parts = engine.components
    modules = parts.modules.get()
    small, large = (
        memory_need(
            count(modules, max_batch=1, latent_size=(8, 8), picture_size=(edge, edge), tokens=8),
            saes=[], dictionaries=[], runs=[], max_batch=1, pipelined=True, available=None,
        )
        for edge in (16, 256)
    )  # fmt: skip
    assert large.activations - small.activations == pytest.approx(
        memory.slack(encoder_bytes(parts.vae, 256, 256)[1]) - memory.slack(unet_bytes(parts.unet, 1, 8, 8, 8)), abs=2
    )


def test_pictures_that_are_decoded_at_once_are_counted_each(engine):
    counted = Counted(weights=0, denoising=100, reading=0, decoding=60, texts=0)
    nothing = {"saes": [], "dictionaries": [], "runs": [], "max_batch": 8, "available": None}
    for decoders, pipelined, most in ((1, False, 100), (2, False, 120), (1, True, 160), (2, True, 220)):
        need = memory_need(counted, pipelined=pipelined, decoders=decoders, **nothing)
        assert need.activations == memory.slack(most)


def test_the_prompts_that_are_kept_are_counted(engine):
    parts = engine.components
    kept = parts.text.encode("a star")
    one = kept.hidden.nbytes + kept.pooled.nbytes
    assert text_bytes(parts.unet, kept.hidden.dtype, 3, parts.text.max_tokens) == 3 * one
    assert engine.info.memory.activations > PROMPTS_KEPT * one


def test_what_is_alive_at_once_is_what_counts():
    def two_at_a_time() -> None:
        for _ in range(5):
            one = torch.empty(1000, device="meta")
            two = one + 1
            del one, two

    assert peak_bytes(two_at_a_time, ()) == 8000
    weight = torch.empty(100, 100, device="meta")
    assert peak_bytes(weight.t, [weight]) == 0


def test_a_need_that_does_not_fit_names_both_numbers_and_the_way_out():
    gib = 2**30
    need = MemoryNeed(weights=6 * gib, saes=gib // 2, activations=2 * gib, available=5 * gib)
    text = need.refusal("cuda:0", "a batch of 8 at 512x512")
    assert "needs about 8.50 GiB" in text
    assert "5.00 GiB are free on cuda:0" in text
    assert "a batch of 8 at 512x512 2.00" in text
    assert "--max-batch" in text
    assert "--dtype" in text
    assert MemoryNeed(1, 1, 1, available=3).refusal("cpu", "") is None
    assert MemoryNeed(1, 1, 1, available=None).refusal("cpu", "") is None


def test_a_start_without_room_is_refused_and_one_with_room_tells(monkeypatch, engine):
    told = engine.info.memory
    assert told.weights > 10 * 2**20
    assert told.saes > 2**20
    assert told.available > told.total
    monkeypatch.setattr(load, "available_bytes", lambda device: told.total // 2)
    with pytest.raises(load.LoadError, match=r"mini: needs about .* lower --max-batch"):
        load.load_engine()


MEMINFO = "MemTotal:       1000 kB\nMemAvailable:    500 kB\n"


def files(root: Path, **contents: str) -> Path:
    for name, text in contents.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        ({}, 500 * 1024),
        ({"memory.max": "max", "memory.current": "7"}, 500 * 1024),
        ({"memory.max": "9000", "memory.current": "5000"}, 4000),
        ({"memory.max": "9000", "memory.current": "5000", "memory.stat": "file 9\ninactive_file 1000"}, 5000),
        ({"memory/memory.limit_in_bytes": "9000", "memory/memory.usage_in_bytes": "8000"}, 1000),
        ({"memory.max": "99999999999", "memory.current": "1"}, 500 * 1024),
    ],
)
def test_free_memory_is_the_machines_within_the_control_groups(cgroup, expected, tmp_path):
    files(tmp_path, proc__meminfo=MEMINFO)
    files(tmp_path / "sys/fs/cgroup", **cgroup)
    assert available_host_bytes(tmp_path) == expected


def test_a_platform_that_does_not_tell_is_not_guessed(tmp_path):
    assert available_host_bytes(tmp_path) is None
    assert available_host_bytes(files(tmp_path, proc__meminfo="MemTotal: 5 kB\n")) is None
