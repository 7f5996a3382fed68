"""Many callers at once on the embedded model: each gets what it would get alone, and batches really are shared."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
import torch

import turbolens as tl
from turbolens_server.embedded import start

PIXELS = 3  # of 255: a batch of another size rounds differently, and steering carries that on
CALLERS = 16
PROMPTS = ("a big red star on the left, night background", "a small blue ring", "", "a green square, snow background")


@pytest.fixture(scope="module")
def busy_lens():
    """A client of a server with room for all callers."""
    with start(max_queue=CALLERS) as server, tl.connect(server.target) as connected:
        yield connected


def request_of(caller: int, refs) -> dict:
    """No two callers ask for the same."""
    block, ref = list(refs.items())[caller % len(refs)]
    edits = {
        0: [tl.add(ref, 2 + caller / 4)],
        1: [tl.scale(ref, 0), tl.add(refs["up.0.1"], 2)],
        2: [tl.set_to(ref, 3, mask=tl.box(0, 0, 0.5, 1))],
        3: [],
    }[caller % 4]
    features = [block] if caller % 3 == 0 else None
    return {"prompt": PROMPTS[caller // 4], "seed": caller, "steer": edits, "features": features, "format": "raw"}


def test_callers_at_once_each_get_what_they_get_alone(busy_lens):
    refs = {sae: block.top(1)[0].ref for sae, block in busy_lens.extract(PROMPTS[0], seed=7).items()}
    requests = [request_of(caller, refs) for caller in range(CALLERS)]
    alone = [busy_lens.generate(**request) for request in requests]
    assert {picture.batch_size for picture in alone} == {1}
    with concurrent.futures.ThreadPoolExecutor(CALLERS) as pool:
        together = list(pool.map(lambda request: busy_lens.generate(**request), requests))
    sizes = [picture.batch_size for picture in together]
    assert max(sizes) > 1
    assert max(sizes) <= busy_lens.model().limits.max_batch
    for one, shared in zip(alone, together, strict=True):
        assert shared.seed == one.seed
        assert np.abs(one.array.astype(int) - shared.array).max() <= PIXELS
        assert list(one.features) == list(shared.features)
        for sae, block in one.features.items():
            dense, other = block.to_dense(), shared.features[sae].to_dense()
            assert ((dense > 0) != (other > 0)).mean() < 1e-3


def until(kind: type, stream) -> None:
    """Read a stream up to an event."""
    assert any(isinstance(event, kind) for event in stream)


def mates_pictures(lens, *, leave: bool) -> list[bytes]:
    """The pictures of three seeds that share a batch with a caller who stays, or leaves after its first step."""
    blocker = lens.stream_generate("", seeds=range(8), steps=4)  # a full batch: what comes now waits, and then shares
    until(tl.Step, blocker)
    other = lens.stream_generate("x", seed=9, steps=4)
    until(tl.Queued, other)
    mates = lens.stream_generate(PROMPTS[0], seeds=[1, 2, 3], steps=4, format="raw")
    until(tl.Queued, mates)
    blocker.close()
    until(tl.Step if leave else tl.Done, other)
    other.close()
    pictures = [event.picture for event in mates if isinstance(event, tl.PictureReady)]
    assert [picture.batch_size for picture in pictures] == [4, 4, 4]
    return [picture.bytes for picture in pictures]


def test_a_caller_who_leaves_changes_no_bit_of_its_mates(busy_lens):
    assert mates_pictures(busy_lens, leave=True) == mates_pictures(busy_lens, leave=False)


def test_a_fast_vae_by_folder(tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    vae.save_pretrained(tmp_path)
    with start(vae=str(tmp_path)) as server, tl.connect(server.target) as lens:
        picture = lens.generate(PROMPTS[0], seed=7, latents=True)
        own = lens.generate(PROMPTS[0], seed=8).array
    assert picture.array.shape == (128, 128, 3)
    assert np.abs(picture.array.astype(int) - own).max() > 0
    latents = torch.from_numpy(picture.latents)[None]
    with torch.no_grad():
        decoded = vae.eval().decode(latents / vae.config.scaling_factor).sample[0]
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.abs(picture.array.astype(int) - expected).max() <= 1
