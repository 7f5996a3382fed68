"""The sets of SAEs that ship with `mini`, by the name of their folder, and how each is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

NESTED: Final[Mapping[str, Any]] = {
    "architecture": "matryoshka", "k": 10, "nested_k": (2, 5, 20), "prefixes": (32, 64, 128),
}  # fmt: skip
TEMPORAL: Final[Mapping[str, Any]] = {
    "architecture": "temporal", "run_steps": 4, "prediction": "ridge", "k": 40, "half": True,
}  # fmt: skip
BESIDE: Final[Mapping[str, Mapping[str, Any]]] = {
    "mini-nested": {**NESTED, "hook_points": ("up.0.0",)},
    "mini-temporal": {
        **TEMPORAL, "hook_points": ("up.0.0",), "steps": 1500, "batch": 1024, "reservoir": 16384, "steps_per_chunk": 12,
        "held_out_chunks": 12,
    },
    "mini-attention": {
        "hook_points": ("up.0.1.attn2.0.z",), "d_sae": 128, "k": 8, "steps": 500, "batch": 1024, "reservoir": 16384,
        "held_out_chunks": 4,
    },
}  # fmt: skip
"""Beside `mini-saes`, which is trained by the defaults: what differs from them. Add a set here, to
`turbolens_server.loading.places.EMBEDDED_SAES` and to the package data of `server/pyproject.toml`."""
BESIDE_IMAGES: Final = 512
"""Pictures that their catalogs are made from, at most."""
