"""Matrix work counted without doing it, and the floor that follows from it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from turbolens_server.bench.device import Speed, measure_speed
from turbolens_server.bench.roofline import MatrixOp, floor_ms, sae_ops, total_flops, unet_ops, vae_ops


@pytest.fixture(scope="module")
def parts(engine):
    return engine.components


def test_a_unets_operations_are_those_that_torch_counts_in_a_real_pass(parts):
    unet = parts.unet
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    # Fused attention on a CPU is no operation that torch counts; its plain form is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(
            torch.zeros(2, 4, 32, 32), torch.zeros(2), torch.zeros(2, 77, unet.config.cross_attention_dim),
            added_cond_kwargs={"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)},
        )  # fmt: skip
    assert total_flops(unet_ops(unet, 2, 32, 32)) == counter.get_total_flops()


def test_a_vaes_operations_are_those_that_torch_counts_in_a_real_pass(parts):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        parts.vae.decode(torch.zeros(1, 4, 32, 32))
    assert total_flops(vae_ops(parts.vae, 1, 32, 32)) == counter.get_total_flops()


def test_every_layers_weights_are_read_once_a_pass(parts):
    layers = [m for m in parts.unet.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    expected = sum(layer.weight.numel() for layer in layers)
    for batch in (1, 3):
        assert sum(op.weights for op in unet_ops(parts.unet, batch, 32, 32)) == expected


def test_an_saes_operations_are_its_encoders(engine):
    sae = engine.saes["mid.0"]
    x = torch.zeros(64, sae.W_enc.shape[0])
    with FlopCounterMode(display=False) as counter:
        sae.encode(x)
    assert total_flops(sae_ops(64, *sae.W_enc.shape)) == counter.get_total_flops()


def test_the_floor_is_the_slower_of_arithmetic_and_memory_for_each_operation():
    speed = Speed(tflops=1.0, gb_s=1.0)
    arithmetic, memory = MatrixOp(10**12, 10), MatrixOp(10, 10**9)
    assert floor_ms([arithmetic], speed, torch.float16) == pytest.approx(1000)
    assert floor_ms([memory], speed, torch.float16) == pytest.approx(2000)
    assert floor_ms([arithmetic, memory], speed, torch.float16) == pytest.approx(3000)
    assert floor_ms([memory], speed, torch.float32) == pytest.approx(4000)


def test_a_device_is_measured():
    speed = measure_speed(torch.device("cpu"), torch.float32)
    assert 1e-4 < speed.tflops < 100
    assert 0.01 < speed.gb_s < 10_000
