"""Features equal the readable formula on what the hook modules really wrote: output minus input, in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turbolens_server.engine.types import Job
from turbolens_server.sae.twin import encode_dense
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.tapped import tapped_forward


def hooked_updates(engine, job):
    """Output minus input of every hook module at every step, read by forward hooks on diffusers' own forward."""
    parts = engine.components
    updates: list[dict[str, torch.Tensor]] = []
    handles = []
    for point in engine.info.hook_points:

        def record(module, args, kwargs, output, name=point.name):
            updates[-1][name] = (output[0] - args[0]).flatten(2).transpose(1, 2)

        handles.append(parts.unet.get_submodule(point.module).register_forward_hook(record, with_kwargs=True))
    scheduler = type(parts.scheduler).from_config(parts.scheduler.config)
    scheduler.set_timesteps(job.steps)
    generator = torch.Generator().manual_seed(job.seed)
    size = [s // parts.vae_downscale for s in (job.height, job.width)]
    latents = torch.randn(1, 4, *size, generator=generator) * scheduler.init_noise_sigma
    text = parts.text.encode(job.prompt)
    time_ids = torch.tensor([[job.height, job.width, 0, 0, job.height, job.width]], dtype=torch.float32)
    try:
        with torch.no_grad():
            for t in scheduler.timesteps:
                updates.append({})
                prediction = parts.unet(
                    scheduler.scale_model_input(latents, t),
                    t,
                    text.hidden,
                    added_cond_kwargs={"text_embeds": text.pooled, "time_ids": time_ids},
                ).sample
                latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
    finally:
        for handle in handles:
            handle.remove()
    return updates


@pytest.mark.parametrize("steps", [1, 4])
def test_features_are_the_formula_on_output_minus_input(engine, steps):
    job = Job("a big red star on the left, night background", 7, steps, *engine.info.default_size)
    expected = hooked_updates(engine, job)
    result = engine.run([Job(job.prompt, job.seed, steps, job.height, job.width, saes=tuple(engine.info.saes))])[0]
    assert len(result.features) == steps * len(engine.info.saes)
    for codes in result.features:
        info = engine.info.saes[codes.sae]
        dense = encode_dense(info.bundle, expected[codes.step][info.hook_point][0]).numpy()
        ours = np.zeros_like(dense)
        ours[np.repeat(np.arange(len(dense)), codes.counts), codes.indices] = codes.values
        scale = np.abs(dense).max()
        assert scale > 0
        # Selected by one and not by the other only where the k-th and the next are as good as tied.
        swapped = (ours > 0) != (dense > 0)
        assert np.abs(np.where(swapped, 0, ours - dense)).max() <= 1e-3 * scale
        assert swapped.sum() <= 0.002 * (dense > 0).sum()


def test_the_walk_is_the_models_own_forward_bit_for_bit(engine, tiny_engine):
    for model in (engine, tiny_engine):
        unet = model.components.unet
        torch.manual_seed(0)
        edge = unet.config.sample_size
        sample, text = torch.randn(2, 4, edge, edge), torch.randn(2, 77, unet.config.cross_attention_dim)
        pooled, time_ids = torch.randn(2, 128), torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)
        t = torch.tensor(499)
        conditions = Conditions(text, pooled, time_ids)
        seen = []

        def tap(name, update, grid, seen=seen):
            seen.append((name, tuple(update.shape[1:]), grid))
            return update

        points = frozenset(point.name for point in model.info.hook_points)
        with torch.no_grad():
            added = {"text_embeds": pooled, "time_ids": time_ids}
            expected = unet(sample, t, text, added_cond_kwargs=added).sample
            plain = tapped_forward(unet, sample, t, conditions)
            tapped = tapped_forward(unet, sample, t, conditions, tap=tap, at=points)
        assert torch.equal(plain, expected)
        assert torch.equal(tapped, expected)
        assert [(name, grid) for name, _, grid in seen] == [
            (p.name, p.grid(*model.info.default_size)) for p in model.info.hook_points
        ]
        assert all(
            shape == (g[0] * g[1], p.d_model) for (_, shape, g), p in zip(seen, model.info.hook_points, strict=True)
        )
