"""Numbers as callers have them: Python's own, numpy's, and whatever else counts."""

from __future__ import annotations

import operator
from typing import Any


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
