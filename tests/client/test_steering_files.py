"""Steering files: what is written is read, in JSON and YAML, and what is wrong is named."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import turbolens as tl
from turbolens.cli import main

GROUPS = {"warm": {"up.0.1/202": 1.0, "up.0.0/3": 0.5}}
REFERENCES = {"other": tl.reference("a blue ring", seed=2**62)}
EDITS = [
    tl.add(GROUPS["warm"], -8, mask=tl.box(0, 0, 0.5, 1), steps=(0, 1)),
    tl.ablate(list(GROUPS["warm"])),
    tl.set_to("mid.0/1", 2, unit="raw"),
    tl.patch("up.0.0", "other", mask=tl.mask(np.eye(4))),
    tl.transfer("up.0.1/1", "other", multiplier=2, remove=["up.0.1/2"]),
]
numbers = st.floats(-1000, 1000, width=32)


@pytest.mark.parametrize("ending", [".json", ".yaml", ".yml"])
def test_a_file_comes_back_as_it_was(tmp_path, ending):
    file = tmp_path / f"steering{ending}"
    tl.steering.save(file, EDITS, groups=GROUPS, references=REFERENCES)
    read = tl.steering.load(file)
    assert list(read.edits) == EDITS
    assert read.references == REFERENCES
    assert {name: {str(ref): w for ref, w in group.items()} for name, group in read.groups.items()} == GROUPS
    assert [plain.get("group") for plain in read.to_plain()["edits"]] == ["warm", "warm", None, None, None]
    tl.steering.save(file, read)
    assert tl.steering.load(file) == read


@given(
    st.dictionaries(st.builds(tl.feature, st.sampled_from(["a", "b/c"]), st.integers(0, 99)), numbers, min_size=1),
    numbers,
    st.text(),
    st.integers(0, 2**63 - 1),
)
def test_any_group_comes_back(group, strength, prompt, seed):
    edits = (tl.add(group, strength), tl.ablate(list(group)), tl.add(next(iter(group)), strength))
    made = tl.steering.Steering(edits, {"g": group}, {}, prompt, seed, 3)
    assert tl.steering.Steering.from_json(made.to_json()) == made


def test_people_may_write_features_as_they_say_them(tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text(
        """
schema: turbolens.steering/1
groups: {warm: {up.0.1/202: 1.0, up.0.0/3: 0.5}, two: [up.0.1/1, up.0.1/2]}
references: {other: {prompt: a big yellow star, seed: 7}}
edits:
  - {group: warm, add: {strength: 8}, steps: {start: 0, end: 1}}
  - {group: two, scale: {factor: 0}}
  - {features: [up.0.1/7], scale: {factor: 0}}
  - {features: {up.0.1/8: 2}, set: {value: 1, unit: UNIT_RAW}}
  - {patch: {hookPoints: [up.0.0]}, reference: other}
"""
    )
    assert list(tl.steering.load(file).edits) == [
        tl.add(GROUPS["warm"], 8, steps=(0, 1)),
        tl.ablate(["up.0.1/1", "up.0.1/2"]),
        tl.ablate("up.0.1/7"),
        tl.set_to({"up.0.1/8": 2}, 1, unit="raw"),
        tl.patch("up.0.0", "other"),
    ]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, "no schema"),
        ({"schema": "elsewhere/1"}, "of schema"),
        ({"schema": "turbolens.steering/2"}, "version"),
        ({"strength": 1}, "strength: no field"),
        ({"edits": [{"group": "cold", "add": {"strength": 1}}]}, "edits: no group 'cold'"),
        ({"edits": [{"group": "g", "features": [], "add": {}}], "groups": {"g": ["a/1"]}}, "not both"),
        ({"edits": [{"features": ["a"], "add": {"strength": 1}}]}, "names no feature"),
        ({"edits": [{"features": ["a/1"], "grow": {}}]}, "edits: no edit"),
        ({"edits": [{"features": ["a/1"], "add": {"strength": None}}]}, "is null"),
        ({"edits": {}}, "edits: is no list"),
        ({"groups": {"g": {}}}, "groups: a group is"),
        ({"groups": {"g": {"a/1": "much"}}}, "groups: the weight of a/1"),
        ({"references": {"r": {"text": "x"}}}, "references: a reference is"),
        ({"edits": [{"patch": {"hookPoints": ["b"]}, "reference": "r"}]}, "references: no 'r'"),
        ({"prompt": 3}, "prompt: it is 3"),
        ({"steps": 1.5}, "steps: it is 1.5"),
        ({"seed": "x"}, "seed: .*'x'"),
        ({"seed": str(2**63)}, "seed"),
    ],
)
def test_what_is_wrong_is_named(wrong, told):
    schema = {} if not wrong else {"schema": "turbolens.steering/1"}
    with pytest.raises(ValueError, match=told):
        tl.steering.Steering.from_plain(schema | wrong)


def test_the_command_checks_applies_and_compares(running, fake, tmp_path, capsys):
    warm, other, bad = (tmp_path / name for name in ("warm.yaml", "other.json", "bad.json"))
    tl.steering.save(warm, EDITS, groups=GROUPS, references=REFERENCES)
    tl.steering.save(other, [tl.add(GROUPS["warm"], 4), *EDITS[1:]], groups=GROUPS, references=REFERENCES)
    bad.write_text("[]")
    main(["steer", "validate", str(warm), "--json"])
    assert json.loads(capsys.readouterr().out)["groups"] == GROUPS
    main(["steer", "validate", str(warm), "--server", running.target])
    out = tmp_path / "out.png"
    main(["steer", "apply", str(warm), "a star", "--seed", "7", "--out", str(out), "--server", running.target])
    assert list(tl.Provenance.from_png(out).run.steer) == EDITS
    assert tl.Provenance.from_png(out).run.references == REFERENCES
    capsys.readouterr()
    main(["steer", "diff", str(warm), str(warm)])
    assert capsys.readouterr().out == "equal\n"
    with pytest.raises(SystemExit) as left:
        main(["steer", "diff", str(warm), str(other), "--json"])
    assert left.value.code == 1
    lines = json.loads(capsys.readouterr().out)
    assert len(lines) == 2
    assert [line[:12] for line in lines] == ["- edit: add(", "+ edit: add("]
    for arguments in (["validate", str(bad)], ["apply", str(warm), "--server", running.target]):
        with pytest.raises(SystemExit) as left:
            main(["steer", *arguments])
        assert left.value.code == 2


def test_without_pyyaml_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "x.yaml").write_text("a: 1")
    with pytest.raises(RuntimeError, match=r"turbolens\[yaml\]"):
        tl.steering.load(tmp_path / "x.yaml")
