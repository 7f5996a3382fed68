"""Edits: what to change in the activations of a run, and where and when."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np

from turbolens._numbers import number, whole
from turbolens_proto.v1 import steering_pb2

Unit = Literal["mean", "raw", "norm", "reference"]
_UNITS: Final = {
    "mean": steering_pb2.UNIT_MEAN,
    "raw": steering_pb2.UNIT_RAW,
    "norm": steering_pb2.UNIT_NORM,
    "reference": steering_pb2.UNIT_REFERENCE,
}
# An unspecified unit is the mean, says the contract.
UNIT_NAMES: Final[dict[int, Unit]] = {
    steering_pb2.UNIT_UNSPECIFIED: "mean",
    steering_pb2.UNIT_MEAN: "mean",
    steering_pb2.UNIT_RAW: "raw",
    steering_pb2.UNIT_NORM: "norm",
    steering_pb2.UNIT_REFERENCE: "reference",
}
Rule = Literal["above", "below", "map"]
Side = Literal["cond", "contrast", "both"]
SIDES: Final[dict[Side, steering_pb2.Side.ValueType]] = {
    "cond": steering_pb2.SIDE_UNSPECIFIED,
    "contrast": steering_pb2.SIDE_CONTRAST,
    "both": steering_pb2.SIDE_BOTH,
}
SIDE_NAMES: Final[dict[int, Side]] = {
    steering_pb2.SIDE_UNSPECIFIED: "cond",
    steering_pb2.SIDE_COND: "cond",
    steering_pb2.SIDE_CONTRAST: "contrast",
    steering_pb2.SIDE_BOTH: "both",
}
Kind = Literal["add", "scale", "set", "replace", "patch", "transfer"]
_AMOUNTS: Final[dict[Kind, str]] = {
    "add": "strength", "scale": "factor", "set": "value", "replace": "strength", "transfer": "multiplier",
}  # fmt: skip
"""The field of each kind that is a number."""
_WITH_UNIT: Final = ("add", "set", "replace")
_WITH_REFERENCE: Final = ("patch", "transfer")


@dataclasses.dataclass(frozen=True, slots=True)
class FeatureRef:
    """One feature of one SAE."""

    sae: str
    """The SAE's name; a block's name means its default SAE."""
    index: int

    def __str__(self) -> str:
        return f"{self.sae}/{self.index}"


@runtime_checkable
class HasRef(Protocol):
    """Anything that stands for a feature, such as a search result."""

    @property
    def ref(self) -> FeatureRef:
        """The feature."""
        ...


_FORMS: Final = (str, tuple, FeatureRef, HasRef)
FeatureLike: TypeAlias = FeatureRef | HasRef | tuple[str, int] | str
"""A feature: `feature("up.0.1", 202)`, a search result, `("up.0.1", 202)` or `"up.0.1/202"`."""
Features: TypeAlias = FeatureLike | Sequence[FeatureLike] | Mapping[FeatureLike, float]
"""One feature, several, or several with weights."""


def feature(sae: str, index: int) -> FeatureRef:
    """Name a feature: `feature("up.0.1", 202)`."""
    return FeatureRef(sae, whole(index, "a feature's index"))


def to_ref(like: FeatureLike) -> FeatureRef:
    """A feature in any of its forms as a reference.

    Raises:
        TypeError, ValueError: it is none of them.
    """
    if isinstance(like, FeatureRef):
        return like
    if isinstance(like, HasRef):
        return like.ref
    if isinstance(like, str):
        sae, slash, index = like.rpartition("/")
        if not slash or not index.isdecimal():
            raise ValueError(f'{like!r} names no feature; write "BLOCK/INDEX", such as "up.0.1/202"')
        return FeatureRef(sae, int(index))
    if isinstance(like, tuple) and len(like) == 2 and isinstance(like[0], str):
        return feature(*like)
    raise TypeError(f"{like!r} is no feature; give a search result, feature(sae, index) or a (sae, index) tuple")


def terms_of(features: Features) -> tuple[tuple[FeatureRef, float | None], ...]:
    """Features in any of their forms, each with its weight; None: none is given."""
    if isinstance(features, Mapping):
        return tuple((to_ref(like), number(weight, f"the weight of {like}")) for like, weight in features.items())
    if isinstance(features, (str, FeatureRef, HasRef)):
        return ((to_ref(features), None),)
    if isinstance(features, tuple) and len(features) == 2 and not isinstance(features[1], _FORMS):
        return ((to_ref(cast(FeatureLike, features)), None),)  # a name and its index, not two features
    several = cast(Sequence[FeatureLike], features)
    return tuple((to_ref(like), None) for like in several)


def to_refs(features: FeatureLike | Sequence[FeatureLike]) -> list[FeatureRef]:
    """One feature or several, in any of their forms, as references.

    Raises:
        TypeError, ValueError: one is no feature.
    """
    return [ref for ref, _ in terms_of(features)]


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """Where an edit acts; made by :func:`box`, :func:`boxes`, :func:`polygon` and :func:`mask`."""

    message: steering_pb2.Mask

    def __hash__(self) -> int:
        return hash(self.message.SerializeToString(deterministic=True))  # messages themselves have no hash

    def __repr__(self) -> str:
        def numbers(*values: float) -> str:
            return f"({', '.join(f'{value:g}' for value in values)})"

        match self.message.WhichOneof("shape"):
            case "boxes":
                corners = [numbers(b.left, b.top, b.right, b.bottom) for b in self.message.boxes.boxes]
                return f"box{corners[0]}" if len(corners) == 1 else f"boxes({', '.join(corners)})"
            case "polygons" if len(self.message.polygons.polygons) == 1:
                return f"polygon({', '.join(numbers(p.x, p.y) for p in self.message.polygons.polygons[0].points)})"
            case "png":
                return f"mask(<{len(self.message.png)} bytes of PNG>)"
            case shape:
                return f"Mask(<{shape}>)"


_CORNER: Final = "a corner of a polygon"


def box(left: float, top: float, right: float, bottom: float) -> Mask:
    """A box in fractions of the picture, origin at the top left: `box(0, 0, .5, 1)` is the left half."""
    return boxes((left, top, right, bottom))


def boxes(*corners: tuple[float, float, float, float]) -> Mask:
    """The union of boxes, each (left, top, right, bottom).

    Raises:
        ValueError: the corners of one are not in this order, or not in the picture.
    """
    checked = [[number(edge, "an edge of a box") for edge in box] for box in corners]
    for left, top, right, bottom in checked:
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            wrong = f"({left:g}, {top:g}, {right:g}, {bottom:g})"
            raise ValueError(
                f"a box is (left, top, right, bottom), in [0, 1], left < right and top < bottom; got {wrong}"
            )
    shapes = [steering_pb2.Box(left=le, top=to, right=ri, bottom=bo) for le, to, ri, bo in checked]
    return Mask(steering_pb2.Mask(boxes=steering_pb2.Boxes(boxes=shapes)))


def polygon(*points: tuple[float, float]) -> Mask:
    """A polygon by its corners (x, y) in fractions of the picture, origin at the top left."""
    shape = steering_pb2.Polygon(
        points=[steering_pb2.Point(x=number(x, _CORNER), y=number(y, _CORNER)) for x, y in points]
    )
    return Mask(steering_pb2.Mask(polygons=steering_pb2.Polygons(polygons=[shape])))


def mask(picture: Any) -> Mask:
    """A mask from a picture of any size: PNG bytes, a PIL image, or an array [height, width] in [0, 1].

    A PIL image is grey, and its black is 0 and its white 1: of mode "1", "L", "I" or "I;16" (both of 16 bits), or "F"
    (numbers in [0, 1], like an array).

    Raises:
        ValueError: the array's numbers are not in [0, 1], or the image is not grey.
    """
    if isinstance(picture, bytes):
        return Mask(steering_pb2.Mask(png=picture))
    from PIL import Image

    image = _grey(picture) if isinstance(picture, Image.Image) else _grey_of_shares(picture)
    file = io.BytesIO()
    image.save(file, "PNG")
    return Mask(steering_pb2.Mask(png=file.getvalue()))


def _grey_of_shares(array: Any) -> Any:
    """An array of numbers in [0, 1] as an image."""
    from PIL import Image

    values = np.asarray(array, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a mask is [height, width], got shape {values.shape}")
    if not (values.min() >= 0 and values.max() <= 1):  # nor NaN
        raise ValueError(f"a mask's values are in [0, 1], got {values.min():g} to {values.max():g}")
    return Image.fromarray(np.round(values * 255).astype(np.uint8))


def _grey(image: Any) -> Any:
    """A PIL image as one that PNG can hold without changing what its numbers mean, as `convert("L")` would."""
    from PIL import Image

    if image.mode in ("1", "L"):
        return image
    if image.mode == "F":
        return _grey_of_shares(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"a mask of mode {image.mode} holds 0 to 65535, got {values.min()} to {values.max()}")
        return Image.fromarray(values.astype(np.uint16))
    raise ValueError(f'a mask is a grey image, got mode {image.mode}; convert it first, such as by image.convert("L")')


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Condition:
    """Where an edit acts, by a feature's own activation there; made by :func:`where`."""

    feature: FeatureRef
    rule: Rule
    threshold: float
    unit: Unit = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", number(self.threshold, self.rule))
        if self.unit not in ("mean", "raw"):
            raise ValueError(f"unit {self.unit!r} of a condition; use mean or raw")

    def __repr__(self) -> str:
        unit = f", unit={self.unit!r}" if self.unit != "mean" else ""
        return f"where({str(self.feature)!r}, {self.rule}={self.threshold:g}{unit})"

    @classmethod
    def from_proto(cls, message: steering_pb2.Condition) -> Condition:
        """From a message of the contract.

        Raises:
            ValueError: the message says no rule or unit that this client knows.
        """
        rule = message.WhichOneof("rule")
        if rule is None or message.unit not in UNIT_NAMES:
            raise ValueError(
                "a condition without a rule or with an unknown unit; update the client if the server is newer"
            )
        ref = FeatureRef(message.feature.sae, message.feature.index)
        return cls(ref, rule, getattr(message, rule), UNIT_NAMES[message.unit])

    def to_proto(self) -> steering_pb2.Condition:
        """The condition as a message."""
        message = steering_pb2.Condition(feature=_ref_message(self.feature), unit=_UNITS[self.unit])
        setattr(message, self.rule, self.threshold)
        return message


