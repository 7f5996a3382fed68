"""Values as callers have them: numbers of Python, numpy and whatever else counts, and texts.

None is none: protobuf takes it for a field that was left out, which is 0 or the empty text.
"""

from __future__ import annotations

import math
import operator
from typing import Any, Final

_LONGEST_S: Final = 366 * 24 * 3600


def whole(value: Any, what: str) -> int:
    """A whole number of any type, such as numpy's, as an int; `what` names it in the error.

    Raises:
        TypeError: it is a fraction, text or a truth value, which would otherwise be cut or counted in silence.
    """
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{what} is {value!r}; give a whole number")
    return operator.index(value)


def whole_or_none(value: Any, what: str) -> int | None:
    """The same where nothing may be said.

    Raises:
        TypeError: as for :func:`whole`.
    """
    return None if value is None else whole(value, what)


def number(value: Any, what: str) -> float:
    """A number of any type, such as numpy's, as a float; `what` names it in the error.

    Raises:
        TypeError: it is none, or a truth value.
    """
    kind = type(value)
    if kind.__name__.startswith("bool") or not (hasattr(kind, "__float__") or hasattr(kind, "__index__")):
        raise TypeError(f"{what} is {value!r}; give a number")
    return float(value)


def seconds(value: Any, what: str) -> float:
    """How long something may take; infinity: as long as it does.

    Raises:
        TypeError, ValueError: it is no number, not above 0, or longer than a year, past which gRPC ends calls at once.
    """
    given = number(value, what)
    if not (0 < given <= _LONGEST_S or given == math.inf):
        raise ValueError(f"{what} is {given:g}; give seconds above 0 and up to {_LONGEST_S} (a year), or inf: no limit")
    return given


def text(value: Any, what: str) -> str:
    """A text; `what` names it in the error.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what} is {value!r}; give a text")
    return value


def switch(value: Any, what: str) -> bool:
    """Whether something is wanted; `what` names it in the error.

    Raises:
        TypeError: it is no truth value: "off" and 0.5 would count as on.
    """
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{what} is {value!r}; give True or False")
    return bool(value)
