"""Transfers that leave the choice of their features to the server, over a real socket."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import numpy as np
import pytest
import torch

import turbolens as tl
from turbolens_server.steering.twin import choose_dense
from turbolens_training.evaluation.edits import CaptionPairs, edit_pictures, transfer
from turbolens_training.evaluation.sampling import decode, saes_by_block, sample
from turbolens_training.evaluation.transfer import EncodedPictures, choose_transferred

PROMPT, OTHER = "a big red star on the left, night background", "a big blue ring on the left, snow background"
OTHERS = {"other": tl.reference(OTHER)}
LEFT, RIGHT = tl.box(0, 0, 0.5, 1), tl.box(0.5, 0, 1, 1)


def steered(lens, choice, *, seed=7, **more):
    steps = more.pop("steps", 2)
    edit = tl.transfer(choice, "other", **more)
    return lens.generate(PROMPT, seed=seed, steps=steps, steer=[edit], references=OTHERS)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_choices_and_the_pictures_are_those_of_riebench(engine, lens, steps):
    """Against our own evaluation of the published method, which runs pairs of captions in batches of its own."""
    captions = [(PROMPT, OTHER, 7), ("a small green ring, plain background", "a small green star, plain background", 3)]
    pairs = CaptionPairs(*map(list, zip(*captions, strict=True)))
    saes = saes_by_block(engine)
    found = edit_pictures(engine, saes, pairs, {"it": transfer(8, 1.5)}, steps=steps, batch=2, title="test")
    pictures = ((decode(engine, found["it"]).permute(0, 2, 3, 1) + 1) * 127.5).round().numpy()
    runs = [sample(engine, texts, pairs.seeds, steps, keep=True).updates for texts in (pairs.edited, pairs.captions)]
    sides = choose_transferred(saes, *(EncodedPictures.of(saes, run) for run in runs), 8)
    names = [(block, index) for block, sae in saes.items() for index in range(len(sae.W_dec))]
    for row, (prompt, other, seed) in enumerate(captions):
        made = lens.generate(
            prompt, seed=seed, steps=steps, steer=[tl.transfer(tl.choose(8), "other", multiplier=1.5)],
            references={"other": tl.reference(other)},
        )  # fmt: skip
        (chosen,) = made.chosen
        for told, side in ((chosen.given, sides.given), (chosen.taken, sides.taken)):
            assert {(ref.sae, ref.index) for ref in told} == {names[j] for j in side[row].nonzero()[:, 0].tolist()}
        assert np.abs(made.array - pictures[row]).max() <= 3


@pytest.mark.parametrize("all_steps", [False, True])
def test_the_picture_is_that_of_edits_that_name_what_was_chosen(lens, all_steps):
    choice = tl.choose(5, all_steps=all_steps, own_mask=RIGHT)
    made = steered(lens, choice, multiplier=2, mask=LEFT, steps=2)
    (chosen,) = made.chosen
    assert 0 < len(chosen.given) <= 5
    assert sorted(chosen.given.values(), reverse=True) == list(chosen.given.values())
    edits = [
        tl.add(list(chosen.given), 2, unit="reference", reference="other", mask=LEFT),
        tl.add(list(chosen.taken), -2, unit="reference", reference="own", mask=RIGHT),
    ]
    runs = OTHERS | {"own": tl.reference(PROMPT)}
    named = lens.generate(PROMPT, seed=7, steps=2, steer=edits, references=runs)
    assert np.array_equal(made.array, named.array)
    assert not np.array_equal(made.array, lens.generate(PROMPT, seed=7, steps=2).array)


@pytest.mark.parametrize("all_steps", [False, True])
def test_what_is_chosen_can_be_read_off_the_features_that_extract_returns(lens, all_steps):
    """The slow twin on features that the SDK gives: nothing that the choice goes by is out of a caller's sight."""
    runs = [lens.extract(text, seed=7, steps=2, float32=True) for text in (OTHER, PROMPT)]
    over = slice(None) if all_steps else slice(1)
    dense, masks = [], []
    for run in runs:
        dense.append([torch.from_numpy(run[sae].to_dense()[over]).flatten(1, 2) for sae in run])
        masks.append([torch.ones(one.shape[1]) for one in dense[-1]])
    given, taken = choose_dense(*dense, *masks, 4)
    sizes = {sae: runs[0][sae].d_sae for sae in runs[0]}
    names = [(sae, index) for sae, size in sizes.items() for index in range(size)]
    (chosen,) = steered(lens, tl.choose(4, all_steps=all_steps)).chosen
    for told, expected in ((chosen.given, given), (chosen.taken, taken)):
        assert [(ref.sae, ref.index) for ref in told] == [names[place] for place, _ in expected]
        assert list(told.values()) == pytest.approx([score for _, score in expected], abs=1e-5)


def test_nothing_is_moved_by_no_multiple_of_it_and_twice_it_is_twice_it(lens):
    plain, nothing, once, twice = (
        lens.extract(PROMPT, seed=7, steps=2, saes=["mid.0"], float32=True, references=refs, steer=edit)[
            "mid.0"
        ].to_dense()[0]
        for refs, edit in (
            ({}, []),
            *((OTHERS, [tl.transfer(tl.choose(6, saes="down.2.1"), "other", multiplier=m)]) for m in (0, 1, 2)),
        )
    )
    told = steered(lens, tl.choose(6), multiplier=0).warnings
    assert [(one.code, "what is chosen: multiplier 0" in one.message) for one in told] == [("NO_EFFECT", True)]
    assert np.allclose(plain, nothing, atol=1e-3)  # three lanes round otherwise than one
    assert np.abs(once - plain).mean() < np.abs(twice - plain).mean()