def where(
    feature: FeatureLike,
    *,
    above: float | None = None,
    below: float | None = None,
    map: float | None = None,
    unit: Unit = "mean",
) -> Condition:
    """At which positions an edit acts: by what a feature of the same block is there, before any edit of that step.

    Args:
        feature: in any of its forms.
        above: where its activation is larger; 0: wherever it is active.
        below: where it is smaller, which is also where it is not active.
        map: in the measure of its own map: in full where its activation is `map` or more, by that share below.
        unit: what 1 means: "mean" (its mean activation where active) or "raw".

    Raises:
        TypeError: not one of above, below and map is given.
    """
    given: dict[Rule, float | None] = {"above": above, "below": below, "map": map}
    rules: list[tuple[Rule, float]] = [(rule, value) for rule, value in given.items() if value is not None]
    if len(rules) != 1:
        raise TypeError("a condition takes one of above, below and map")
    ((rule, threshold),) = rules
    return Condition(to_ref(feature), rule, threshold, unit)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Choice:
    """Features for the server to choose; made by :func:`choose`."""

    features: int
    saes: tuple[str, ...] = ()
    all_steps: bool = False
    own_mask: Mask | None = None

    def __repr__(self) -> str:
        said = [str(self.features)]
        said += [f"saes={list(self.saes)}"] if self.saes else []
        said += ["all_steps=True"] if self.all_steps else []
        said += [f"own_mask={self.own_mask!r}"] if self.own_mask is not None else []
        return f"choose({', '.join(said)})"

    @classmethod
    def from_proto(cls, message: steering_pb2.FeatureChoice) -> Choice:
        """From a message of the contract."""
        own = Mask(message.own_mask) if message.HasField("own_mask") else None
        return cls(message.features, tuple(message.saes), message.all_steps, own)

    def to_proto(self) -> steering_pb2.FeatureChoice:
        """The choice as a message."""
        own = self.own_mask.message if self.own_mask else None
        return steering_pb2.FeatureChoice(
            features=self.features, saes=self.saes, all_steps=self.all_steps, own_mask=own
        )


