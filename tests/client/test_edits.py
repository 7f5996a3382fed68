"""Edits and masks, before any server sees them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import turbolens as tl
from turbolens_proto.v1 import steering_pb2


@pytest.mark.parametrize(
    "like", [tl.feature("up.0.1", 4), ("up.0.1", 4), "up.0.1/4", [("up.0.1", 4)], {("up.0.1", 4): 1.0}]
)
def test_a_feature_in_any_form(like):
    (term,) = tl.add(like, 2).to_proto().features
    assert (term.feature.sae, term.feature.index) == ("up.0.1", 4)


WHOLE = [4, np.int64(4), np.uint8(4), np.array(4)]
"""The same number as it comes out of a list, an array and a loop over one."""
NOT_WHOLE = [4.0, np.float32(4.5), True, np.bool_(True), "4", None]


@pytest.mark.parametrize("number", WHOLE)
def test_an_index_or_a_step_of_any_whole_type(number):
    plain = tl.add("up.0.1/4", 2, steps=(0, 4))
    assert tl.add(("up.0.1", number), 2, steps=(0, number)) == plain
    assert tl.add([("up.0.1", number)], 2, steps=(number - 4, number)) == plain
    assert tl.add(tl.feature("up.0.1", number), 2, steps=(0, number)).to_proto() == plain.to_proto()
    assert repr(tl.add(("up.0.1", number), 2, steps=(0, number))) == repr(plain)


@pytest.mark.parametrize("number", NOT_WHOLE)
def test_an_index_or_a_step_that_is_no_whole_number_is_a_mistake(number):
    for make in (
        lambda: tl.add([("up.0.1", number)], 2),
        lambda: tl.add(tl.feature("up.0.1", number), 2),
        lambda: tl.add("up.0.1/4", 2, steps=(0, number)),
    ):
        with pytest.raises(TypeError, match="whole number"):
            make()


def test_a_pair_of_features_is_no_name_and_index():
    for pair in (("up.0.1/4", "up.0.1/5"), (("up.0.1", 4), ("up.0.1", 5)), ("up.0.1/4", tl.feature("up.0.1", 5))):
        assert [term.feature.index for term in tl.add(pair, 2).to_proto().features] == [4, 5]
    with pytest.raises(TypeError, match="whole number"):
        tl.add(("up.0.1", 4.0), 2)


def test_groups_and_weights():
    message = tl.add({"mid.0/1": 1.0, "mid.0/2": -0.5}, 3).to_proto()
    assert [(t.feature.index, t.weight) for t in message.features] == [(1, 1.0), (2, -0.5)]
    assert not tl.add("mid.0/1", 3).to_proto().features[0].HasField("weight")


@pytest.mark.parametrize(
    ("edit", "kind", "field", "value"),
    [
        (tl.add("mid.0/1", 3), "add", "strength", 3),
        (tl.scale("mid.0/1", 2), "scale", "factor", 2),
        (tl.ablate("mid.0/1"), "scale", "factor", 0),
        (tl.set_to("mid.0/1", 5), "set", "value", 5),
        (tl.replace("mid.0/1", 4), "replace", "strength", 4),
    ],
)
def test_every_kind(edit, kind, field, value):
    message = edit.to_proto()
    assert message.WhichOneof("kind") == kind
    assert getattr(getattr(message, kind), field) == value
    if kind != "scale":
        assert getattr(message, kind).unit == steering_pb2.UNIT_MEAN


def test_where_and_when():
    message = tl.add("mid.0/1", 1, mask=tl.box(0, 0.1, 0.5, 1), steps=(1, 3), unit="raw").to_proto()
    assert message.mask.boxes.boxes[0].right == 0.5
    assert (message.steps.start, message.steps.end) == (1, 3)
    assert message.add.unit == steering_pb2.UNIT_RAW
    assert len(tl.polygon((0, 0), (1, 0), (0, 1)).message.polygons.polygons[0].points) == 3


@pytest.mark.parametrize(
    "corners", [(0.5, 0, 0.5, 1), (0.6, 0, 0.4, 1), (0, 0.9, 1, 0.1), (0, 0, 1.01, 1), (-0.1, 0, 1, 1), (0, 0, 64, 64)]
)
def test_a_box_whose_corners_are_not_in_order_or_not_in_the_picture_is_refused(corners):
    for make in (lambda: tl.box(*corners), lambda: tl.boxes((0, 0, 1, 1), corners)):
        with pytest.raises(ValueError, match=r"a box is \(left, top, right, bottom\), in \[0, 1\], left < right"):
            make()


def test_masks_from_pictures_agree():
    values = np.linspace(0, 1, 16).reshape(4, 4)
    image = Image.fromarray(np.round(values * 255).astype(np.uint8))
    assert tl.mask(values).message.png == tl.mask(image).message.png
    assert tl.mask(b"as it is").message.png == b"as it is"


@pytest.mark.parametrize(
    ("image", "bits"),
    [
        (Image.fromarray(np.array([[False, True]])), 1),
        (Image.fromarray(np.array([[0, 128, 255]], np.uint8)), 8),
        (Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), 8),
        (Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)), 16),
        (Image.fromarray(np.array([[0, 32768, 65535]], np.int32)), 16),
    ],
)
def test_a_grey_image_keeps_its_meaning(image, bits):
    """Black is 0, white is 1 and the middle is a half, in every mode."""
    data = tl.mask(image).message.png
    assert data[24] == bits, "the PNG's depth"
    got = np.asarray(Image.open(io.BytesIO(data)), np.float64) / (2**bits - 1)
    assert got[0] == pytest.approx([0, 0.5, 1][:: 2 if bits == 1 else 1], abs=0.003)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "CMYK"])
def test_an_image_that_is_not_grey_is_refused(mode):
    with pytest.raises(ValueError, match=rf'mode {mode}.*convert\("L"\)'):
        tl.mask(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("values", [np.array([[0, 70000]], np.int32), np.array([[-1, 2]], np.int32)])
def test_an_image_of_numbers_past_16_bits_is_refused(values):
    with pytest.raises(ValueError, match="0 to 65535"):
        tl.mask(Image.fromarray(values))


def test_an_image_of_numbers_past_1_is_refused():
    with pytest.raises(ValueError, match="mask"):
        tl.mask(Image.fromarray(np.array([[0, 255]], np.float32)))


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (np.ones(4), r"got shape \(4,\)"),
        (np.ones((0, 3)), r"got shape \(0, 3\)"),
        (np.full((2, 2), 2.0), "got 2 to 2"),
        (np.full((2, 2), np.nan), "got nan to nan"),
        (np.array([[0, np.inf]]), "got 0 to inf"),
    ],
)
def test_arrays_that_are_no_masks(bad, told):
    with pytest.raises(ValueError, match=f"a mask.*{told}"):
        tl.mask(bad)


@pytest.mark.parametrize("bad", ["up.0.1", "up.0.1/x", "/"])
def test_text_that_names_no_feature(bad):
    with pytest.raises(ValueError, match="names no feature"):
        tl.add(bad, 1)


def test_wrong_types_are_told():
    with pytest.raises(TypeError, match="no feature"):
        tl.add([3], 1)
    with pytest.raises(ValueError, match="unit"):
        tl.add("mid.0/1", 1, unit="meters")
    with pytest.raises(TypeError, match="mask"):
        tl.add("mid.0/1", 1, mask=(0, 0, 1, 1))


EDITS = [
    tl.add("up.0.1/202", 8, mask=tl.box(0, 0, 0.5, 1)),
    tl.add({"up.0.1/1": 1, "up.0.1/2": -0.5}, -3.5, unit="norm", steps=(0, 2)),
    tl.set_to(["up.0.1/1", "up.0.1/2"], 2, unit="raw", mask=tl.polygon((0, 0), (1, 0), (0, 1))),
    tl.ablate("up.0.1/3", mask=tl.boxes((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1))),
    tl.replace("mid.0/3", 4, mask=tl.mask(np.ones((2, 2)))),
]


def test_edits_survive_json():
    assert tl.edits_from_json(tl.edits_to_json(EDITS)) == EDITS
    assert tl.edits_from_json("[]") == []


@pytest.mark.parametrize("bad", ["", "{}", "[1]", '[{"features": []}]', '[{"paint": {}}]', '[{"add": {"unit": 9}}]'])
def test_text_that_is_no_edits(bad):
    with pytest.raises(ValueError, match=r"edit|JSON|Expecting|unit"):
        tl.edits_from_json(bad)


def test_edits_show_the_call_that_makes_them():
    names = {name: getattr(tl, name) for name in tl.__all__}
    for edit in EDITS[:4]:
        assert eval(repr(edit), names) == edit
    assert repr(EDITS[0]) == "add('up.0.1/202', 8, mask=box(0, 0, 0.5, 1))"
    assert "bytes of PNG" in repr(EDITS[4])


def test_edits_do_not_change_and_can_be_keys():
    assert len({*EDITS, *EDITS}) == len(EDITS)
    with pytest.raises(AttributeError):
        EDITS[0].amount = 3


def test_an_unspecified_unit_is_the_mean():
    message = tl.add("mid.0/1", 2).to_proto()
    message.add.unit = steering_pb2.UNIT_UNSPECIFIED
    assert tl.Edit.from_proto(message) == tl.add("mid.0/1", 2)


@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        (tl.patch("up.0.1", "other"), "patch('up.0.1', 'other')"),
        (tl.patch(["mid.0", "up.0.1"], "other", steps=(0, 1)), "patch(['mid.0', 'up.0.1'], 'other', steps=(0, 1))"),
        (tl.transfer("up.0.1/2", "other"), "transfer('up.0.1/2', 'other')"),
        (
            tl.add("up.0.1/2", 2, unit="reference", reference="other"),
            "add('up.0.1/2', 2, unit='reference', reference='other')",
        ),
        (
            tl.transfer({"up.0.1/2": 0.5}, "other", multiplier=2, remove=["mid.0/1"], mask=tl.box(0, 0, 0.5, 1)),
            "transfer({'up.0.1/2': 0.5}, 'other', multiplier=2, remove='mid.0/1', mask=box(0, 0, 0.5, 1))",
        ),
    ],
)
def test_edits_that_read_another_run_travel_and_show_what_they_are(edit, shown):
    assert repr(edit) == shown
    assert tl.Edit.from_proto(edit.to_proto()) == edit
    assert tl.edits_from_json(tl.edits_to_json([edit])) == [edit]


def test_a_multiplier_that_is_not_said_is_one():
    message = tl.transfer("up.0.1/2", "other").to_proto()
    message.transfer.ClearField("multiplier")
    assert tl.Edit.from_proto(message).amount == 1


def test_a_reference_is_read_by_its_name():
    with pytest.raises(TypeError, match="reference is a name"):
        tl.patch("up.0.1", tl.reference("x"))


@pytest.mark.parametrize("arguments", [{"unit": "reference"}, {"reference": "other"}])
def test_the_unit_of_a_reference_and_its_name_go_together(arguments):
    for make in (tl.add, tl.set_to):
        with pytest.raises(ValueError, match="go together"):
            make("up.0.1/2", 1, **arguments)


@pytest.mark.parametrize("side", ["contrast", "both"])
def test_a_side_of_guidance_is_written_read_and_shown(side):
    for edit in (
        tl.add("up.0.1/4", 2, side=side), tl.ablate("up.0.1/4", side=side), tl.set_to("up.0.1/4", 2, side=side),
        tl.replace("up.0.1/4", 2, side=side), tl.patch("up.0.1", "r", side=side),
        tl.transfer("up.0.1/4", "r", side=side),
    ):  # fmt: skip
        assert edit.to_proto().side == {"contrast": steering_pb2.SIDE_CONTRAST, "both": steering_pb2.SIDE_BOTH}[side]
        assert tl.Edit.from_proto(edit.to_proto()) == edit
        assert f"side={side!r}" in repr(edit)
        assert tl.edits_from_json(tl.edits_to_json([edit])) == [edit]


def test_the_side_with_the_prompt_goes_without_saying():
    plain = tl.add("up.0.1/4", 2)
    assert "side" not in repr(plain)
    told = plain.to_proto()
    told.side = steering_pb2.SIDE_COND
    assert tl.Edit.from_proto(told) == plain
    told.side = 9
    with pytest.raises(ValueError, match="side 9"):
        tl.Edit.from_proto(told)
    with pytest.raises(ValueError, match="use one of cond, contrast, both"):
        tl.add("up.0.1/4", 2, side="uncond")