def test_choices_do_not_depend_on_batch_mates_and_each_seed_has_its_own(lens):
    alone = steered(lens, tl.choose(6))
    ask = [(tl.choose(n), seed) for n, seed in ((6, 7), (6, 8), (3, 7), (12, 9))]
    with concurrent.futures.ThreadPoolExecutor(len(ask)) as pool:
        together = list(pool.map(lambda one: steered(lens, one[0], seed=one[1]), ask))
    assert together[0].chosen == alone.chosen
    assert np.abs(together[0].array.astype(int) - alone.array).max() <= 3
    assert together[1].chosen[0].given != alone.chosen[0].given
    assert alone.chosen[0].given.keys() >= together[2].chosen[0].given.keys()
    edit = [tl.transfer(tl.choose(6), "other")]
    several = lens.generate(PROMPT, seeds=[7, 8], steps=2, steer=edit, references=OTHERS)
    assert [one.chosen for one in several] == [alone.chosen, together[1].chosen]


def test_streams_files_and_saved_pictures_tell_what_was_chosen(lens, tmp_path):
    made = steered(lens, tl.choose(3, all_steps=True, own_mask=LEFT), mask=RIGHT)
    made.save(tmp_path / "a.png")
    kept = tl.Provenance.from_png(tmp_path / "a.png")
    assert kept == made.provenance
    run = made.provenance.run
    events = list(lens.stream_generate(PROMPT, seed=7, steps=2, steer=run.steer, references=run.references))
    (done,) = [event for event in events if isinstance(event, tl.Done)]
    assert done.provenance.chosen == made.provenance.chosen
    tl.steering.save(tmp_path / "s.json", run.steer, references=run.references)
    assert tl.steering.load(tmp_path / "s.json").edits == run.steer
    assert repr(run.steer[0]) == (
        "transfer(choose(3, all_steps=True, own_mask=box(0, 0, 0.5, 1)), 'other', mask=box(0.5, 0, 1, 1))"
    )


def test_a_replay_tells_of_other_choices(lens, tmp_path):
    made = steered(lens, tl.choose(3))
    (chosen,) = made.chosen
    given = dict(list(chosen.given.items())[1:])
    made.provenance = dataclasses.replace(made.provenance, chosen=(dataclasses.replace(chosen, given=given),))
    made.save(tmp_path / "a.png")
    assert any(
        "features chosen for edit 0: 1 that only one" in line for line in lens.replay(tmp_path / "a.png").differs
    )


ONE = tl.choose(1)


@pytest.mark.parametrize(
    ("edit", "references", "field"),
    [
        (tl.transfer(tl.choose(0), "other"), OTHERS, "run.edits[0].transfer.choice.features"),
        (tl.transfer(tl.choose(1025), "other"), OTHERS, "run.edits[0].transfer.choice.features"),
        (tl.transfer(tl.choose(2, saes="up.9.9"), "other"), OTHERS, "run.edits[0].transfer.choice.saes[0]"),
        (tl.transfer(tl.choose(2, saes=["mid.0"] * 2), "other"), OTHERS, "run.edits[0].transfer.choice.saes[1]"),
        (tl.transfer(ONE, "other", remove="mid.0/0"), OTHERS, "run.edits[0].transfer.remove"),
        (tl.transfer(ONE, "other", where=tl.where("mid.0/0", above=0)), OTHERS, "run.edits[0].condition"),
        (tl.transfer(ONE, "nobody"), OTHERS, "run.edits[0].reference"),
        (tl.transfer(tl.choose(2, own_mask=tl.mask(b"x")), "other"), OTHERS, "run.edits[0].transfer.choice.own_mask"),
        (tl.transfer(ONE, "0"), {str(i): tl.reference(OTHER) for i in range(4)}, "run.edits[0].transfer.choice"),
    ],
)
def test_what_cannot_be_chosen_is_refused_by_its_field(lens, edit, references, field):
    with pytest.raises(tl.InvalidRequest) as caught:
        lens.generate(PROMPT, seed=7, steer=[edit], references=references)
    assert field in str(caught.value)


def test_choices_count_towards_the_features_of_a_request(lens):
    edits = [tl.transfer(tl.choose(1024), "other", steps=(0, 1))] * 3
    with pytest.raises(tl.InvalidRequest, match="may name 4096 in all"):
        lens.generate(PROMPT, seed=7, steer=edits, references=OTHERS)


def test_what_the_sdk_can_see_is_told_before_anything_is_sent():
    with pytest.raises(TypeError, match="own_mask is int"):
        tl.choose(3, own_mask=3)
    with pytest.raises((TypeError, ValueError)):
        tl.choose(2.5)


def test_choices_read_runs_that_start_and_are_guided_as_the_picture_is(lens):
    """From a picture and with guidance: what is chosen and done is that of edits that name the same runs."""
    start = {"image": lens.generate(PROMPT, seed=7), "strength": 0.5}
    common = {"seed": 7, "steps": 4, "guidance_scale": 2.0, **start}
    runs = {"other": tl.reference(OTHER, **start)}
    made = lens.generate(PROMPT, steer=[tl.transfer(tl.choose(4), "other")], references=runs, **common)
    (chosen,) = made.chosen
    edits = [
        tl.add(list(chosen.given), 1, unit="reference", reference="other"),
        tl.add(list(chosen.taken), -1, unit="reference", reference="own"),
    ]
    named = lens.generate(PROMPT, steer=edits, references=runs | {"own": tl.reference(PROMPT, **start)}, **common)
    assert np.abs(made.array.astype(int) - named.array).max() <= 3
    plain = lens.generate(PROMPT, **common)
    assert np.abs(made.array.astype(int) - plain.array).mean() > 5