def choose(
    features: int, *, saes: str | Sequence[str] = (), all_steps: bool = False, own_mask: Mask | None = None
) -> Choice:
    """Let the server choose what :func:`transfer` gives and takes: what tells the reference from the picture.

    Their mean activations over the mask, as shares of the sum over all features of all SAEs, are compared between the
    reference's run and the picture's own, both without any edit. `result.chosen` says what was chosen.

    Args:
        features: how many to give, and to take, at most.
        saes: to choose from; none: all.
        all_steps: means over all steps; otherwise over the first.
        own_mask: where features are taken; None: where they are given.
    """
    if own_mask is not None and not isinstance(own_mask, Mask):
        raise TypeError(f"own_mask is {type(own_mask).__name__}; make one with box, boxes, polygon or mask")
    names = (saes,) if isinstance(saes, str) else tuple(saes)
    return Choice(whole(features, "features"), names, bool(all_steps), own_mask)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Edit:
    """One edit; made by :func:`add`, :func:`scale`, :func:`ablate`, :func:`set_to`, :func:`replace`, :func:`patch` and
    :func:`transfer`."""

    kind: Kind
    features: tuple[tuple[FeatureRef, float | None], ...]
    """Empty for `patch`."""
    amount: float
    """1 for `patch`."""
    unit: Unit = "mean"
    """Of `add`, `set` and `replace`."""
    mask: Mask | None = None
    steps: tuple[int, int] | None = None
    reference: str = ""
    """Which of the call's references it reads; empty: none."""
    remove: tuple[FeatureRef, ...] = ()
    """Features that `transfer` takes away."""
    blocks: tuple[str, ...] = ()
    """Blocks of `patch`."""
    amounts: tuple[float, ...] = ()
    """One for each step that it acts at, in place of `amount`, which then is 0; empty: `amount` at all."""
    where: Condition | None = None
    """At which positions; multiplies the mask."""
    choice: Choice | None = None
    """Of a `transfer` without features: what the server is to choose."""
    side: Side = "cond"
    """Which predictions of a guided run it moves."""

    def __post_init__(self) -> None:
        what = f"the {_AMOUNTS.get(self.kind, 'amount')} of {self.kind}"
        object.__setattr__(self, "amount", number(self.amount, what))
        object.__setattr__(self, "amounts", tuple(number(amount, what) for amount in self.amounts))
        if self.unit not in _UNITS:
            raise ValueError(f"unit {self.unit!r}; use one of {', '.join(_UNITS)}")
        if self.side not in SIDES:
            raise ValueError(f"side {self.side!r}; use one of {', '.join(SIDES)}")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise TypeError(f"mask is {type(self.mask).__name__}; make one with box, boxes, polygon or mask")
        if self.where is not None and not isinstance(self.where, Condition):
            raise TypeError(f"where is {type(self.where).__name__}; make one with tl.where(feature, above=...)")
        if not isinstance(self.reference, str):
            raise TypeError('reference is a name: references={"other": reference(...)}, and "other" here')
        if bool(self.reference) != (self.kind in _WITH_REFERENCE or self.unit == "reference"):
            raise ValueError('unit="reference" and reference="NAME" go together')
        if self.steps is not None:
            start, end = self.steps
            steps = whole(start, "the start of steps"), whole(end, "the end of steps")
            object.__setattr__(self, "steps", steps)

    def __repr__(self) -> str:
        terms = [(str(ref), weight) for ref, weight in self.features]
        if any(weight is not None for _, weight in terms):
            what = repr({name: 1.0 if weight is None else weight for name, weight in terms})
        else:
            what = repr(self.choice) if self.choice else _one_or_list(self.blocks or [name for name, _ in terms])
        amount = f"[{', '.join(f'{one:g}' for one in self.amounts)}]" if self.amounts else f"{self.amount:g}"
        said = [what]
        said += [repr(self.reference)] if self.kind in _WITH_REFERENCE else [amount]
        said += [f"multiplier={amount}"] if self.kind == "transfer" and amount != "1" else []
        said += [f"remove={_one_or_list([str(ref) for ref in self.remove])}"] if self.remove else []
        said += [f"unit={self.unit!r}"] if self.unit != "mean" else []
        said += [f"reference={self.reference!r}"] if self.unit == "reference" else []
        said += [f"mask={self.mask!r}"] if self.mask is not None else []
        said += [f"steps={self.steps}"] if self.steps is not None else []
        said += [f"where={self.where!r}"] if self.where is not None else []
        said += [f"side={self.side!r}"] if self.side != "cond" else []
        return f"{'set_to' if self.kind == 'set' else self.kind}({', '.join(said)})"

    @classmethod
    def from_proto(cls, message: steering_pb2.Edit) -> Edit:
        """From a message of the contract.

        Raises:
            ValueError: the message says no kind or unit that this client knows.
        """
        kind = message.WhichOneof("kind")
        if kind is None:
            raise ValueError("an edit without a kind; update the client if the server is newer")
        inner: Any = getattr(message, kind)
        number = inner.unit if kind in _WITH_UNIT else steering_pb2.UNIT_UNSPECIFIED
        if number not in UNIT_NAMES:
            raise ValueError(f"unit {number} is none that this client knows")
        if message.side not in SIDE_NAMES:
            raise ValueError(f"side {message.side} is none that this client knows")
        unsaid = kind == "patch" or (kind == "transfer" and not inner.HasField("multiplier") and not message.amounts)
        return cls(
            kind,
            tuple(
                (FeatureRef(t.feature.sae, t.feature.index), t.weight if t.HasField("weight") else None)
                for t in message.features
            ),
            1.0 if unsaid else getattr(inner, _AMOUNTS[kind]),
            UNIT_NAMES[number],
            Mask(message.mask) if message.HasField("mask") else None,
            (message.steps.start, message.steps.end) if message.HasField("steps") else None,
            message.reference,
            tuple(FeatureRef(ref.sae, ref.index) for ref in message.transfer.remove),
            tuple(message.patch.hook_points),
            tuple(message.amounts),
            Condition.from_proto(message.condition) if message.HasField("condition") else None,
            Choice.from_proto(message.transfer.choice) if message.transfer.HasField("choice") else None,
            SIDE_NAMES[message.side],
        )

    def to_proto(self) -> steering_pb2.Edit:
        """The edit as a message."""
        edit = steering_pb2.Edit(
            features=[
                steering_pb2.WeightedFeature(feature=_ref_message(ref), weight=weight) for ref, weight in self.features
            ],
            mask=self.mask.message if self.mask else None,
            steps=steering_pb2.StepRange(start=self.steps[0], end=self.steps[1]) if self.steps else None,
            reference=self.reference,
            amounts=self.amounts,
            condition=self.where.to_proto() if self.where else None,
            side=SIDES[self.side],
        )
        inner: Any = getattr(edit, self.kind)
        inner.SetInParent()
        if self.kind in _AMOUNTS and not self.amounts:
            setattr(inner, _AMOUNTS[self.kind], self.amount)
        if self.kind in _WITH_UNIT:
            inner.unit = _UNITS[self.unit]
        if self.kind == "transfer":
            inner.remove.extend(map(_ref_message, self.remove))
            if self.choice is not None:
                inner.choice.CopyFrom(self.choice.to_proto())
        if self.kind == "patch":
            inner.hook_points.extend(self.blocks)
        return edit


