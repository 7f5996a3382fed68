"""Names of formats and of SAEs; commands import this before torch."""

from __future__ import annotations

import re
from typing import Final, Literal

from turbolens_server.unet.points import is_point

Format = Literal[
    "auto",
    "sdxl-unbox",
    "openai",
    "sparsify",
    "dictionary_learning",
    "saelens",
    "llamascopium",
    "overcomplete",
    "saev",
]
"""Whose folder it is; "auto": told by its files."""
_NAME: Final = re.compile(r"[\w.+-]+")


def check_name(name: str, point: str) -> str:
    """The name for an SAE at a hook point, which requests write as NAME/FEATURE.

    Raises:
        ValueError: it cannot be written so, or it is the name of another hook point.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an SAE; names are of letters, digits and . _ + -")
    if name != point and is_point(name):
        raise ValueError(f"an SAE of {point} cannot be called {name}: that is a block")
    return name
