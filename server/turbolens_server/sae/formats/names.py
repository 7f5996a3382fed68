"""Names of formats, and of hook points as people write them; commands import this before torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

Format = Literal["auto", "sdxl-unbox", "openai", "sparsify", "dictionary_learning", "saelens"]
"""Whose folder it is; "auto": told by its files."""
_MODULE: Final = re.compile(
    r"(?:(down|up)_blocks\.(\d+)\.attentions\.(\d+)|mid_block\.attentions\.(\d+))"
    r"(?:\.transformer_blocks\.(\d+)\.(attn[12]))?"
)
_SHORT: Final = re.compile(r"(?:(down|up)\.(\d+)\.(\d+)|mid\.(\d+))(?:\.(attn[12])\.(\d+))?")


_NAME: Final = re.compile(r"[\w.+-]+")


def find_block(text: str) -> str | None:
    """The hook point that a text names: "unet.down_blocks.2.attentions.1_k10" and "down.2.1" are "down.2.1".

    A module inside a block, "...transformer_blocks.0.attn1", is "down.2.1.attn1.0".
    """
    if module := _MODULE.search(text):
        kind, i, j, middle, layer, attention = module.groups()
        block = f"mid.{middle}" if middle else f"{kind}.{i}.{j}"
        return f"{block}.{attention}.{layer}" if attention else block
    return text if _SHORT.fullmatch(text) else None


def block_of_folder(folder: Path) -> str | None:
    """The hook point that a folder's name says, or else the nearest of its parents' names."""
    return next((block for part in reversed(folder.resolve().parts) if (block := find_block(part))), None)


def module_of(block: str) -> str:
    """ "down.2.1" -> "down_blocks.2.attentions.1".

    Raises:
        ValueError: it is no name of a hook point.
    """
    name = _SHORT.fullmatch(block)
    if name is None:
        raise ValueError(f"{block!r} is no block; names look like down.2.1, mid.0 or up.0.1")
    kind, i, j, middle, attention, layer = name.groups()
    module = f"mid_block.attentions.{middle}" if middle else f"{kind}_blocks.{i}.attentions.{j}"
    return f"{module}.transformer_blocks.{layer}.{attention}" if attention else module


def check_name(name: str, block: str) -> str:
    """The name for an SAE at a block, which requests write as NAME/FEATURE.

    Raises:
        ValueError: it cannot be written so, or it is the name of another block.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an SAE; names are of letters, digits and . _ + -")
    if name != block and _SHORT.fullmatch(name):
        raise ValueError(f"an SAE of {block} cannot be called {name}: that is a block")
    return name