def _one_or_list(names: Sequence[str]) -> str:
    return repr(names[0] if len(names) == 1 else list(names))


def _ref_message(ref: FeatureRef) -> steering_pb2.FeatureRef:
    return steering_pb2.FeatureRef(sae=ref.sae, index=ref.index)


Steps: TypeAlias = tuple[int, int] | None
Amount: TypeAlias = float | Sequence[float]
"""A number for every step, or one for each step that the edit acts at."""


def _amount(given: Amount) -> tuple[float, tuple[float, ...]]:
    """The one for all steps, and those of single steps."""
    if isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str) and np.ndim(given) == 1:
        if not len(given):
            raise ValueError("a strength for each step: give at least one")
        return 0.0, tuple(given)
    return cast(float, given), ()


def add(
    features: Features,
    strength: Amount,
    *,
    unit: Unit = "mean",
    reference: str = "",
    mask: Mask | None = None,
    steps: Steps = None,
    where: Condition | None = None,
    side: Side = "cond",
) -> Edit:
    """Raise activations by `strength` units (negative: lower them).

    Args:
        features: one feature, several, or a dict of feature to weight.
        strength: -40 to 40 is usual in means; at most 1000, in raw units 1000 times the SAE's largest mean. A list: one
            for each step that it acts at, as in every kind of edit that has an amount.
        unit: "mean" (the feature's mean activation where active), "raw", "norm" (the block's update norm), or
            "reference" (the feature's activation in a reference, at the same position and step).
        reference: for unit "reference": a name among the call's `references`.
        mask: where; None: everywhere.
        steps: half-open range of 0-based steps; None: every step.
        where: at which positions, by a feature's activation there, such as `where(f, above=1)`; None: all.
        side: with guidance, which predictions it moves: "cond", the one with the prompt; "contrast", that one and the
            one without by the opposite, of `add` and `scale` alone; "both", both alike.
    """
    amount, amounts = _amount(strength)
    return Edit(
        "add", terms_of(features), amount, unit, mask, steps, reference, amounts=amounts, where=where, side=side
    )


