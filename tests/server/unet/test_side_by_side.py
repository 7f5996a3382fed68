"""Pictures decoded side by side, each on a core of its own: the same ones, in the same order."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

from turbolens_server.engine.decode import decode_rows
from turbolens_server.unet.compiled import CompiledDecoder, side_by_side


def cores(count):
    return mock.patch.object(torch, "get_num_threads", return_value=count)


@pytest.fixture
def two():
    with ThreadPoolExecutor(2) as workers:
        yield workers


class Vae:
    """Decodes to the latents themselves, and waits each time until another thread decodes too."""

    dtype = torch.float32

    def __init__(self, workers) -> None:
        self.workers = workers
        self.config = mock.Mock(latents_mean=None, scaling_factor=1.0)
        self.together = threading.Barrier(1 if workers is None else 2, timeout=5)

    def workers_for(self, latents):
        return self.workers

    def decode(self, latents, return_dict):
        assert torch.is_inference_mode_enabled()
        self.together.wait()
        assert len(latents) == 1
        return (latents,)


def test_pictures_are_decoded_side_by_side_and_come_in_order(two):
    latents = torch.linspace(-0.9, 0.9, 5)[:, None, None, None].expand(5, 3, 2, 2)
    live, rows = [True, False, True, True, True], [0, 1, 2, 3, 4]
    beside, alone = (list(decode_rows(Vae(workers), latents, rows, live)) for workers in (two, None))
    assert [row for row, _ in beside] == [0, 2, 3, 4]
    assert [(row, picture.tolist()) for row, picture in beside] == [(row, picture.tolist()) for row, picture in alone]


def test_large_pictures_and_few_are_decoded_one_after_the_other():
    with cores(2):
        assert [side_by_side(batch, (32, 32)) for batch in (1, 2, 8)] == [1, 2, 2]
        assert side_by_side(8, (64, 64)) == 1
        parts = mock.Mock(workers="workers")
        decoder = CompiledDecoder(parts, mock.Mock(), mock.Mock(latent_channels=4), (32, 32))
        assert decoder.workers_for(torch.zeros(2, 4, 32, 32)) == "workers"
        assert decoder.workers_for(torch.zeros(1, 4, 32, 32)) is None
        assert decoder.workers_for(torch.zeros(2, 4, 16, 32)) is None, "the VAE itself decodes these"
    with cores(1):
        assert side_by_side(8, (32, 32)) == 1
