"""Several prompts in a request: each what it is alone, in order, named, and refused where there are too many."""

from __future__ import annotations

import json

import numpy as np
import pytest

import turbolens as tl
from turbolens.cli import main

PROMPTS = ["a big red star on the left, night background", "a small blue ring on the right, snow background", ""]


def apart(one: tl.Picture, other: tl.Picture) -> int:
    return int(np.abs(one.array.astype(int) - other.array).max())


def test_each_is_what_it_is_alone_at_every_seed(lens):
    pictures = lens.generate(PROMPTS, seeds=[7, 8], steps=2)
    assert isinstance(pictures, tl.Pictures)
    assert [(p.prompt, p.seed) for p in pictures] == [(prompt, seed) for prompt in PROMPTS for seed in (7, 8)]
    for picture in pictures:
        assert apart(picture, lens.generate(picture.prompt, seed=picture.seed, steps=2)) <= 3
    assert apart(pictures[0], pictures[2]) > 10


def test_one_seed_is_shared_and_one_that_is_drawn_too(lens):
    first, second = lens.generate(PROMPTS[:2], seed=7)
    assert (first.seed, second.seed) == (7, 7)
    first, second = lens.generate(PROMPTS[:2])
    assert first.seed == second.seed
    assert len(lens.generate(PROMPTS[:1], seed=7)) == 1  # a list is answered by a list


def test_features_too_alone_and_streamed(lens):
    found = lens.extract(PROMPTS[:2], seed=7)
    alone = [lens.extract(prompt, seed=7) for prompt in PROMPTS[:2]]
    assert [one.prompt for one in found] == PROMPTS[:2]
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one["up.0.1"].means(), other["up.0.1"].means(), atol=1e-3)
    events = list(lens.stream_features(PROMPTS[:2], seed=7, saes=["up.0.1"]))
    streamed = {event.seed_index: event.block for event in events if isinstance(event, tl.Features)}
    assert list(streamed[1].indices) == list(found[1]["up.0.1"].indices)
    ready = [e.picture for e in lens.stream_generate(PROMPTS, seeds=[1, 2]) if isinstance(e, tl.PictureReady)]
    assert {(p.prompt, p.seed) for p in ready} == {(prompt, seed) for prompt in PROMPTS for seed in (1, 2)}


def test_all_options_hold_for_each(lens):
    """Edits, what a run starts from, references and choices: those of a picture alone."""
    base = lens.generate(PROMPTS[0], seed=1)
    options = {
        "image": base, "strength": 0.5, "steps": 4, "steer": [tl.transfer(tl.choose(3), "other")],
        "references": {"other": tl.reference("a green square", image=base, strength=0.5)},
    }  # fmt: skip
    for picture in lens.generate(PROMPTS[:2], seed=7, **options):
        alone = lens.generate(picture.prompt, seed=7, **options)
        assert picture.chosen[0].given.keys() == alone.chosen[0].given.keys()
        assert apart(picture, alone) <= 3
    first, second = picture.provenance.chosen
    assert (first.prompt_index, second.prompt_index, picture.chosen) == (0, 1, (second,))
    assert first.given != second.given  # by scores: each is chosen against its own prompt's run


def test_a_picture_and_a_manifest_say_which_of_the_prompts(lens, tmp_path):
    last = lens.generate(PROMPTS, seeds=[7, 8])[-1]
    last.save(tmp_path / "last.png")
    (tmp_path / "last.json").write_text(tl.manifest(last).to_json())
    for name in ("last.png", "last.json"):
        replay = lens.replay(tmp_path / name)
        assert (replay.verdict, replay.made.prompt, replay.made.seed) == ("equal", PROMPTS[-1], 8)
    told = tl.Provenance.from_png(tmp_path / "last.png").run
    assert (told.prompts, told.results) == (tuple(PROMPTS), 6)


def test_what_cannot_be_served_is_refused_by_its_field(lens):
    with pytest.raises(tl.InvalidRequest) as error:
        lens.generate(["x"] * 6, seeds=[1, 2, 3])
    assert [str(v) for v in error.value.violations] == [
        "run.more_prompts: got '6 prompts at 3 seeds, 18 pictures'; at most 16 are allowed"
    ]
    with pytest.raises(tl.InvalidRequest) as error:
        lens.extract(["x"] * 17)
    assert error.value.violations[0].field == "run.more_prompts"
    with pytest.raises(tl.InvalidRequest) as error:
        lens.generate(["x", "y", "z" * 5000])
    assert [v.field for v in error.value.violations] == ["run.more_prompts[1]"]
    for wrong, kind in (([], ValueError), (["x", 3], TypeError), (None, TypeError)):
        with pytest.raises(kind, match="prompt"):
            lens.generate(wrong)


def test_a_prompt_that_is_cut_is_named(lens):
    long = "a long story " + "of a star " * 60
    (warning,) = lens.extract(["a star", long], seed=1, saes=["up.0.1"])[0].warnings
    assert warning.code == "PROMPT_CUT"
    assert warning.message.startswith("of 'a long story of a star")


def test_by_command(server, tmp_path, capsys):
    out = ["--server", server.target, "--json"]
    main(["generate", "a star", "--also", "a ring", "--seeds", "7,8", "--out", str(tmp_path / "p.png"), *out])
    told = json.loads(capsys.readouterr().out)
    assert [(one["prompt"], one["seed"]) for one in told] == [
        ("a star", 7),
        ("a star", 8),
        ("a ring", 7),
        ("a ring", 8),
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p-1-7.png", "p-1-8.png", "p-2-7.png", "p-2-8.png"]
    main(["extract", "a star", "--also", "a ring", "--top", "1", *out])
    assert [one["prompt"] for one in json.loads(capsys.readouterr().out)] == ["a star", "a ring"]