def scale(
    features: Features,
    factor: Amount,
    *,
    mask: Mask | None = None,
    steps: Steps = None,
    where: Condition | None = None,
    side: Side = "cond",
) -> Edit:
    """Multiply activations by `factor`; 1 changes nothing."""
    amount, amounts = _amount(factor)
    return Edit("scale", terms_of(features), amount, "mean", mask, steps, amounts=amounts, where=where, side=side)


def ablate(
    features: Features,
    *,
    mask: Mask | None = None,
    steps: Steps = None,
    where: Condition | None = None,
    side: Side = "cond",
) -> Edit:
    """Remove features: multiply their activations by 0."""
    return scale(features, 0.0, mask=mask, steps=steps, where=where, side=side)


def set_to(
    features: Features,
    value: Amount,
    *,
    unit: Unit = "mean",
    reference: str = "",
    mask: Mask | None = None,
    steps: Steps = None,
    where: Condition | None = None,
    side: Side = "cond",
) -> Edit:
    """Fix activations at `value` units, wherever they stood."""
    amount, amounts = _amount(value)
    return Edit(
        "set", terms_of(features), amount, unit, mask, steps, reference, amounts=amounts, where=where, side=side
    )


def replace(
    features: Features,
    strength: Amount,
    *,
    unit: Unit = "mean",
    mask: Mask | None = None,
    steps: Steps = None,
    where: Condition | None = None,
    side: Side = "cond",
) -> Edit:
    """Put the features in place of everything that the block would have written."""
    amount, amounts = _amount(strength)
    return Edit("replace", terms_of(features), amount, unit, mask, steps, amounts=amounts, where=where, side=side)


