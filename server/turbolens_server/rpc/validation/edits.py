"""Edits: features, amounts, units, where and when, and which may act together."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import numpy as np

from turbolens_proto.v1 import steering_pb2
from turbolens_server.engine.info import EngineInfo
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.rpc.validation.choices import check_choice, chooses, read_by_step
from turbolens_server.rpc.validation.masks import MaskChecks
from turbolens_server.sae.temporal import refuse_edit
from turbolens_server.steering.edits import Condition, Edit, Rule, Side, Unit, WeightedFeature
from turbolens_server.steering.kinds import KINDS, EditKind
from turbolens_server.steering.masks import FloatGrid, GridMask, Mask

_MASK_SLACK: Final = 0.5 / 255 + 1e-6
"""What rounding to the grey levels of a PNG adds to a weight."""
_UNITS: Final = {0: Unit.MEAN, 1: Unit.RAW, 2: Unit.MEAN, 3: Unit.NORM, 4: Unit.REFERENCE}
_SIDES: Final[dict[int, Side]] = {0: "cond", 1: "cond", 2: "contrast", 3: "both"}


def saes_edited(edits: Sequence[steering_pb2.Edit], info: EngineInfo) -> set[str]:
    """SAEs that edits name, known or not, and those that features are chosen from."""
    named = {item.feature.sae for edit in edits for item in edit.features}
    named |= {edit.condition.feature.sae for edit in edits if edit.HasField("condition")}
    named |= {name for edit in edits if chooses(edit) for name in edit.transfer.choice.saes or read_by_step(info)}
    return named | {ref.sae for edit in edits for ref in edit.transfer.remove}


class EditChecks:
    """Checks the edits of one request, which share the bounds on masks and features."""

    def __init__(
        self,
        checks: Checks,
        masks: MaskChecks,
        *,
        steps: int,
        size: tuple[int, int],
        references: Collection[str],
        guided: bool = False,
    ) -> None:
        self._checks = checks
        self._masks = masks
        self._steps = steps
        self._size = size
        self._references = references
        self._guided = guided

    def edits(self, field: str, edits: Sequence[steering_pb2.Edit]) -> tuple[Edit, ...]:
        """The edits that are right, as the engine has them: what a `transfer` takes away is a `scale` by 0 after it."""
        before = len(self._checks.violations)
        by_message = [self._edit(f"{field}[{i}]", edit, i) for i, edit in enumerate(edits)]
        if len(self._checks.violations) == before:
            self._no_overlap(field, by_message)
        return tuple(edit for several in by_message for edit in several)

    def _edit(self, path: str, edit: steering_pb2.Edit, place: int) -> list[Edit]:
        before = len(self._checks.violations)
        kind: EditKind | None = edit.WhichOneof("kind")
        if kind is None:
            self._checks.wrong(f"{path}.kind", f"is missing; give one of {', '.join(KINDS)}")
        amount, unit = self._amount(path, edit, kind) if kind else (1.0, Unit.MEAN)
        reference = self._reference(path, edit, kind, unit)
        choice = None
        if chooses(edit):
            choice = check_choice(self._checks, self._masks, path, edit, place, len(self._references))
        features = () if chooses(edit) else self._features(path, edit, kind, unit)
        removed = self._removed(f"{path}.transfer.remove", edit.transfer.remove, features)
        points = self._hook_points(f"{path}.patch.hook_points", edit.patch.hook_points) if kind == "patch" else ()
        for name in dict.fromkeys(feature.sae for feature in (*features, *removed)):
            if kind and (reason := refuse_edit(self._checks.info.saes[name].bundle, kind, reference)):
                self._checks.wrong(f"{path}.{kind}", reason)
        window = self._window(f"{path}.steps", edit)
        by_step = self._by_step(f"{path}.amounts", edit, kind, unit, window) if kind else []
        mask = self._masks.mask(f"{path}.mask", edit.mask) if edit.HasField("mask") else None
        named = [*points, *(self._checks.info.saes[feature.sae].hook_point for feature in (*features, *removed))]
        condition = self._condition(f"{path}.condition", edit.condition, named) if edit.HasField("condition") else None
        side = self._side(f"{path}.side", edit, kind)
        if kind is None or len(self._checks.violations) > before:
            return []
        one = Edit(kind, features, amount, unit, mask, window, reference, points, condition, choice, side)
        first = 0 if window is None else window[0]
        valid = [
            dataclasses.replace(one, amount=at, steps=(first + i, first + i + 1)) for i, at in enumerate(by_step)
        ] or [one]
        if removed:
            valid.append(Edit("scale", removed, 0.0, mask=mask, steps=window, condition=condition, side=side))
        if mask is not None:
            valid = self._on_grids(f"{path}.mask", valid, mask)
        if choice is None:
            return valid
        own = valid[0].mask
        if choice.own_mask is not None:
            own = self._on_grids(f"{path}.transfer.choice.own_mask", valid, choice.own_mask)[0].mask
        choice = dataclasses.replace(choice, own_mask=own)
        return [dataclasses.replace(edit, choice=choice) for edit in valid]

    def _amount(self, path: str, edit: steering_pb2.Edit, kind: EditKind) -> tuple[float, Unit]:
        named, message, field = KINDS[kind].amount, getattr(edit, kind), f"{path}.{kind}"
        amount, unit = 1.0, Unit.MEAN
        if KINDS[kind].unit and self._checks.known(f"{field}.unit", message.unit, steering_pb2.Unit):
            unit = _UNITS[message.unit]
        if named is not None and (not KINDS[kind].reference or message.HasField(named)):
            scale = self._raw_scale(edit) if unit is Unit.RAW else 1.0
            amount = self._checks.number(f"{field}.{named}", getattr(message, named), scale)
        if unit is Unit.REFERENCE and KINDS[kind].whole:
            self._checks.bad(f"{field}.unit", unit.value, f"{kind} takes the other units alone")
        return amount, unit

    def _by_step(
        self, field: str, edit: steering_pb2.Edit, kind: EditKind, unit: Unit, window: tuple[int, int] | None
    ) -> list[float]:
        """Amounts of single steps; none where the edit has one for all."""
        if not edit.amounts:
            return []
        named = KINDS[kind].amount
        start, end = window or (0, self._steps)
        if named is None:
            self._checks.bad(field, f"{len(edit.amounts)} amounts", f"{kind} takes none")
        elif len(edit.amounts) != end - start:
            self._checks.bad(field, f"{len(edit.amounts)} amounts", f"give one for each of the {end - start} steps")
        elif getattr(getattr(edit, kind), named):
            self._checks.wrong(field, f"stands in place of {kind}.{named}; leave that out")
        else:
            scale = self._raw_scale(edit) if unit is Unit.RAW else 1.0
            return [self._checks.number(f"{field}[{i}]", amount, scale) for i, amount in enumerate(edit.amounts)]
        return []

    def _condition(self, field: str, condition: steering_pb2.Condition, points: Sequence[str]) -> Condition | None:
        """At which positions an edit acts, of those of the one hook point that it may name."""
        rule: Rule | None = condition.WhichOneof("rule")
        if rule is None:
            self._checks.wrong(f"{field}.rule", "is missing; give one of above, below, map")
        if not self._checks.feature(f"{field}.feature", condition.feature):
            return None
        name, index = condition.feature.sae, condition.feature.index
        sae = self._checks.info.saes[name]
        if other := [point for point in points if point != sae.hook_point]:
            text = f"is of {sae.hook_point}; an edit of {other[0]} can ask for features of that block alone"
            self._checks.wrong(f"{field}.feature", text)
        if sae.bundle.steps is not None:
            self._checks.wrong(f"{field}.feature", f"{name} is a temporal SAE, known after the last step alone")
        if not self._checks.known(f"{field}.unit", condition.unit, steering_pb2.Unit) or rule is None:
            return None
        unit = _UNITS[condition.unit]
        if unit not in (Unit.RAW, Unit.MEAN):
            self._checks.bad(f"{field}.unit", unit.value, "a condition takes raw and mean")
            return None
        self._unit(f"{field}.unit", unit, name, index)
        scale = sae.bundle.activation_scale if unit is Unit.RAW else 1.0
        threshold: float = getattr(condition, rule)
        in_bounds = self._checks.number(f"{field}.{rule}", threshold, scale) == threshold
        if in_bounds and (threshold < 0 or (threshold == 0 and rule != "above")):
            allowed = "at least 0" if rule == "above" else "more than 0"
            self._checks.bad(f"{field}.{rule}", threshold, f"must be {allowed}, as activations are")
        return Condition(WeightedFeature(name, index), rule, threshold, unit)

    def _side(self, field: str, edit: steering_pb2.Edit, kind: EditKind | None) -> Side:
        """Which predictions of a guided run an edit moves."""
        if not self._checks.known(field, edit.side, steering_pb2.Side):
            return "cond"
        side = _SIDES[edit.side]
        if edit.side and not self._guided:
            self._checks.bad(field, side, "a run without guidance has no sides; give a guidance_scale of more than 1")
        if side == "contrast" and kind is not None and KINDS[kind].opposite is None:
            able = " and ".join(name for name, each in KINDS.items() if each.opposite is not None)
            self._checks.bad(field, side, f"{kind} has no opposite; {able} have")
        return side

    def _raw_scale(self, edit: steering_pb2.Edit) -> float:
        """What the activations themselves come to in the SAEs of an edit."""
        saes = self._checks.info.saes
        named = {item.feature.sae for item in edit.features if item.feature.sae in saes}
        return max((saes[name].bundle.activation_scale for name in named), default=1.0)

    def _reference(self, path: str, edit: steering_pb2.Edit, kind: EditKind | None, unit: Unit) -> str | None:
        """The run that an edit reads beside its own."""
        name = edit.reference
        reads = kind is not None and (KINDS[kind].reference or unit is Unit.REFERENCE)
        if reads and name not in self._references:
            have = ", ".join(sorted(self._references)) or "none"
            self._checks.bad(f"{path}.reference", name, f"must be a name among the run's references, which are: {have}")
        elif name and not reads:
            self._checks.bad(f"{path}.reference", name, f'{kind} reads none, but with unit="reference"')
        return name if reads else None

    def _features(
        self, path: str, edit: steering_pb2.Edit, kind: EditKind | None, unit: Unit
    ) -> tuple[WeightedFeature, ...]:
        count, most = len(edit.features), self._checks.limits.max_features_per_edit
        if kind is not None and not KINDS[kind].features:
            if count:
                self._checks.bad(f"{path}.features", f"{count} features", f"{kind} takes hook points and no features")
            return ()
        if not 1 <= count <= most:
            self._checks.bad(f"{path}.features", f"{count} features", f"an edit takes 1 to {most}")
            return ()
        found: dict[tuple[str, int], WeightedFeature] = {}
        for i, item in enumerate(edit.features):
            field = f"{path}.features[{i}]"
            weight = self._checks.number(f"{field}.weight", item.weight) if item.HasField("weight") else 1.0
            if item.HasField("weight") and kind and not KINDS[kind].weights:
                self._checks.bad(f"{field}.weight", item.weight, f"{kind} takes no weights")
            if not self._checks.feature(f"{field}.feature", item.feature):
                continue
            key = (item.feature.sae, item.feature.index)
            if key in found:
                self._checks.bad(f"{field}.feature", f"{key[0]}/{key[1]}", "a feature may be named once in an edit")
            found[key] = WeightedFeature(*key, weight)
            if kind and KINDS[kind].unit:
                self._unit(f"{path}.{kind}.unit", unit, *key)
        return tuple(found.values())

    def _removed(
        self, field: str, refs: Sequence[steering_pb2.FeatureRef], own: Iterable[WeightedFeature]
    ) -> tuple[WeightedFeature, ...]:
        """Features that a transfer takes away."""
        most = self._checks.limits.max_features_per_edit
        if len(refs) > most:
            self._checks.bad(field, f"{len(refs)} features", f"an edit takes away at most {most}")
            return ()
        seen, found = {(feature.sae, feature.index) for feature in own}, []
        for i, ref in enumerate(refs):
            if not self._checks.feature(f"{field}[{i}]", ref):
                continue
            if (ref.sae, ref.index) in seen:
                self._checks.bad(f"{field}[{i}]", f"{ref.sae}/{ref.index}", "a feature may be named once in an edit")
            seen.add((ref.sae, ref.index))
            found.append(WeightedFeature(ref.sae, ref.index))
        return tuple(found)

    def _hook_points(self, field: str, names: Sequence[str]) -> tuple[str, ...]:
        """The blocks whose updates a patch replaces."""
        if not names:
            self._checks.wrong(field, "is empty; give at least one block")
        for i, name in enumerate(names):
            if name not in self._checks.points:
                have = ", ".join(self._checks.points) or "none"
                self._checks.bad(f"{field}[{i}]", name, f"no such block; this server has {have}")
            elif name in names[:i]:
                self._checks.bad(f"{field}[{i}]", name, "a block may be named once in an edit")
        return tuple(names)

    def _unit(self, field: str, unit: Unit, sae: str, index: int) -> None:
        bundle = self._checks.info.saes[sae].bundle
        stats = bundle.stats
        if unit is Unit.MEAN and stats is None:
            self._checks.bad(field, "mean", f'{sae} has no statistics; use unit="raw"')
        elif unit is Unit.MEAN and stats is not None and not stats.mean[index] > 0:
            self._checks.bad(field, "mean", f'{sae}/{index} was never active, so it has no mean; use unit="raw"')
        elif unit is Unit.NORM and bundle.measured is None:
            self._checks.bad(field, "norm", f'{sae}: no statistics of the norm of its block; use unit="raw" or "mean"')

    def _window(self, field: str, edit: steering_pb2.Edit) -> tuple[int, int] | None:
        if not edit.HasField("steps"):
            return None
        start, end = edit.steps.start, edit.steps.end
        if not 0 <= start < end <= self._steps:
            allowed = f"must be a range start < end within 0 to {self._steps}, the steps of this run"
            self._checks.bad(field, f"{start} to {end}", allowed)
        return start, end

    def _points(self, edit: Edit) -> list[str]:
        """Hook points that an edit acts at."""
        saes = (*(feature.sae for feature in edit.features), *(edit.choice.saes if edit.choice else ()))
        named = (self._checks.info.saes[name].hook_point for name in saes)
        return list(dict.fromkeys((*edit.points, *named)))

    def _on_grids(self, field: str, edits: Sequence[Edit], mask: Mask) -> list[Edit]:
        """Edits with their mask on the grids of their blocks: once here and not for every seed in the engine; and a
        picture would wait in the queue at its full size."""
        grids = {self._checks.points[at].grid(*self._size): at for edit in edits for at in self._points(edit)}
        on_grids = GridMask({shape: mask.on_grid(*shape) for shape in grids})
        if empty := [at for shape, at in grids.items() if not on_grids.on_grid(*shape).any()]:
            self._checks.wrong(field, f"covers nothing on the grid of {empty[0]}")
        return [dataclasses.replace(edit, mask=on_grids) for edit in edits]

    def _no_overlap(self, field: str, by_message: Sequence[Sequence[Edit]]) -> None:
        """Edits of the whole update, at one block and step, may not claim more than the whole of any place."""
        claims: dict[tuple[str, int], list[tuple[int, FloatGrid]]] = {}
        for i, edit in ((i, edit) for i, edits in enumerate(by_message) for edit in edits):
            if not KINDS[edit.kind].whole:
                continue
            for at in self._points(edit):
                shape = self._checks.points[at].grid(*self._size)
                grid = np.ones(shape, np.float32) if edit.mask is None else edit.mask.on_grid(*shape)
                for step in range(*(edit.steps or (0, self._steps))):
                    taken = claims.setdefault((at, step), [])
                    taken.append((i, grid))
                    total = np.sum([area for _, area in taken], axis=0)
                    if total.max() > 1 + _MASK_SLACK * len(taken):
                        fullest = np.unravel_index(total.argmax(), shape)
                        others = ", ".join(f"{field}[{other}]" for other, area in taken[:-1] if area[fullest] > 0)
                        text = f"replaces the same place of {at} as {others}; masks may not overlap"
                        self._checks.wrong(f"{field}[{i}].mask", text)
                        return
