"""What the engine promises about a batch of jobs, on the embedded model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random

import numpy as np
import pytest
import torch

from turbolens_server.cuda_graphs import on_device
from turbolens_server.engine.decode import decode_latents, decode_rows
from turbolens_server.engine.types import FeaturesReady, Job, NotFinite, Result, StepDone
from turbolens_server.kernels.select import by_numpy
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask

ENGINE = "turbolens_server.engine.engine"
PROMPT = "a big red star on the left, night background"
PIXELS = 3  # of 255: a batch of another size rounds differently, and steering carries that on
LATENTS = 2e-3


def job(prompt=PROMPT, seed=7, steps=1, **more) -> Job:
    return Job(prompt, seed, steps, 128, 128, **more)


@pytest.fixture(scope="module")
def active(engine):
    """The three strongest features of each SAE on PROMPT, by total activation."""
    result = engine.run([job(saes=tuple(engine.info.saes))])[0]
    strongest = {}
    for codes in result.features:
        total = np.bincount(codes.indices, weights=codes.values, minlength=codes.d_sae)
        strongest[codes.sae] = [int(i) for i in total.argsort()[::-1][:3]]
    return strongest


def edit(kind, sae, features, amount, **more) -> Edit:
    return Edit(kind, tuple(WeightedFeature(sae, f) for f in features), amount, **more)


def test_what_runs_a_batch_selects_its_features_too(engine, active):
    """Those that are wanted, and those that an edit reads."""
    first, *_ = engine.info.saes
    jobs = [job(saes=tuple(engine.info.saes)), job(edits=(edit("scale", first, active[first], 0.5),))]
    selected = []

    def pick(pre, values, indices):
        selected.append(pre.shape)
        by_numpy(pre, values, indices)

    was = engine.running
    expected = engine.run(jobs)
    engine.use(dataclasses.replace(was, pick=pick))
    try:
        found = engine.run(jobs)
    finally:
        engine.use(was)
    assert sorted(rows for rows, _ in selected) == [64] * (len(engine.info.saes) - 1) + [128]
    for a, b in zip(expected, found, strict=True):
        assert np.array_equal(a.latents, b.latents)
        for ours, theirs in zip(a.features, b.features, strict=True):
            assert np.array_equal(ours.values, theirs.values)


def test_a_run_without_edits_is_bit_equal_whatever_is_extracted(engine):
    plain = engine.run([job(steps=2)])[0]
    extracted = engine.run([job(steps=2, saes=tuple(engine.info.saes))])[0]
    assert np.array_equal(plain.latents, extracted.latents)
    assert np.array_equal(plain.picture, extracted.picture)
    assert plain.features == ()


def test_edits_that_change_nothing_change_nothing(engine, active):
    plain = engine.run([job()])[0].latents
    for sae, features in active.items():
        for neutral in (edit("add", sae, features, 0.0), edit("scale", sae, features, 1.0)):
            assert np.abs(engine.run([job(edits=(neutral,))])[0].latents - plain).max() <= 1e-5


def test_every_kind_of_edit_changes_the_picture(engine, active):
    plain = engine.run([job()])[0].picture.astype(int)
    for sae, features in active.items():
        for kind, amount in (("add", 6.0), ("scale", 0.0), ("set", 5.0), ("replace", 1.0)):
            changed = engine.run([job(edits=(edit(kind, sae, features, amount),))])[0].picture
            assert np.abs(changed - plain).max() > 5, (sae, kind)


def test_a_mixed_batch_gives_what_each_request_gives_alone(engine, active):
    (first, some), (second, others) = list(active.items())[1:3]
    left = BoxMask((Box(0, 0, 0.5, 1),))
    jobs = [
        job(steps=2),
        job("a small blue ring, snow background", 11, 2, edits=(edit("add", first, some, 5.0, mask=left),)),
        job("", 3, 2, edits=(edit("replace", second, others[:1], 2.0),), saes=(first,)),
        job(seed=9, steps=2, edits=(edit("scale", first, some, 0.0), edit("set", second, others, 3.0, steps=(1, 2)))),
        job(seed=9, steps=2, saes=tuple(active)),
    ]
    together = engine.run(jobs)
    for position, (one, mixed) in enumerate(zip(jobs, together, strict=True)):
        alone = engine.run([one])[0]
        assert mixed.job == position
        assert np.abs(alone.latents - mixed.latents).max() <= LATENTS * max(1, np.abs(alone.latents).max())
        assert np.abs(alone.picture.astype(int) - mixed.picture).max() <= PIXELS
        assert [(c.sae, c.step) for c in mixed.features] == [(c.sae, c.step) for c in alone.features]
        for a, b in zip(alone.features, mixed.features, strict=True):
            dense_a, dense_b = dense(a), dense(b)
            swapped = (dense_a > 0) != (dense_b > 0)
            assert swapped.mean() < 1e-3
            assert np.abs(np.where(swapped, 0, dense_a - dense_b)).max() <= 1e-2 * dense_a.max()


def dense(codes) -> np.ndarray:
    out = np.zeros((len(codes.counts), codes.d_sae), np.float32)
    out[np.repeat(np.arange(len(codes.counts)), codes.counts), codes.indices] = codes.values
    return out


def test_an_edit_acts_only_in_its_steps(engine, active):
    sae, features = next(iter(active.items()))
    wanted = tuple(engine.info.saes)
    plain = engine.run([job(steps=3, saes=wanted)])[0]
    late = engine.run([job(steps=3, saes=wanted, edits=(edit("add", sae, features, 10.0, steps=(2, 3)),))])[0]
    for a, b in zip(plain.features, late.features, strict=True):
        if a.step < 2:
            assert np.array_equal(dense(a), dense(b))
    assert np.abs(plain.latents - late.latents).max() > 0.01


def test_features_are_those_before_the_blocks_own_edits(engine, active):
    names = list(active)
    first, last = names[0], names[-1]
    plain = {c.sae: dense(c) for c in engine.run([job(saes=tuple(names))])[0].features}
    edits = (edit("add", first, active[first], 10.0),)
    steered = {c.sae: dense(c) for c in engine.run([job(saes=tuple(names), edits=edits)])[0].features}
    assert np.array_equal(plain[first], steered[first])
    assert np.abs(plain[last] - steered[last]).max() > 0.01


def test_units_agree_where_they_must(engine, active):
    sae, (feature, *_) = next(iter(active.items()))
    stats = engine.info.saes[sae].bundle.stats
    raw = float(stats.mean[feature]) * 4
    by_mean = engine.run([job(edits=(edit("add", sae, [feature], 4.0),))])[0]
    by_raw = engine.run([job(edits=(edit("add", sae, [feature], raw, unit=Unit.RAW),))])[0]
    by_norm = engine.run([job(edits=(edit("add", sae, [feature], raw / stats.norm_at(999), unit=Unit.NORM),))])[0]
    assert np.allclose(by_mean.latents, by_raw.latents, atol=1e-4)
    assert np.allclose(by_norm.latents, by_raw.latents, atol=1e-4)


def test_events_come_in_order_and_end_with_the_result(engine):
    names = tuple(engine.info.saes)
    events = []
    results = engine.run([job(steps=2, saes=names, previews=True), job(seed=8, steps=2)], on_event=events.append)
    first = [e for e in events if getattr(e, "job", None) == 0]
    kinds = [type(e) for e in first]
    assert kinds == [*([FeaturesReady] * len(names)), StepDone, *([FeaturesReady] * len(names)), StepDone, Result]
    previews = [e.preview for e in first if isinstance(e, StepDone)]
    assert previews[0].shape == (128, 128, 3)
    assert previews[1] is None
    assert [type(e) for e in events if getattr(e, "job", None) == 1] == [StepDone, StepDone, Result]
    assert first[-1] is results[0]


def test_a_cancelled_row_gives_none_and_leaves_its_mates_bit_equal(engine):
    jobs = [job(steps=4), job(seed=8, steps=4)]
    whole = engine.run(jobs)
    done = []
    partial = engine.run(jobs, on_event=done.append, cancelled=lambda row: row == 1 and len(done) >= 2)
    assert partial[1] is None
    assert np.array_equal(partial[0].latents, whole[0].latents)
    assert np.array_equal(partial[0].picture, whole[0].picture)


def test_a_batch_with_every_row_cancelled_stops_at_the_next_step(engine):
    steps = []
    results = engine.run([job(steps=4)], on_event=steps.append, cancelled=lambda row: len(steps) >= 1)
    assert results == [None]
    assert len(steps) == 1


def test_jobs_that_differ_in_shape_are_refused(engine):
    with pytest.raises(ValueError, match="share"):
        engine.run([job(), job(steps=2)])


def test_features_alone_decode_no_picture(engine):
    result = engine.run([job(saes=("mid.0",), picture=False)])[0]
    assert result.picture is None
    assert result.features


def test_long_prompts_are_cut_and_say_so(engine):
    assert engine.run([job("star " * 200)])[0].tokens_cut > 100
    assert engine.run([job("")])[0].tokens_cut == 0


def test_a_row_that_is_not_finite_ends_alone(engine, active):
    sae, features = next(iter(active.items()))
    broken = job(edits=(edit("add", sae, features, float("inf")),), saes=(sae,))
    sound = job(seed=8)
    mate = engine.run([sound, sound])[0]
    events = []
    denoised = engine.denoise([sound, broken], on_event=events.append)
    results = engine.decode(denoised, on_event=events.append)
    assert [type(event) for event in events if event.job == 1] == [NotFinite]
    (told,) = [event for event in events if isinstance(event, NotFinite)]
    assert (told.part, told.step, told.dtype) == ("U-Net", 0, "float32")
    assert "weaker edits" in str(told)
    assert "edits" not in str(dataclasses.replace(told, edited=False))  # of the weights alone
    assert results[1] is None
    assert np.array_equal(results[0].latents, mate.latents)
    assert np.array_equal(results[0].picture, mate.picture)
    with pytest.raises(FloatingPointError, match="job 0: the U-Net at step 0"):
        engine.run([broken])


def test_a_picture_that_is_not_finite_ends_alone(engine):
    class HalfBroken:
        """The VAE, with the second picture of a decoding gone wrong."""

        config, dtype = engine.components.vae.config, engine.components.vae.dtype

        def decode(self, latents, return_dict):
            (decoded,) = engine.components.vae.decode(latents, return_dict=return_dict)
            return (decoded.index_fill(0, torch.tensor([1]), float("nan")),)

    latents = torch.randn(3, 4, 16, 16)
    with torch.no_grad():
        whole = decode_latents(engine.components.vae, latents)
        one, none, other = decode_latents(HalfBroken(), latents)
    assert none is None
    assert np.array_equal(one, whole[0])
    assert np.array_equal(other, whole[2])


def test_a_picture_goes_to_its_caller_before_the_next_one_is_decoded(engine):
    seen = []

    class Watched:
        """The VAE, telling when it decodes."""

        config, dtype = engine.components.vae.config, engine.components.vae.dtype

        def decode(self, latents, return_dict):
            seen.append("decoded")
            return engine.components.vae.decode(latents, return_dict=return_dict)

    denoised = engine.denoise([job(), job(seed=8, picture=False), job(seed=9)])
    denoised.running = dataclasses.replace(denoised.running, decoder=Watched())
    results = engine.decode(denoised, on_event=lambda event: seen.append(event.job))
    assert seen == [1, "decoded", 0, "decoded", 2]
    assert [result.job for result in results] == [0, 1, 2]


def test_pictures_are_decoded_one_by_one_and_those_nobody_waits_for_not_at_all(engine):
    class Watched:
        """The VAE, keeping how much it was given."""

        config, dtype = engine.components.vae.config, engine.components.vae.dtype

        def __init__(self) -> None:
            self.given: list[int] = []

        def decode(self, latents, return_dict):
            self.given.append(len(latents))
            return engine.components.vae.decode(latents, return_dict=return_dict)

    latents, rows, vae = torch.randn(4, 4, 8, 8), [0, 1, 3], Watched()
    with torch.no_grad():
        decoded = dict(decode_rows(vae, latents, rows, [True, False, True, True]))
    assert list(decoded) == [0, 3]
    assert vae.given == [1, 1]


@pytest.mark.parametrize("size", [2, 5, 8])
def test_in_a_batch_of_the_same_size_neither_place_nor_mates_nor_who_leaves_change_a_bit(engine, size):
    draw = random.Random(size)

    def batch(place: int, steps: int = 2) -> list[Job]:
        jobs = [job(f"a ring of {draw.random()}", draw.randrange(1000), steps) for _ in range(size)]
        jobs[place] = job(steps=steps)
        return jobs

    first = engine.run(batch(0))[0]
    for place in range(size):
        left, asked = {row for row in range(size) if row != place and draw.random() < 0.5}, itertools.count()
        # From some question on, before the first step or in the middle of the run.
        gone = functools.partial(lambda left, asked, row: next(asked) >= size // 2 and row in left, left, asked)
        there = engine.run(batch(place), cancelled=gone)[place]
        assert np.array_equal(there.latents, first.latents)
        assert np.array_equal(there.picture, first.picture)


def test_samplers_prepared_once_do_not_remember_a_run(engine):
    first = engine.run([job(steps=3)])[0]
    engine.run([job(seed=8, steps=3)])
    assert np.array_equal(engine.run([job(steps=3)])[0].latents, first.latents)


def test_every_entry_works_on_the_engines_own_device(engine, monkeypatch):
    current: list[torch.device] = []

    @contextlib.contextmanager
    def entered(device):
        current.append(device)
        yield
        current.pop()

    def checked(function):
        def call(*args, **more):
            assert set(current) == {engine.device}, "another device may be the current one"
            return function(*args, **more)

        return call

    monkeypatch.setattr(f"{ENGINE}.on_device", entered)
    monkeypatch.setattr(f"{ENGINE}.decode_rows", checked(decode_rows))
    monkeypatch.setattr(engine.components.text, "_encode", checked(engine.components.text._encode))
    monkeypatch.setattr(engine.unet, "predict", checked(engine.unet.predict))
    engine.embed_text(["a prompt that no other test has"])
    engine.decode(engine.denoise([job("nor this one")]))
    engine.warm_up(1)
    assert not current


def test_a_gpu_is_the_current_one_by_its_number():
    context = on_device(torch.device("cuda:1"))
    assert isinstance(context, torch.cuda.device)
    assert context.idx == 1
    with on_device(torch.device("cpu")):
        pass