def patch(
    blocks: str | Sequence[str],
    reference: str,
    *,
    mask: Mask | None = None,
    steps: Steps = None,
    where: Condition | None = None,
    side: Side = "cond",
) -> Edit:
    """Put what blocks write in a reference in place of what they would have written, position by position.

    Args:
        blocks: one block or several, such as "up.0.1"; needs no SAE.
        reference: a name among the call's `references`.
        mask: where; None: everywhere.
        steps: half-open range of 0-based steps; None: every step.
        where: at which positions, by a feature's activation there, such as `where(f, above=1)`; None: all.
        side: with guidance, which predictions it moves: "cond", the one with the prompt; "contrast", that one and the
            one without by the opposite, of `add` and `scale` alone; "both", both alike.
    """
    names = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    return Edit("patch", (), 1.0, "mean", mask, steps, reference, (), names, where=where, side=side)


def transfer(
    features: Features | Choice,
    reference: str,
    *,
    multiplier: Amount = 1.0,
    remove: FeatureLike | Sequence[FeatureLike] = (),
    mask: Mask | None = None,
    steps: Steps = None,
    where: Condition | None = None,
    side: Side = "cond",
) -> Edit:
    """Give features the activations that they have in a reference, position by position and step by step.

    Args:
        features: one feature, several, or a dict of feature to weight; or `choose(n)`, which the server chooses, to add
            the reference's activations of what it gives and subtract the picture's own of what it takes, as published.
        reference: a name among the call's `references`.
        multiplier: of the reference's activations.
        remove: features to take away at the same places; none of `features`.
        mask: where; None: everywhere.
        steps: half-open range of 0-based steps; None: every step.
        where: at which positions, by a feature's activation there, such as `where(f, above=1)`; None: all.
        side: with guidance, which predictions it moves: "cond", the one with the prompt; "contrast", that one and the
            one without by the opposite, of `add` and `scale` alone; "both", both alike.
    """
    taken = tuple(to_refs(remove))
    amount, amounts = _amount(multiplier)
    choice = features if isinstance(features, Choice) else None
    return Edit(
        "transfer", () if isinstance(features, Choice) else terms_of(features), amount, "mean", mask, steps, reference,
        taken, amounts=amounts, where=where, choice=choice, side=side,
    )  # fmt: skip


