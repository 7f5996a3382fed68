"""None is none: what would be sent as 0, or as the empty text, is a mistake of the caller's."""

from __future__ import annotations

import json

import numpy as np
import pytest

import turbolens as tl
from turbolens._run import extract_call, generate_call

NOT_NUMBERS = [None, "4", True, np.bool_(True), [None], ["4"], [True], 1j]  # a list is an amount for each step


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_an_amount_that_is_no_number_is_a_mistake(value):
    for make in (
        lambda: tl.scale("up.0.1/4", value),
        lambda: tl.add("up.0.1/4", value),
        lambda: tl.set_to("up.0.1/4", value),
        lambda: tl.replace("up.0.1/4", value),
        lambda: tl.transfer("up.0.1/4", "other", multiplier=value),
        lambda: tl.add({"up.0.1/4": value}, 1),
        lambda: tl.box(0, value, 1, 1),
        lambda: tl.polygon((0, 0), (1, value), (1, 1)),
    ):
        with pytest.raises(TypeError, match="give a number"):
            make()


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), np.array(2.0)])
def test_an_amount_of_any_numeric_type(value):
    assert tl.scale("up.0.1/4", value) == tl.scale("up.0.1/4", 2.0)
    assert tl.add({"up.0.1/4": value}, value).to_proto() == tl.add({"up.0.1/4": 2.0}, 2.0).to_proto()


@pytest.mark.parametrize("prompt", [None, 5, b"a cat", ["a cat", None], float("nan")])
def test_a_prompt_that_is_no_text_is_a_mistake(prompt):
    """A column's null must not draw the empty prompt."""
    for make in (
        lambda: generate_call(prompt, None, None, {}),
        lambda: extract_call(prompt, None, None, {}),
        lambda: tl.reference(prompt),
    ):
        with pytest.raises(TypeError, match="give a text"):
            make()


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"scale": {"factor": None}}, r"edits\[0\]\.scale\.factor"),
        ({"features": [{"feature": {"sae": "a", "index": None}}]}, r"edits\[0\]\.features\[0\]\.feature\.index"),
        ({"mask": None}, r"edits\[0\]\.mask"),
    ],
)
def test_a_null_in_edits_is_named(change, path):
    edit = {"features": [{"feature": {"sae": "a", "index": 1}}], "scale": {"factor": 2}}
    with pytest.raises(ValueError, match=rf"^{path} is null"):
        tl.edits_from_json(json.dumps([{**edit, **change}]))
    assert tl.edits_from_json(tl.edits_to_json([tl.ablate("a/1")])) == [tl.ablate("a/1")]
