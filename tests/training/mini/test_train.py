"""The training of `mini`: targets, maths, and a run that resumes where it stopped."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from turbolens_training.mini import model as parts
from turbolens_training.mini.config import MiniConfig
from turbolens_training.mini.evaluate import HeldOut, counterfactuals, psnr, score_attributes
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import decode_scenes, jitter_from_noise, sample_codes
from turbolens_training.mini.train import Training, anchored_latent, draw_batch, train_text, x0_from_v


def test_the_latent_is_the_averaged_picture_and_cover():
    codes = sample_codes(4, torch.Generator().manual_seed(0))
    picture, cover = render(codes, torch.zeros(4, 16), 64)
    latent = anchored_latent(picture, cover, 32)
    assert torch.allclose(latent[:, :3, 3, 5], picture[:, :, 6:8, 10:12].mean((2, 3)), atol=1e-6)
    assert torch.allclose(latent[:, 3, 3, 5], cover[:, 0, 6:8, 10:12].mean((1, 2)) * 2 - 1, atol=1e-6)


def test_v_gives_back_the_clean_latent():
    x0, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for alpha_bar in (torch.tensor(0.0), torch.tensor(0.3)):
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
        assert torch.allclose(x0_from_v(v, x_t, alpha_bar), x0, atol=1e-5)


def test_a_batch_depends_on_seed_stage_and_step_alone():
    first, again = (draw_batch(0, "full", 5, 16, 8, 6.0, "cpu") for _ in range(2))
    other = draw_batch(0, "full", 6, 16, 8, 6.0, "cpu")
    assert first.captions == again.captions
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.noise, other.noise)
    assert set(first.weight.unique().tolist()) == {1.0, 7.0}


def test_the_target_is_the_scene_that_the_noise_decides():
    batch = draw_batch(0, "full", 1, 32, 6, 0.0, "cpu")
    picture, cover = render(batch.codes, jitter_from_noise(batch.noise), 64)
    expected = anchored_latent(picture, cover, 32) * parts.SCALING_FACTOR
    assert torch.equal(batch.target, expected)


def test_exact_pictures_score_perfectly_and_scrambled_ones_by_chance():
    held = HeldOut.draw(200, 32)
    exact, cover = held.pictures(32)
    perfect = score_attributes(held.codes, held.noise, exact)
    assert {name: score.right for name, score in perfect.items()} == dict.fromkeys(perfect, 1.0)
    scrambled = score_attributes(held.codes, held.noise, exact.roll(1, 0))
    for name, score in scrambled.items():
        assert abs(score.right - score.chance) < 0.17, name
    assert psnr(exact, exact, cover).min() > 60


def test_counterfactuals_start_with_the_scene_itself_and_differ_in_one_attribute():
    codes = sample_codes(60, torch.Generator().manual_seed(3))
    names = set()
    for name, rows, variants, values in counterfactuals(codes):
        names.add(name)
        assert torch.equal(variants[:, 0], codes[rows])
        assert variants.shape[1] == values
        for own in variants:
            assert len({tuple(v) for v in own.tolist()}) == values
            decode_scenes(own)
    assert names == {"shape", "color", "texture", "size", "background", "style", "position", "relation"}


def test_a_stopped_run_resumes_bit_equal(tmp_path):
    whole = MiniConfig(out=tmp_path / "whole", precision="fp32", text_steps=4, text_batch=4)
    at_once = train_text(Training(whole)).state_dict()

    halves = dataclasses.replace(whole, out=tmp_path / "halves")

    class StoppedError(RuntimeError):
        pass

    training = Training(halves)
    save = training.save

    def stop_after_first_checkpoint(stage, state):
        save(stage, state)
        raise StoppedError

    training.save = stop_after_first_checkpoint
    # A checkpoint after every step: the second step's is never reached.
    training.config = dataclasses.replace(halves, checkpoint_minutes=0.0)
    with pytest.raises(StoppedError):
        train_text(training)
    assert torch.load(tmp_path / "halves" / "text.pt", weights_only=True)["step"] == 1
    resumed = train_text(Training(halves)).state_dict()
    assert all(torch.equal(resumed[name], at_once[name]) for name in at_once)
    rows = [json.loads(line) for line in (tmp_path / "halves" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4


def test_the_model_has_sdxls_hook_points_on_an_8_by_8_grid():
    from turbolens_server.unet.points import DEFAULT_HOOK_POINTS
    from turbolens_server.unet.tapped import check_supported, find_hook_points

    unet = parts.build_unet()
    check_supported(unet)
    points = find_hook_points(unet, 4)
    assert set(DEFAULT_HOOK_POINTS) <= set(points)
    assert {points[name].grid(128, 128) for name in DEFAULT_HOOK_POINTS} == {(8, 8)}
    assert {points[name].d_model for name in DEFAULT_HOOK_POINTS} == {128}


def test_a_caption_reaches_the_picture_only_through_the_deepest_blocks():
    from turbolens_server.unet.conditions import Conditions
    from turbolens_server.unet.tapped import attention_blocks, tapped_forward

    torch.manual_seed(0)
    unet = parts.build_unet().eval()
    names = [name for name, _, _ in attention_blocks(unet)]
    assert names == ["down.2.0", "down.2.1", "mid.0", "up.0.0", "up.0.1", "up.0.2"]
    sample, t = torch.randn(1, 4, 32, 32), torch.tensor(999)
    time_ids = torch.tensor([parts.TIME_IDS], dtype=torch.float32)

    def predict(seed: int, gain: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, 77, 2 * parts.TEXT_DIM, generator=generator)
        pooled = torch.randn(1, parts.POOLED_DIM, generator=generator)
        tap = {"tap": lambda _name, update, _grid: gain * update, "at": frozenset(names)}
        with torch.no_grad():
            return tapped_forward(unet, sample, t, Conditions(text, pooled, time_ids), **tap)

    assert torch.equal(predict(1, 0.0), predict(2, 0.0))
    assert not torch.equal(predict(1, 1.0), predict(2, 1.0))


def test_a_spare_block_left_out_is_left_out():
    from turbolens_training.mini.train import Denoiser

    torch.manual_seed(0)
    denoiser = Denoiser(parts.build_unet().eval())
    x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([999, 999])
    hidden, time_ids = torch.randn(2, 77, 2 * parts.TEXT_DIM), torch.zeros(2, 6)
    with torch.no_grad():
        whole = denoiser(x_t, t, hidden, time_ids, torch.ones(2, 2))
        partly = denoiser(x_t, t, hidden, time_ids, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert torch.allclose(whole[0], partly[0], atol=1e-5)
    assert (whole[1] - partly[1]).abs().max() > 1e-4