def edits_to_json(edits: Sequence[Edit]) -> str:
    """Edits as JSON, to keep or send: a list of the contract's `Edit` messages."""
    from google.protobuf import json_format

    return json.dumps([json_format.MessageToDict(edit.to_proto()) for edit in edits])


def _null(value: Any, path: str = "") -> str | None:
    """Path of a null in JSON; None: there is none."""
    if value is None:
        return path
    if isinstance(value, dict):
        parts = [(f"{path}.{name}", part) for name, part in value.items()]
    else:
        parts = [(f"{path}[{i}]", part) for i, part in enumerate(value)] if isinstance(value, list) else []
    found = (_null(part, at) for at, part in parts)
    return next((at for at in found if at is not None), None)


def edits_from_json(text: str) -> list[Edit]:
    """Edits from what :func:`edits_to_json` made. Numbers come back as float32, which is how they travel.

    Raises:
        ValueError: the text is not JSON, or is no list of edits.
    """
    from google.protobuf import json_format

    items = json.loads(text)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError("edits are a JSON list of objects")
    if (null := _null(items)) is not None:
        raise ValueError(
            f"edits{null} is null, which would be read as 0 or as nothing; leave it out, or say what it is"
        )
    try:
        return [Edit.from_proto(json_format.ParseDict(item, steering_pb2.Edit())) for item in items]
    except json_format.ParseError as error:
        raise ValueError(f"no edit: {error}") from None
