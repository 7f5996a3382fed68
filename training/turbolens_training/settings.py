"""What settings of several commands are checked by, before any work."""

from __future__ import annotations


def check_counts(settings: object, *names: str) -> None:
    """Refuse counts below 1, alone or in a tuple; None is none.

    Raises:
        ValueError: one is; the text names it.
    """
    for name in names:
        value = getattr(settings, name)
        counts = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(count < 1 for count in counts):
            raise ValueError(f"{name}={value}, expected at least 1")
