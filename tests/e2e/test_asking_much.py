"""Hundreds of calls at once, contrasts and sweeps on the real server, over a real socket."""

from __future__ import annotations

import asyncio

import pytest

import turbolens as tl
from turbolens_server.embedded import start

THINGS = ("star", "ring", "square", "cross")


@pytest.fixture(scope="module")
def roomy():
    """A server with its own settings: the queue of most tests holds four."""
    with start() as running:
        yield running


def test_five_hundred_coroutines_at_once_are_all_answered(roomy):
    async def ask():
        async with tl.aio.connect(roomy.target, timeout=600) as lens:
            calls = (lens.extract(THINGS[i % 4], seed=i, only="mid.0/0", steps=1) for i in range(500))
            return await asyncio.gather(*calls)

    assert [found.seed for found in asyncio.run(ask())] == list(range(500))


def test_a_contrast_of_two_colours_finds_the_features_of_one(roomy):
    with tl.connect(roomy.target) as lens:
        red, blue = ([f"a big {c} {thing}, night background" for thing in THINGS] for c in ("red", "blue"))
        found = lens.contrast(red, blue, saes=["up.0.1"], limit=10)
        assert abs(found[0].effect) == 1
        assert [abs(row.effect) for row in found] == sorted((abs(row.effect) for row in found), reverse=True)
        assert all((row.mean > row.other) == (row.effect > 0) for row in found)
        assert {row.label.partition(" ")[0] for row in found if row.label}
        same = lens.contrast(red, red, saes=["up.0.1"], limit=10)
        assert max(abs(row.effect) for row in same) < 0.3, "rounding in other batches"
        assert {row.q for row in same} == {1.0}


def test_a_stronger_edit_moves_more(roomy):
    with tl.connect(roomy.target) as lens:
        ref = lens.extract("a big red star", seed=1, saes=["up.0.1"])["up.0.1"].top(1)[0].ref
        swept = lens.sweep("a big red star", [ref], [0, 2, 8], seeds=[1])
        assert swept[0].change.largest <= 3
        assert swept[0].change.mean < swept[1].change.mean < swept[2].change.mean
        assert swept.grid().width > 4 * 128
