"""`turbolens provenance`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

import turbolens as tl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Say how a picture was made, from its file: PNGs that `generate` or `Picture.save` wrote tell it.

    Example: turbolens provenance picture.png
    """

    file: Positional[Path]
    """A PNG."""
    json: bool = False
    """Print JSON, all of it."""

    def run(self) -> None:
        told = tl.Provenance.from_png(self.file)
        if self.json:
            print(told.to_json())
            return
        run = told.run
        lines = {
            "prompt": run.prompt if not run.more_prompts else " | ".join(run.prompts),
            "seed": ", ".join(map(str, run.seeds)),
            "size": f"{run.width}x{run.height}",
            "steps": run.steps,
            **({} if run.start is None else {"starts from": run.start}),
            **{f"edit {i}": edit for i, edit in enumerate(run.steer)},
            **{f"reference {name}": reference for name, reference in run.references.items()},
            "model": f"{told.model} ({told.model_hash[:12]})",
            **{f"SAE {name}": hash[:12] for name, hash in told.sae_hashes.items()},
            "made by": f"{told.backend} on {told.device}, {told.dtype}",
            "versions": ", ".join(f"{name} {version}" for name, version in sorted(told.versions.items())),
        }
        width = max(map(len, lines))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))
