"""Patch and transfer over a real socket: runs beside a picture's own, by name, and what of them is refused."""

from __future__ import annotations

import numpy as np
import pytest

import turbolens as tl

PROMPT, OTHER = "a big red star on the left, night background", "a big blue ring on the left, snow background"
OTHERS = {"other": tl.reference(OTHER)}
LEFT = tl.box(0, 0, 0.5, 1)


def apart(a, b) -> float:
    return float(np.abs(a.array.astype(int) - b.array).mean())


@pytest.fixture(scope="module")
def plain(lens):
    return lens.generate(PROMPT, seed=7)


@pytest.fixture(scope="module")
def other(lens):
    return lens.generate(OTHER, seed=7)


def test_a_patch_of_every_block_draws_the_reference(lens, plain, other):
    blocks = [point.name for point in lens.model().hook_points]
    patched = lens.generate(PROMPT, seed=7, steer=[tl.patch(blocks, "other")], references=OTHERS)
    assert apart(patched, other) < 0.5 * apart(plain, other)


def test_a_transfer_moves_a_picture_towards_the_reference_where_its_mask_is(lens, plain, other):
    given = [row.ref for row in lens.extract(OTHER, seed=7)["up.0.1"].top(12)]
    taken = [row.ref for row in lens.extract(PROMPT, seed=7)["up.0.1"].top(12) if row.ref not in given]
    edit = tl.transfer(given, "other", remove=taken)
    moved = lens.generate(PROMPT, seed=7, steer=[edit], references=OTHERS)
    assert apart(moved, other) < apart(plain, other)
    masked = lens.generate(
        PROMPT, seed=7, steer=[tl.transfer(given, "other", remove=taken, mask=LEFT)], references=OTHERS
    )
    assert 0 < apart(masked, plain) < apart(moved, plain)


def test_a_reference_has_the_seed_of_each_picture_unless_it_names_one(lens):
    edit = [tl.patch("up.0.1", "other")]
    own = lens.generate(PROMPT, seeds=[7, 8], steer=edit, references=OTHERS)
    named = lens.generate(PROMPT, seeds=[7, 8], steer=edit, references={"other": tl.reference(OTHER, seed=7)})
    assert np.array_equal(own[0].array, named[0].array)
    assert not np.array_equal(own[1].array, named[1].array)


def test_the_answer_says_all_that_makes_it_again(lens):
    edit = [tl.patch("up.0.1", "other", mask=LEFT)]
    first = lens.generate(PROMPT, seed=7, steer=edit, references=OTHERS)
    run = first.provenance.run
    assert run.references["other"].prompt == OTHER
    again = lens.generate(run.prompt, seed=run.seeds[0], steer=run.steer, references=run.references)
    assert np.array_equal(again.array, first.array)


@pytest.mark.parametrize(
    ("edit", "references", "field"),
    [
        (tl.patch("up.0.1", "nobody"), OTHERS, "run.edits[0].reference"),
        (tl.patch("up.9.9", "other"), OTHERS, "run.edits[0].patch.hook_points[0]"),
        (tl.add(("mid.0", 0), 1.0, unit="raw"), OTHERS, "run.references"),
        (tl.add(("mid.0", 0), 1.0, unit="reference", reference="x"), {}, "run.edits[0].reference"),
        (tl.patch("mid.0", "r0"), {f"r{i}": tl.reference(OTHER) for i in range(9)}, "run.references"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_field(lens, edit, references, field):
    with pytest.raises(tl.InvalidRequest) as caught:
        lens.generate(PROMPT, seed=7, steer=[edit], references=references)
    assert field in str(caught.value)


def test_more_features_than_a_request_may_edit_are_refused_before_any_work(lens):
    """What once cost every caller of the batch seconds: 64 edits of most features of a block."""
    edits = [tl.add([("up.0.1", i) for i in range(250)], 0.01, unit="raw") for _ in range(64)]
    with pytest.raises(tl.InvalidRequest, match="may name 4096 in all"):
        lens.generate(PROMPT, seed=7, steer=edits)
