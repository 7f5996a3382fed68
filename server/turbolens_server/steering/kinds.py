"""The one table of edit kinds. Validation, the algebra, `GetModel` and the refusals of temporal SAEs read it.

Every kind moves the activation of a feature by an affine map, with a its amount and m the mask at the position:

    z' = z + m own(a) z + m put(a) u,     u = 1, or the feature's activation z_r in a reference run

and a kind that acts on the whole update moves it in the same way, x' = (1 - m) x + m u.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, Literal

EditKind = Literal["add", "scale", "set", "replace", "transfer", "patch"]


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What one kind of edit takes and does."""

    amount: str | None
    """Name of its amount in the contract; None: it has none."""
    own: Callable[[Any], Any]
    """How much of the feature's own activation comes on top, by amount: of a number or a tensor of them."""
    put: Callable[[Any], Any]
    """How much is put in, by amount: in units, or of the reference's activation."""
    unit: bool = False
    """Whether its amount has a unit."""
    weights: bool = False
    """Whether its features may have weights."""
    features: bool = True
    """Whether it names features; else it names hook points."""
    whole: bool = False
    """Whether it takes the place of the whole update, and comes before the kinds that do not."""
    reference: bool = False
    """Whether what it puts in comes from a reference run."""
    opposite: Callable[[float], float] | None = None
    """Amount of the edit of the same kind that moves activations as far the other way; None: there is none."""

    @property
    def reads_own(self) -> bool:
        """Whether it depends on the activations of the pass that it steers."""
        return not self.whole and self.own(2.0) != 0


def _nothing(a: Any) -> Any:
    return 0 * a


def _it(a: Any) -> Any:
    return a


def _all_of_it(a: Any) -> Any:
    """What stood there is taken away."""
    return 0 * a - 1


KINDS: Final[dict[EditKind, Kind]] = {
    "add": Kind("strength", own=_nothing, put=_it, unit=True, weights=True, opposite=lambda a: -a),
    "scale": Kind("factor", own=lambda a: a - 1, put=_nothing, opposite=lambda a: 2 - a),
    "set": Kind("value", own=_all_of_it, put=_it, unit=True, weights=True),
    "replace": Kind("strength", own=_all_of_it, put=_it, unit=True, weights=True, whole=True),
    "transfer": Kind("multiplier", own=_all_of_it, put=_it, weights=True, reference=True),
    "patch": Kind(None, own=_all_of_it, put=_it, features=False, whole=True, reference=True),
}
