"""Learned gates and SAEs of whole runs by every way that a caller has: made again, read, and refused by name."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import turbolens as tl
from turbolens_server.embedded import start

PROMPT = "a big red ring left of a small blue star, night background"
LEFT = tl.box(0, 0, 0.5, 1)


@pytest.fixture(scope="module")
def gated():
    """A client of a server with gates, of its own SAEs and a temporal one."""
    with start(gate="mini", sae=("mini-saes", "run=mini-temporal")) as server, tl.connect(server.target) as connected:
        yield connected


def dense(run, sae: str) -> np.ndarray:
    return run[sae].to_dense()


def test_what_was_made_through_gates_is_made_again(gated, lens, tmp_path):
    with_all = {
        "steer": [tl.add("up.0.1/202", 8, mask=LEFT), tl.ablate("up.0.1/7")], "regions": [(LEFT, "a red ring")],
        "guidance_scale": 3, "steps": 2,
    }  # fmt: skip
    pictures = [gated.generate(PROMPT, seed=7, gate=True, **given) for given in ({}, with_all)]
    read = gated.extract(PROMPT, seed=7, gate=True, saes=["up.0.1"], **with_all)
    files = [tmp_path / f"{at}.json" for at in range(3)]
    for file, result in zip(files, [*pictures, read], strict=True):
        file.write_text(tl.manifest(result).to_json())
    assert [str(gated.replay(file)) for file in files] == ["equal"] * 3
    for file in files:
        without = lens.replay(file)
        assert without.verdict == "refused"
        assert "no learned region gates are served" in without.detail
        assert any(line.startswith("learned gates: ") and line.endswith("none now") for line in without.differs)
    hash_then = pictures[0].provenance.gate_hash
    told = json.loads(files[0].read_text().replace(hash_then, "f" * len(hash_then)))
    files[0].write_text(json.dumps(told))
    assert any(line.startswith("learned gates: ffff") for line in gated.replay(files[0]).differs)


def test_features_beside_gates_are_those_of_the_picture_that_is_drawn_through_them(gated):
    drawn = gated.generate(PROMPT, seed=7, gate=True, features=["up.0.1"], float32=True)
    read, off = (gated.extract(PROMPT, seed=7, gate=gate, saes=["up.0.1"], float32=True) for gate in (True, False))
    assert np.array_equal(dense(drawn.features, "up.0.1"), dense(read, "up.0.1"))
    assert not np.array_equal(dense(off, "up.0.1"), dense(read, "up.0.1"))
    assert gated.generate(PROMPT, seed=7, gate=True).array.tobytes() == drawn.array.tobytes()
    edited = gated.extract(PROMPT, seed=7, gate=True, saes=["mid.0"], steer=[tl.add("down.2.1/3", 20)])
    assert not np.array_equal(dense(edited, "mid.0"), dense(gated.extract(PROMPT, seed=7, saes=["mid.0"]), "mid.0"))


ADD = [tl.add("run/3", 8)]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_other_steps_are_refused_by_name_whatever_the_call(gated, steps, tmp_path):
    told = rf"run\.sampling\.steps.*got {steps}; the temporal SAE run serves runs of 4 steps alone"
    asked = {"seed": 7, "steps": steps}
    pictures = {**asked, "steer": ADD}
    ways = {
        "generate": lambda: gated.generate(PROMPT, **pictures),
        "its features": lambda: gated.generate(PROMPT, **asked, features=["run"]),
        "stream": lambda: list(gated.stream_generate(PROMPT, **pictures)),
        "extract": lambda: gated.extract(PROMPT, **asked, saes=["run"]),
        "stream of features": lambda: list(gated.stream_features(PROMPT, **asked, saes=["run"])),
        "reads them in a steered run": lambda: gated.extract(PROMPT, **pictures, saes=["mid.0"]),
    }
    for way in ways.values():
        with pytest.raises(tl.InvalidRequest, match=told):
            way()


def test_to_make_a_run_again_in_other_steps_is_refused_by_name(gated, tmp_path):
    made = gated.generate(PROMPT, seed=7, steps=4, steer=ADD)
    file = tmp_path / "run.json"
    file.write_text(tl.manifest(made).to_json())
    assert str(gated.replay(file)) == "equal"
    account = made.provenance
    run = dataclasses.replace(account.run, steps=2)
    made.provenance = dataclasses.replace(account, run=run)
    file.write_text(tl.manifest(made).to_json())
    again = gated.replay(file)
    assert again.verdict == "refused"
    assert "the temporal SAE run serves runs of 4 steps alone" in again.detail
