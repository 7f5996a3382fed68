"""A batch in parts, each on a core of its own, is the batch: same rows, same order, and parts of one size."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.engine.decode import decode_rows
from turbolens_server.unet.compiled import STEERED, CompiledDecoder, Parts, Segment, _Chain, side_by_side


def cores(count):
    return mock.patch.object(torch, "get_num_threads", return_value=count)


@pytest.fixture
def two():
    with ThreadPoolExecutor(2) as workers:
        yield workers


@given(rows=st.integers(1, 70), count=st.integers(1, 20))
def test_parts_are_of_one_size_and_join_to_the_whole(rows, count):
    with cores(count), ThreadPoolExecutor(1) as workers:
        parts = Parts.of(rows, workers)
    whole = torch.arange(2 * rows).reshape(rows, 2)
    split = parts.split(whole)
    assert len(split) == parts.count <= count
    assert len({len(part) for part in split}) == 1
    assert len(split) * len(split[0]) < rows + len(split[0]), "a part has nothing of its own"
    assert torch.equal(parts.join(split), whole)
    if parts.workers is None:
        assert parts.count == 1
        assert count == 1 or rows < 2 * count
    else:
        assert len(split[0]) > 1, "a single row is another chain's"


@pytest.mark.parametrize("rows", [2, 4, 7, 8])
def test_a_chain_in_parts_gives_what_it_gives_whole_and_the_tap_sees_every_row_once(two, rows):
    ran, seen = [], []

    def first(given):
        ran.append(len(given[0]))
        return given[0] * 2, given[0] + given[1]

    def second(given):
        return (given[0] - given[1],)

    def tap(point, update, grid):
        assert (point, grid) == ("mid.0", (1, 1))
        seen.append(update.clone())
        return update * torch.arange(1.0, rows + 1)[:, None]

    links = (
        Segment(("a", "b"), ("kept", "update"), "mid.0", (1, 1), first),
        Segment((STEERED, "kept"), ("prediction",), None, (0, 0), second),
    )
    chain, inputs = _Chain(("a", "b"), links), (torch.randn(rows, 3), torch.randn(rows, 3))
    a, b = inputs
    steered = (a + b) * torch.arange(1.0, rows + 1)[:, None]
    with cores(2):
        parts = Parts.of(rows, two)
    made = chain.run(inputs, tap, frozenset({"mid.0"}), None, parts)
    assert torch.equal(made, steered - a * 2)
    assert torch.equal(seen[0], a + b)
    assert len(seen) == 1
    assert ran == ([rows] if rows < 4 else [(rows + 1) // 2] * 2)
    assert torch.equal(chain.run(inputs, tap, frozenset(), None, parts), (a + b) - a * 2)
    assert chain.run(inputs, tap, frozenset({"mid.0"}), "mid.0", parts) is None


def test_one_that_goes_wrong_in_a_part_is_raised(two):
    def wrong(given):
        if given[0][0, 0] > 0:
            raise RuntimeError("of the second half")
        return given

    with cores(2), pytest.raises(RuntimeError, match="second half"):
        Parts.of(4, two).each(wrong, [[torch.zeros(2, 1)], [torch.ones(2, 1)]])


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
